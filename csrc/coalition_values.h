// The value of a coalition from a model's outputs: the label's logit, its probability or the logarithm of that.
//
// A sum of exponentials is taken in a fixed number of partial sums, so that its bits depend on nothing but the logits.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "clones.h"

namespace ddfast {

constexpr int64_t kLanes = 16;  // partial results of a reduction, so that it vectorises

enum class Value { kLogit, kProbability, kLogProbability };

inline Value parse_value(const std::string& name) {
  if (name == "logit") return Value::kLogit;
  if (name == "prob") return Value::kProbability;
  STD_TORCH_CHECK(name == "logprob", "value must be logit, prob or logprob, got ", name);
  return Value::kLogProbability;
}

// exp(x) for x <= 0 to two units in the last place, in a form that compilers vectorise: x = n log 2 + r with n an
// integer, log 2 split in two so that n log 2 is exact, and the polynomial of Cephes' expf (S. L. Moshier) for exp(r).
// Below exp(-87), where 2^n would leave the normal numbers, it stays at 1e-38. NaN stays NaN.
[[gnu::always_inline]] inline float exp_of_nonpositive(float x) {
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
[[gnu::always_inline]] inline Compute largest(const Compute* logits, int64_t classes) {
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
[[gnu::always_inline]] inline Compute sum_of_exponentials(const Compute* logits, int64_t classes, Compute shift) {
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

// The largest of `classes` logits, and the sum of the exponentials of their differences from it.
template <typename Compute>
struct Exponentials {
  Compute shift, sum;
};

template <typename Compute>
[[gnu::always_inline]] inline Exponentials<Compute> exponentials_of(const Compute* logits, int64_t classes) {
  const Compute shift = largest(logits, classes);
  return {shift, sum_of_exponentials(logits, classes, shift)};
}

[[maybe_unused]] DDFAST_CLONES static Exponentials<float> exponentials(const float* logits, int64_t classes) {
  return exponentials_of(logits, classes);
}

[[maybe_unused]] static Exponentials<double> exponentials(const double* logits, int64_t classes) {
  return exponentials_of(logits, classes);
}

// The label's probability, or its logarithm, among `classes` logits.
template <typename Compute>
Compute softmax_value(const Compute* logits, int64_t classes, int64_t label, Value value) {
  const Exponentials<Compute> found = exponentials(logits, classes);
  const Compute centred = logits[label] - found.shift;
  return value == Value::kProbability ? std::exp(centred) / found.sum : centred - std::log(found.sum);
}

// Refuses outputs [B, K, C], contiguous labels [B] and projection [K, d] or [B, K, d] that do not fit.
inline void check_coalitions(const char* op, const torch::stable::Tensor& outputs, const torch::stable::Tensor& labels,
                             const torch::stable::Tensor& projection) {
  STD_TORCH_CHECK(outputs.dim() == 3, op, ": outputs must be [B, K, C]");
  const int64_t batch = outputs.size(0), classes = outputs.size(2);
  STD_TORCH_CHECK(labels.dim() == 1 && labels.size(0) == batch, op, ": labels must be [B]");
  STD_TORCH_CHECK((projection.dim() == 2 || (projection.dim() == 3 && projection.size(0) == batch)) &&
                      projection.size(-2) == outputs.size(1),
                  op, ": projection must be [K, d] or [B, K, d]");
  const int64_t* label = labels.const_data_ptr<int64_t>();
  for (int64_t image = 0; image < batch; ++image) {
    STD_TORCH_CHECK(0 <= label[image] && label[image] < classes, op, ": label ", label[image], " is not in [0, ",
                    classes, ")");
  }
}

// Values [count] of one image from its contiguous outputs [count, classes]. `logits` is scratch for `classes` numbers.
template <typename Logit, typename Compute>
void coalition_values(const Logit* outputs, int64_t label, int64_t count, int64_t classes, Value value,
                      std::vector<Compute>& logits, Compute* values) {
  for (int64_t k = 0; k < count; ++k, outputs += classes) {
    if (value == Value::kLogit) {
      values[k] = static_cast<Compute>(outputs[label]);
    } else if constexpr (std::is_same_v<Logit, Compute>) {
      values[k] = softmax_value(outputs, classes, label, value);
    } else {
      logits.resize(classes);
      for (int64_t c = 0; c < classes; ++c) logits[c] = static_cast<Compute>(outputs[c]);
      values[k] = softmax_value(logits.data(), classes, label, value);
    }
  }
}

// sum[i] = the sum over k, in ascending order, of projection[k, i] * values[k], for one image.
template <typename Compute>
[[gnu::always_inline]] inline void project_players(const Compute* values, const Compute* projection, int64_t count,
                                                   int64_t players, double* sum) {
  int64_t first = 0;
  for (; first + kLanes <= players; first += kLanes) {
    double lane[kLanes] = {};
    for (int64_t k = 0; k < count; ++k) {
      const double value = static_cast<double>(values[k]);
      const Compute* row = projection + k * players + first;
      for (int64_t i = 0; i < kLanes; ++i) lane[i] += static_cast<double>(row[i]) * value;
    }
    std::copy_n(lane, kLanes, sum + first);
  }
  for (; first < players; ++first) {
    double total = 0;
    for (int64_t k = 0; k < count; ++k) {
      total += static_cast<double>(projection[k * players + first]) * static_cast<double>(values[k]);
    }
    sum[first] = total;
  }
}

[[maybe_unused]] DDFAST_CLONES static void project(const float* values, const float* projection, int64_t count,
                                                   int64_t players, double* sum) {
  project_players(values, projection, count, players, sum);
}

[[maybe_unused]] DDFAST_CLONES static void project(const double* values, const double* projection, int64_t count,
                                                   int64_t players, double* sum) {
  project_players(values, projection, count, players, sum);
}

}  // namespace ddfast
