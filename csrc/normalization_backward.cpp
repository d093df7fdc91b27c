// normalization_backward: the backward pass of a normalisation layer together with the squared norms of its per-sample
// parameter gradients (defined in ddfast/ops/reference.py).
//
// Both need the same two sums over each channel of a sample, of the gradient and of its product with the normalised
// input, which is computed again where it is needed and never stored. With fixed statistics (BatchNorm in eval mode) one
// pass over a sample reads the input and the gradient and writes the gradient at the input; with the sample's own
// (GroupNorm) a second pass writes it, from what the first left in the cache. A thread takes one sample at a time.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "avx512_products.h"
#include "dispatch.h"
#include "layout.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What each channel of a sample needs, one after another: [5, channels].
template <typename Sum>
struct Channels {
  explicit Channels(int64_t count) : count(count), values(5 * count), sums(2 * count) {}

  Sum* mean() { return values.data(); }
  Sum* rstd() { return mean() + count; }
  Sum* scale() { return mean() + 2 * count; }   // gradient = scale * g
  Sum* offset() { return mean() + 3 * count; }  //            - offset
  Sum* slope() { return mean() + 4 * count; }   //            - slope * (x - mean) * rstd
  double* grad_sums() { return sums.data(); }            // of g
  double* product_sums() { return sums.data() + count; }  // of g * (x - mean) * rstd

  int64_t count;
  std::vector<Sum> values;
  std::vector<double> sums;
};

constexpr int64_t kBlock = 16;  // terms that are added up in float before they join a sum in double

// Adds up a sample [channels, count] and, where kWrite, writes the gradient at the input.
template <bool kWrite, typename T, typename Sum>
void pass_planes(const T* x, const T* g, T* out, int64_t count, Channels<Sum>& channels) {
  for (int64_t c = 0; c < channels.count; ++c, x += count, g += count, out += count) {
    const Sum mean = channels.mean()[c], rstd = channels.rstd()[c], scale = channels.scale()[c];
    const Sum offset = channels.offset()[c], slope = channels.slope()[c];
    for (int64_t begin = 0; begin < count; begin += kBlock) {
      Sum grad_sum = 0, product_sum = 0;
      for (int64_t k = begin; k < std::min(begin + kBlock, count); ++k) {
        const Sum grad = static_cast<Sum>(g[k]), normalized = (static_cast<Sum>(x[k]) - mean) * rstd;
        grad_sum += grad;
        product_sum += grad * normalized;
        if (kWrite) out[k] = static_cast<T>(scale * grad - offset - slope * normalized);
      }
      channels.grad_sums()[c] += static_cast<double>(grad_sum);
      channels.product_sums()[c] += static_cast<double>(product_sum);
    }
  }
}

// The same for a sample [count, channels].
template <bool kWrite, typename T, typename Sum>
void pass_rows(const T* x, const T* g, T* out, int64_t count, Channels<Sum>& channels) {
  const int64_t width = channels.count;
  const Sum *mean = channels.mean(), *rstd = channels.rstd(), *scale = channels.scale(), *offset = channels.offset(),
            *slope = channels.slope();
  std::vector<Sum> partial(2 * width);
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    std::fill(partial.begin(), partial.end(), Sum(0));
    Sum *grad_sums = partial.data(), *product_sums = grad_sums + width;
    for (int64_t row = begin; row < std::min(begin + kBlock, count); ++row, x += width, g += width, out += width) {
      for (int64_t c = 0; c < width; ++c) {
        const Sum grad = static_cast<Sum>(g[c]), normalized = (static_cast<Sum>(x[c]) - mean[c]) * rstd[c];
        grad_sums[c] += grad;
        product_sums[c] += grad * normalized;
        if (kWrite) out[c] = static_cast<T>(scale[c] * grad - offset[c] - slope[c] * normalized);
      }
    }
    for (int64_t k = 0; k < 2 * width; ++k) channels.sums[k] += static_cast<double>(partial[k]);
  }
}

// Both with AVX-512, for float and bfloat16.
template <bool kWrite, typename T>
void wide_pass(const T* x, const T* g, T* out, int64_t count, bool planar, Channels<float>& channels) {
#if DDFAST_HAS_AVX512
  using Element = std::conditional_t<std::is_same_v<T, float>, float, uint16_t>;
  const auto* values = reinterpret_cast<const Element*>(x);
  const auto* grads = reinterpret_cast<const Element*>(g);
  auto* to = reinterpret_cast<Element*>(out);
  if (!planar) {
    ddfast::avx512::normalize_rows<kWrite>(
        values, grads, to, count, channels.count, channels.mean(), channels.grad_sums());
    return;
  }
  for (int64_t c = 0; c < channels.count; ++c, values += count, grads += count, to += count) {
    const std::array<float, 5> channel{
        channels.mean()[c], channels.rstd()[c], channels.scale()[c], channels.offset()[c], channels.slope()[c]};
    std::array<double, 2> sums{};
    ddfast::avx512::normalize_plane<kWrite>(values, grads, to, count, channel.data(), sums.data());
    channels.grad_sums()[c] += sums[0];
    channels.product_sums()[c] += sums[1];
  }
#endif
}

