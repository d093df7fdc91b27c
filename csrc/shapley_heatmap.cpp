// shapley_heatmap: coalition values and their projection on players (defined in ddfast/ops/reference.py).
//
// Values are computed in parallel over (image, coalition), heatmaps in parallel over images; within an image, products
// and sums are taken in double precision over coalitions in ascending order. The product of two floats is exact there,
// so that neither threads nor fused multiply-adds can change a bit.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "coalition_values.h"
#include "dispatch.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kElementsPerTask = 16384;  // the least work worth handing to another thread

// values [B, K] of contiguous outputs [B, K, C].
template <typename Logit, typename Compute>
void values_of_batch(const Logit* outputs, const int64_t* labels, int64_t batch, int64_t count, int64_t classes,
                     ddfast::Value value, Compute* values) {
  const int64_t elements = value == ddfast::Value::kLogit ? 1 : std::max<int64_t>(1, classes);
  torch::stable::parallel_for(
      0, batch * count, std::max<int64_t>(1, kElementsPerTask / elements), [&](int64_t begin, int64_t end) {
        std::vector<Compute> logits;
        for (int64_t index = begin; index < end; ++index) {
          ddfast::coalition_values(outputs + index * classes, labels[index / count], 1, classes, value, logits,
                                   values + index);
        }
      });
}

// phi [B, d] of values [B, K] and a contiguous projection [K, d] (stride 0 between images) or [B, K, d].
template <typename Compute>
void project_batch(const Compute* values, const Compute* projection, int64_t projection_stride, int64_t batch,
                   int64_t count, int64_t players, Compute* phi) {
  const int64_t elements = std::max<int64_t>(1, count * players);
  torch::stable::parallel_for(
      0, batch, std::max<int64_t>(1, kElementsPerTask / elements), [&](int64_t begin, int64_t end) {
        std::vector<double> sum(players);
        for (int64_t image = begin; image < end; ++image) {
          ddfast::project(values + image * count, projection + image * projection_stride, count, players, sum.data());
          std::transform(sum.begin(), sum.end(), phi + image * players,
                         [](double total) { return static_cast<Compute>(total); });
        }
      });
}

template <typename Logit, typename Compute>
void shapley_heatmap_as(const Tensor& outputs, const Tensor& labels, const Tensor& projection, ddfast::Value value,
                        Tensor& values, Tensor& phi) {
  const int64_t batch = outputs.size(0), count = outputs.size(1), classes = outputs.size(2);
  const int64_t players = projection.size(-1);
  Compute* values_data = values.mutable_data_ptr<Compute>();
  values_of_batch(static_cast<const Logit*>(outputs.const_data_ptr()), labels.const_data_ptr<int64_t>(), batch, count,
                  classes, value, values_data);
  project_batch(values_data, projection.const_data_ptr<Compute>(), projection.dim() == 3 ? count * players : 0, batch,
                count, players, phi.mutable_data_ptr<Compute>());
}

Tensor shapley_heatmap(const Tensor& outputs, const Tensor& labels, const Tensor& projection,
                       const std::string& value_name) {
  const Tensor classes_of = torch::stable::contiguous(labels);
  ddfast::check_coalitions("shapley_heatmap", outputs, classes_of, projection);
  const ddfast::Value value = ddfast::parse_value(value_name);
  const Tensor logits = torch::stable::contiguous(outputs), weights = torch::stable::contiguous(projection);
  const ScalarType dtype = outputs.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor values = torch::stable::new_empty(outputs, {outputs.size(0), outputs.size(1)}, dtype);
  Tensor phi = torch::stable::new_empty(outputs, {outputs.size(0), projection.size(-1)}, dtype);
  ddfast::dispatch_floating("shapley_heatmap", outputs.scalar_type(), [&]<typename Logit>(std::type_identity<Logit>) {
    using Compute = std::conditional_t<std::is_same_v<Logit, double>, double, float>;
    shapley_heatmap_as<Logit, Compute>(logits, classes_of, weights, value, values, phi);
  });
  return phi;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ddfast_native, library) {
  library.def("shapley_heatmap(Tensor outputs, Tensor labels, Tensor projection, str value) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ddfast_native, CPU, library) {
  library.impl("shapley_heatmap", TORCH_BOX(&shapley_heatmap));
}
