// noisy_crop_boxes: from a heatmap to crop boxes (defined in ddfast/ops/reference.py).
//
// Images are independent, so that threads cannot change a bit; crop_boxes.h has the work of one.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "crop_boxes.h"

namespace {

using torch::stable::Tensor;

Tensor noisy_crop_boxes(
    const Tensor& phi, const Tensor& sample_ids, const Tensor& quantiles, int64_t seed, int64_t rows, int64_t cols,
    std::vector<int64_t> pools, int64_t crops, bool clean_last, double alpha, int64_t image_height,
    int64_t image_width, std::vector<int64_t> crop_heights, std::vector<int64_t> crop_widths, double coverage) {
  constexpr const char* kName = "noisy_crop_boxes";
  const Tensor heatmaps = torch::stable::contiguous(phi), ids = torch::stable::contiguous(sample_ids);
  const Tensor table = torch::stable::contiguous(quantiles);
  const ddfast::CropBoxes crop_boxes{table.const_data_ptr<float>(), static_cast<uint64_t>(seed), rows, cols,
                                     ddfast::make_windows(kName, pools, crop_heights, crop_widths), crops, clean_last,
                                     static_cast<float>(alpha), image_height, image_width,
                                     static_cast<float>(coverage)};
  STD_TORCH_CHECK(phi.dim() == 2, kName, ": phi must be [B, rows * cols]");
  crop_boxes.check(kName, phi.size(1), table.numel());
  const int64_t images = phi.size(0), players = phi.size(1);
  STD_TORCH_CHECK(ids.dim() == 1 && ids.size(0) == images, kName, ": sample_ids must be [B]");

  Tensor boxes = torch::stable::new_empty(phi, {images, crops, 4}, torch::headeronly::ScalarType::Int);
  const float* phi_data = heatmaps.const_data_ptr<float>();
  const int64_t* id_data = ids.const_data_ptr<int64_t>();
  int32_t* box_data = boxes.mutable_data_ptr<int32_t>();
  torch::stable::parallel_for(0, images, /*grain_size=*/16, [&](int64_t begin, int64_t end) {
    std::vector<float> pooled;
    for (int64_t image = begin; image < end; ++image) {
      crop_boxes.place(phi_data + image * players, id_data[image], pooled, box_data + image * crops * 4);
    }
  });
  return boxes;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ddfast_native, library) {
  library.def(
      "noisy_crop_boxes(Tensor phi, Tensor sample_ids, Tensor quantiles, int seed, int rows, int cols, int[] pools, "
      "int crops, bool clean_last, float alpha, int image_height, int image_width, int[] crop_heights, "
      "int[] crop_widths, float coverage) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ddfast_native, CPU, library) {
  library.impl("noisy_crop_boxes", TORCH_BOX(&noisy_crop_boxes));
}