// Whether they serve this type here: bfloat16 is written by an instruction of its own.
template <typename T>
bool wide_registers() {
#if DDFAST_HAS_AVX512
  return std::is_same_v<T, float> ? ddfast::avx512::supported() : ddfast::avx512::multiplies_bfloat16();
#else
  return false;
#endif
}

std::tuple<Tensor, Tensor> normalization_backward(
    const Tensor& input, const Tensor& grad_output, const Tensor& mean, const Tensor& rstd,
    const std::optional<Tensor>& weight, bool weight_norm, bool bias_norm) {
  const ScalarType dtype = grad_output.scalar_type();
  const ScalarType sum_type = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const int64_t samples = input.size(0), channels = input.size(1);
  const int64_t positions = samples * channels == 0 ? 0 : input.numel() / (samples * channels);
  const bool of_sample = mean.dim() == 2;
  const int64_t groups = of_sample ? mean.size(1) : channels;
  const int64_t group_channels = groups == 0 ? 0 : channels / groups;

  // The input's layout is that of its gradient.
  const bool last = !ddfast::planar(input) && ddfast::channels_last(input);
  const Tensor x = last ? input : torch::stable::contiguous(input);
  Tensor g = grad_output;
  if (!last) {
    g = torch::stable::contiguous(g);
  } else if (!ddfast::channels_last(g)) {
    Tensor copy = torch::stable::empty_like(input);
    g = torch::stable::copy_(copy, g);
  }
  Tensor grad_input = torch::stable::empty_like(x);
  Tensor norms = torch::stable::new_empty(grad_output, {samples}, sum_type);
  const auto in_sum_type = [&](const Tensor& statistic) {
    return torch::stable::contiguous(torch::stable::to(statistic, sum_type));
  };
  const Tensor means = in_sum_type(mean), rstds = in_sum_type(rstd);
  const std::optional<Tensor> weights = weight ? std::optional(in_sum_type(*weight)) : std::nullopt;

  ddfast::dispatch_floating("normalization_backward", dtype, [&]<typename T>(std::type_identity<T>) {
    using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const Sum* all_means = means.const_data_ptr<Sum>();
    const Sum* all_rstds = rstds.const_data_ptr<Sum>();
    const Sum* factors = weights ? weights->const_data_ptr<Sum>() : nullptr;
    Sum* norm = norms.mutable_data_ptr<Sum>();
    torch::stable::parallel_for(0, samples, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
      Channels<Sum> each(channels);
      const auto go = [&](auto write, const T* values, const T* grads, T* out) {
        if constexpr (std::is_same_v<T, float> || std::is_same_v<T, torch::headeronly::BFloat16>) {
          if (wide_registers<T>()) return wide_pass<decltype(write)::value>(values, grads, out, positions, !last, each);
        }
        if (last) return pass_rows<decltype(write)::value>(values, grads, out, positions, each);
        pass_planes<decltype(write)::value>(values, grads, out, positions, each);
      };
      for (int64_t b = begin; b < end; ++b) {
        const T* values = x.const_data_ptr<T>() + b * channels * positions;
        const T* grads = g.const_data_ptr<T>() + b * channels * positions;
        T* out = grad_input.mutable_data_ptr<T>() + b * channels * positions;
        std::fill(each.values.begin(), each.values.end(), Sum(0));
        std::fill(each.sums.begin(), each.sums.end(), 0.0);
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t at = of_sample ? b * groups + c / group_channels : c;
          each.mean()[c] = all_means[at];
          each.rstd()[c] = all_rstds[at];
          each.scale()[c] = all_rstds[at] * (factors == nullptr ? Sum(1) : factors[c]);
        }
        if (of_sample) {
          go(std::false_type(), values, grads, out);
        } else {
          go(std::true_type(), values, grads, out);
        }
        double of_weight = 0, of_bias = 0;
        for (int64_t c = 0; c < channels; ++c) {
          of_weight += each.product_sums()[c] * each.product_sums()[c];
          of_bias += each.grad_sums()[c] * each.grad_sums()[c];
        }
        norm[b] = static_cast<Sum>((weight_norm ? of_weight : 0) + (bias_norm ? of_bias : 0));
        if (!of_sample) continue;
        // The statistics depend on the input too.
        for (int64_t first = 0; first < channels; first += group_channels) {
          double grad_mean = 0, product_mean = 0;
          for (int64_t c = first; c < first + group_channels; ++c) {
            const double factor = factors == nullptr ? 1 : static_cast<double>(factors[c]);
            grad_mean += factor * each.grad_sums()[c] / static_cast<double>(group_channels * positions);
            product_mean += factor * each.product_sums()[c] / static_cast<double>(group_channels * positions);
          }
          for (int64_t c = first; c < first + group_channels; ++c) {
            each.offset()[c] = static_cast<Sum>(grad_mean) * each.rstd()[c];
            each.slope()[c] = static_cast<Sum>(product_mean) * each.rstd()[c];
          }
        }
        go(std::true_type(), values, grads, out);
      }
    });
  });
  return {grad_input, norms};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ddfast_native, library) {
  library.def(
      "normalization_backward(Tensor input, Tensor grad_output, Tensor mean, Tensor rstd, Tensor? weight, "
      "bool weight_norm, bool bias_norm) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ddfast_native, CPU, library) {
  library.impl("normalization_backward", TORCH_BOX(&normalization_backward));
}
