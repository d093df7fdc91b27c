// shapley_crop_boxes: from a model's outputs to heatmaps and crop boxes (defined in ddfast/ops/reference.py).
//
// One pass an image, with the functions of shapley_heatmap and noisy_crop_boxes, so with their bits: values, heatmap and
// pooled map stay in the first cache. Images are independent, so that threads cannot change a bit.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "coalition_values.h"
#include "crop_boxes.h"
#include "dispatch.h"
#include "layout.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kName = "shapley_crop_boxes";
constexpr int64_t kElementsPerTask = 16384;  // the least work worth handing to another thread

// All arguments contiguous; `partial` is null where nothing is to be added.
template <typename Logit, typename Compute>
void run(const Tensor& outputs, const Tensor& labels, const Tensor& projection, const double* partial,
         ddfast::Value value, const Tensor& sample_ids, const ddfast::CropBoxes& crop_boxes, Tensor& phi,
         Tensor& boxes) {
  const int64_t batch = outputs.size(0), count = outputs.size(1), classes = outputs.size(2);
  const int64_t players = projection.size(-1), box_numbers = crop_boxes.crops * 4;
  const Logit* output_data = static_cast<const Logit*>(outputs.const_data_ptr());
  const Compute* projection_data = projection.const_data_ptr<Compute>();
  const int64_t projection_stride = projection.dim() == 3 ? count * players : 0;
  const int64_t *label_data = labels.const_data_ptr<int64_t>(), *id_data = sample_ids.const_data_ptr<int64_t>();
  Compute* phi_data = phi.mutable_data_ptr<Compute>();
  int32_t* box_data = boxes.mutable_data_ptr<int32_t>();

  const int64_t elements = count * (players + (value == ddfast::Value::kLogit ? 1 : classes));
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, elements));
  torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    std::vector<Compute> logits, values(count);
    std::vector<double> sum(players);
    std::vector<float> heatmap(players), pooled;
    for (int64_t image = begin; image < end; ++image) {
      ddfast::coalition_values(output_data + image * count * classes, label_data[image], count, classes, value, logits,
                               values.data());
      ddfast::project(values.data(), projection_data + image * projection_stride, count, players, sum.data());
      for (int64_t i = 0; i < players; ++i) {
        Compute cell = static_cast<Compute>(sum[i]);
        if (partial != nullptr) cell = static_cast<Compute>(partial[image * players + i] + static_cast<double>(cell));
        phi_data[image * players + i] = cell;
        heatmap[i] = static_cast<float>(cell);
      }
      crop_boxes.place(heatmap.data(), id_data[image], pooled, box_data + image * box_numbers);
    }
  });
}

std::tuple<Tensor, Tensor> shapley_crop_boxes(
    const Tensor& outputs, const Tensor& labels, const Tensor& projection, std::optional<Tensor> partial,
    const std::string& value_name, const Tensor& sample_ids, const Tensor& quantiles, int64_t seed, int64_t rows,
    int64_t cols, std::vector<int64_t> pools, int64_t crops, bool clean_last, double alpha, int64_t image_height,
    int64_t image_width, std::vector<int64_t> crop_heights, std::vector<int64_t> crop_widths, double coverage) {
  const Tensor logits = ddfast::contiguous(outputs), classes_of = ddfast::contiguous(labels);
  const Tensor weights = ddfast::contiguous(projection), ids = ddfast::contiguous(sample_ids);
  const Tensor table = ddfast::contiguous(quantiles);
  ddfast::check_coalitions(kName, logits, classes_of, weights);
  const int64_t batch = outputs.size(0), players = projection.size(-1);
  STD_TORCH_CHECK(ids.dim() == 1 && ids.size(0) == batch, kName, ": sample_ids must be [B]");
  const ddfast::CropBoxes crop_boxes{table.const_data_ptr<float>(), static_cast<uint64_t>(seed), rows, cols,
                                     ddfast::make_windows(kName, pools, crop_heights, crop_widths), crops, clean_last,
                                     static_cast<float>(alpha), image_height, image_width,
                                     static_cast<float>(coverage)};
  crop_boxes.check(kName, players, table.numel());
  std::optional<Tensor> added;
  if (partial.has_value()) {
    added = ddfast::contiguous(*partial);
    STD_TORCH_CHECK(added->dim() == 2 && added->size(0) == batch && added->size(1) == players, kName,
                    ": partial must be [B, d]");
  }

  const ScalarType dtype = outputs.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor phi = torch::stable::new_empty(outputs, {batch, players}, dtype);
  Tensor boxes = torch::stable::new_empty(outputs, {batch, crops, 4}, ScalarType::Int);
  ddfast::dispatch_floating(kName, outputs.scalar_type(), [&]<typename Logit>(std::type_identity<Logit>) {
    using Compute = std::conditional_t<std::is_same_v<Logit, double>, double, float>;
    run<Logit, Compute>(logits, classes_of, weights, added.has_value() ? added->const_data_ptr<double>() : nullptr,
                        ddfast::parse_value(value_name), ids, crop_boxes, phi, boxes);
  });
  return {phi, boxes};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ddfast_native, library) {
  library.def(
      "shapley_crop_boxes(Tensor outputs, Tensor labels, Tensor projection, Tensor? partial, str value, "
      "Tensor sample_ids, Tensor quantiles, int seed, int rows, int cols, int[] pools, int crops, bool clean_last, "
      "float alpha, int image_height, int image_width, int[] crop_heights, int[] crop_widths, float coverage) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ddfast_native, CPU, library) {
  library.impl("shapley_crop_boxes", TORCH_BOX(&shapley_crop_boxes));
}
