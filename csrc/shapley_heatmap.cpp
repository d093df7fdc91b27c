// shapley_heatmap: coalition values and their projection on players (defined in ddfast/ops/reference.py).
//
// Softmax values are computed in parallel over (image, coalition), heatmaps in parallel over images; within an image, products
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
#include "layout.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The least work worth handing to another thread: exponentials, and products.
constexpr int64_t kExponentialsPerTask = 16384, kProductsPerTask = 1 << 18;

// values [B, K], probabilities or their logarithms, of contiguous outputs [B, K, C].
template <typename Logit, typename Compute>
void values_of_batch(const Logit* outputs, const int64_t* labels, int64_t batch, int64_t count, int64_t classes,
                     ddfast::Value value, Compute* values) {
  torch::stable::parallel_for(
      0, batch * count, std::max<int64_t>(1, kExponentialsPerTask / std::max<int64_t>(1, classes)),
      [&](int64_t begin, int64_t end) {
        std::vector<Compute> logits;
        for (int64_t index = begin; index < end; ++index) {
          ddfast::coalition_values(outputs + index * classes, labels[index / count], 1, classes, value, logits,
                                   values + index);
        }
      });
}

// phi [B, d] of values and a contiguous projection [K, d] (stride 0 between images) or [B, K, d].
// values(image, scratch) is where an image's values [K] are; `scratch` has room for them.
template <typename Compute, typename Values>
void project_batch(const Values& values, const Compute* projection, int64_t projection_stride, int64_t batch,
                   int64_t count, int64_t players, Compute* phi) {
  const int64_t products = std::max<int64_t>(1, count * players);
  torch::stable::parallel_for(
      0, batch, std::max<int64_t>(1, kProductsPerTask / products), [&](int64_t begin, int64_t end) {
        std::vector<double> sum(players);
        std::vector<Compute> scratch(count);
        for (int64_t image = begin; image < end; ++image) {
          ddfast::project(values(image, scratch.data()), projection + image * projection_stride, count, players,
                          sum.data());
          std::transform(sum.begin(), sum.end(), phi + image * players,
                         [](double total) { return static_cast<Compute>(total); });
        }
      });
}

template <typename Logit, typename Compute>
void shapley_heatmap_as(const Tensor& outputs, const Tensor& labels, const Tensor& projection, ddfast::Value value,
                        Tensor& phi) {
  const int64_t batch = outputs.size(0), count = outputs.size(1), classes = outputs.size(2);
  const int64_t players = projection.size(-1), stride = projection.dim() == 3 ? count * players : 0;
  const Logit* logits = static_cast<const Logit*>(outputs.const_data_ptr());
  const int64_t* label = labels.const_data_ptr<int64_t>();
  const Compute* weights = projection.const_data_ptr<Compute>();
  Compute* to = phi.mutable_data_ptr<Compute>();
  if (value == ddfast::Value::kLogit) {
    const auto gather = [&](int64_t image, Compute* values) {
      const Logit* at = logits + image * count * classes + label[image];
      for (int64_t k = 0; k < count; ++k) values[k] = static_cast<Compute>(at[k * classes]);
      return values;
    };
    return project_batch(gather, weights, stride, batch, count, players, to);
  }
  std::vector<Compute> values(batch * count);
  values_of_batch(logits, label, batch, count, classes, value, values.data());
  const auto stored = [&](int64_t image, Compute*) { return values.data() + image * count; };
  project_batch(stored, weights, stride, batch, count, players, to);
}

Tensor shapley_heatmap(const Tensor& outputs, const Tensor& labels, const Tensor& projection,
                       const std::string& value_name) {
  const Tensor classes_of = ddfast::contiguous(labels);
  ddfast::check_coalitions("shapley_heatmap", outputs, classes_of, projection);
  const ddfast::Value value = ddfast::parse_value(value_name);
  const Tensor logits = ddfast::contiguous(outputs), weights = ddfast::contiguous(projection);
  const ScalarType dtype = outputs.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor phi = torch::stable::new_empty(outputs, {outputs.size(0), projection.size(-1)}, dtype);
  ddfast::dispatch_floating("shapley_heatmap", outputs.scalar_type(), [&]<typename Logit>(std::type_identity<Logit>) {
    using Compute = std::conditional_t<std::is_same_v<Logit, double>, double, float>;
    shapley_heatmap_as<Logit, Compute>(logits, classes_of, weights, value, phi);
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
