// shapley_heatmap: coalition values and their projection on players (defined in ddfast/ops/reference.py).
//
// Values are computed in parallel over (image, coalition), heatmaps in parallel over images; within an image, products
// and sums are taken in double precision over coalitions in ascending order. The product of two floats is exact there,
// so that neither threads nor fused multiply-adds can change a bit.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "dispatch.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLanes = 16;             // partial results of a reduction, so that it vectorises
constexpr int64_t kElementsPerTask = 16384;  // the least work worth handing to another thread

enum class Value { kLogit, kProbability, kLogProbability };

Value parse_value(const std::string& name) {
  if (name == "logit") return Value::kLogit;
  if (name == "prob") return Value::kProbability;
  STD_TORCH_CHECK(name == "logprob", "shapley_heatmap: value must be logit, prob or logprob, got ", name);
  return Value::kLogProbability;
}

// exp(x) for x <= 0 to two units in the last place, in a form that compilers vectorise: x = n log 2 + r with n an
// integer, log 2 split in two so that n log 2 is exact, and the polynomial of Cephes' expf (S. L. Moshier) for exp(r).
// Below exp(-87), where 2^n would leave the normal numbers, it stays at 1e-38. NaN stays NaN.
inline float exp_of_nonpositive(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float mantissa = p * (r * r) + r + 1.0f;
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound);
  return mantissa * std::bit_cast<float>((exponent + 127) << 23);
}

inline double exp_of_nonpositive(double x) { return std::exp(x); }

template <typename Compute>
Compute largest(const Compute* logits, int64_t classes) {
  Compute lane[kLanes];
  std::fill_n(lane, kLanes, -std::numeric_limits<Compute>::infinity());
  int64_t first = 0;
  for (; first + kLanes <= classes; first += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) lane[i] = lane[i] < logits[first + i] ? logits[first + i] : lane[i];
  }
  Compute result = *std::max_element(lane, lane + kLanes);
  for (; first < classes; ++first) result = std::max(result, logits[first]);
  return result;
}

template <typename Compute>
Compute sum_of_exponentials(const Compute* logits, int64_t classes, Compute shift) {
  Compute lane[kLanes] = {};
  int64_t first = 0;
  for (; first + kLanes <= classes; first += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) lane[i] += exp_of_nonpositive(logits[first + i] - shift);
  }
  Compute result = 0;
  for (int64_t i = 0; i < kLanes; ++i) result += lane[i];
  for (; first < classes; ++first) result += exp_of_nonpositive(logits[first] - shift);
  return result;
}

// The label's probability, or its logarithm, among `classes` logits.
template <typename Compute>
Compute softmax_value(const Compute* logits, int64_t classes, int64_t label, Value value) {
  const Compute shift = largest(logits, classes);
  const Compute sum = sum_of_exponentials(logits, classes, shift);
  const Compute centred = logits[label] - shift;
  return value == Value::kProbability ? std::exp(centred) / sum : centred - std::log(sum);
}

// values [B, K] of contiguous outputs [B, K, C].
template <typename Logit, typename Compute>
void coalition_values(const Logit* outputs, const int64_t* labels, int64_t batch, int64_t count, int64_t classes,
                      Value value, Compute* values) {
  const int64_t elements = value == Value::kLogit ? 1 : std::max<int64_t>(1, classes);
  torch::stable::parallel_for(
      0, batch * count, std::max<int64_t>(1, kElementsPerTask / elements), [&](int64_t begin, int64_t end) {
        std::vector<Compute> logits(value == Value::kLogit ? 0 : classes);
        for (int64_t index = begin; index < end; ++index) {
          const Logit* row = outputs + index * classes;
          const int64_t label = labels[index / count];
          if (value == Value::kLogit) {
            values[index] = static_cast<Compute>(row[label]);
          } else {
            for (int64_t c = 0; c < classes; ++c) logits[c] = static_cast<Compute>(row[c]);
            values[index] = softmax_value(logits.data(), classes, label, value);
          }
        }
      });
}

// phi [B, d] of values [B, K] and a contiguous projection [K, d] (stride 0 between images) or [B, K, d].
template <typename Compute>
void project(const Compute* values, const Compute* projection, int64_t projection_stride, int64_t batch, int64_t count,
             int64_t players, Compute* phi) {
  const int64_t elements = std::max<int64_t>(1, count * players);
  torch::stable::parallel_for(
      0, batch, std::max<int64_t>(1, kElementsPerTask / elements), [&](int64_t begin, int64_t end) {
        std::vector<double> sum(players);
        for (int64_t image = begin; image < end; ++image) {
          std::fill(sum.begin(), sum.end(), 0.0);
          const Compute* weights = projection + image * projection_stride;
          for (int64_t k = 0; k < count; ++k, weights += players) {
            const double value = static_cast<double>(values[image * count + k]);
            for (int64_t i = 0; i < players; ++i) sum[i] += static_cast<double>(weights[i]) * value;
          }
          for (int64_t i = 0; i < players; ++i) phi[image * players + i] = static_cast<Compute>(sum[i]);
        }
      });
}

template <typename Logit, typename Compute>
void shapley_heatmap_as(const Tensor& outputs, const Tensor& labels, const Tensor& projection, Value value,
                        Tensor& values, Tensor& phi) {
  const int64_t batch = outputs.size(0), count = outputs.size(1), classes = outputs.size(2);
  const int64_t players = projection.size(-1);
  Compute* values_data = values.mutable_data_ptr<Compute>();
  coalition_values(static_cast<const Logit*>(outputs.const_data_ptr()), labels.const_data_ptr<int64_t>(), batch, count,
                   classes, value, values_data);
  project(values_data, projection.const_data_ptr<Compute>(), projection.dim() == 3 ? count * players : 0, batch, count,
          players, phi.mutable_data_ptr<Compute>());
}

Tensor shapley_heatmap(const Tensor& outputs, const Tensor& labels, const Tensor& projection,
                       const std::string& value_name) {
  STD_TORCH_CHECK(outputs.dim() == 3, "shapley_heatmap: outputs must be [B, K, C]");
  const int64_t batch = outputs.size(0), count = outputs.size(1), classes = outputs.size(2);
  STD_TORCH_CHECK(labels.dim() == 1 && labels.size(0) == batch, "shapley_heatmap: labels must be [B]");
  STD_TORCH_CHECK((projection.dim() == 2 || (projection.dim() == 3 && projection.size(0) == batch)) &&
                      projection.size(-2) == count,
                  "shapley_heatmap: projection must be [K, d] or [B, K, d]");
  const Tensor classes_of = torch::stable::contiguous(labels);
  for (int64_t image = 0; image < batch; ++image) {
    const int64_t label = classes_of.const_data_ptr<int64_t>()[image];
    STD_TORCH_CHECK(0 <= label && label < classes, "shapley_heatmap: label ", label, " is not in [0, ", classes, ")");
  }

  const Value value = parse_value(value_name);
  const Tensor logits = torch::stable::contiguous(outputs), weights = torch::stable::contiguous(projection);
  const ScalarType dtype = outputs.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor values = torch::stable::new_empty(outputs, {batch, count}, dtype);
  Tensor phi = torch::stable::new_empty(outputs, {batch, projection.size(-1)}, dtype);
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
