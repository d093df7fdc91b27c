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
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "layout.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLanes = 16;  // sums that are added to side by side
constexpr int64_t kBlock = 16;  // terms that are added up in float before they join a sum in double

// What turns an element of one channel into its share of the sums, and into the gradient at the input:
// normalised = (x - mean) * rstd; gradient = scale * g - offset - slope * normalised.
template <typename Sum>
struct Channel {
  Sum mean, rstd, scale, offset, slope;
};

struct Sums {
  double grad = 0, product = 0;  // of g, and of g * normalised
};

// One channel whose elements lie side by side.
template <typename T, typename Sum>
Sums sum_plane(const T* x, const T* g, int64_t count, const Channel<Sum>& channel) {
  Sums sums;
  for (int64_t begin = 0; begin < count; begin += kBlock * kLanes) {
    const int64_t size = std::min(kBlock * kLanes, count - begin), whole = size / kLanes * kLanes;
    Sum grad[kLanes] = {}, product[kLanes] = {};
    const T* values = x + begin;
    const T* grads = g + begin;
    const auto add = [&](int64_t lane, int64_t k) {
      const Sum value = static_cast<Sum>(grads[k]);
      grad[lane] += value;
      product[lane] += value * ((static_cast<Sum>(values[k]) - channel.mean) * channel.rstd);
    };
    for (int64_t k = 0; k < whole; k += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) add(lane, k + lane);
    }
    for (int64_t k = whole; k < size; ++k) add(k - whole, k);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      sums.grad += static_cast<double>(grad[lane]);
      sums.product += static_cast<double>(product[lane]);
    }
  }
  return sums;
}

template <typename T, typename Sum>
void write_plane(const T* x, const T* g, T* out, int64_t count, const Channel<Sum>& channel) {
  if (channel.offset == 0 && channel.slope == 0) {
    for (int64_t k = 0; k < count; ++k) out[k] = static_cast<T>(channel.scale * static_cast<Sum>(g[k]));
    return;
  }
  for (int64_t k = 0; k < count; ++k) {
    const Sum normalized = (static_cast<Sum>(x[k]) - channel.mean) * channel.rstd;
    out[k] = static_cast<T>(channel.scale * static_cast<Sum>(g[k]) - channel.offset - channel.slope * normalized);
  }
}

// The same for rows [count, channels], a position's channels side by side.
template <typename T, typename Sum>
void sum_rows(const T* x, const T* g, int64_t count, const std::vector<Channel<Sum>>& channels, std::vector<Sums>& sums) {
  const int64_t width = static_cast<int64_t>(channels.size());
  std::vector<Sum> buffer(4 * width);
  Sum *mean = buffer.data(), *rstd = mean + width, *grad = rstd + width, *product = grad + width;
  for (int64_t c = 0; c < width; ++c) {
    mean[c] = channels[c].mean;
    rstd[c] = channels[c].rstd;
  }
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    std::fill(grad, grad + 2 * width, Sum(0));
    for (int64_t row = begin; row < std::min(begin + kBlock, count); ++row) {
      const T* values = x + row * width;
      const T* grads = g + row * width;
      for (int64_t c = 0; c < width; ++c) {
        const Sum value = static_cast<Sum>(grads[c]);
        grad[c] += value;
        product[c] += value * ((static_cast<Sum>(values[c]) - mean[c]) * rstd[c]);
      }
    }
    for (int64_t c = 0; c < width; ++c) {
      sums[c].grad += static_cast<double>(grad[c]);
      sums[c].product += static_cast<double>(product[c]);
    }
  }
}

template <typename T, typename Sum>
void write_rows(const T* x, const T* g, T* out, int64_t count, const std::vector<Channel<Sum>>& channels) {
  const int64_t width = static_cast<int64_t>(channels.size());
  std::vector<Sum> buffer(5 * width);
  Sum *mean = buffer.data(), *rstd = mean + width, *scale = rstd + width, *offset = scale + width,
      *slope = offset + width;
  bool plain = true;
  for (int64_t c = 0; c < width; ++c) {
    const Channel<Sum>& channel = channels[c];
    mean[c] = channel.mean;
    rstd[c] = channel.rstd;
    scale[c] = channel.scale;
    offset[c] = channel.offset;
    slope[c] = channel.slope;
    plain = plain && channel.offset == 0 && channel.slope == 0;
  }
  for (int64_t row = 0; row < count; ++row, x += width, g += width, out += width) {
    if (plain) {
      for (int64_t c = 0; c < width; ++c) out[c] = static_cast<T>(scale[c] * static_cast<Sum>(g[c]));
    } else {
      for (int64_t c = 0; c < width; ++c) {
        const Sum normalized = (static_cast<Sum>(x[c]) - mean[c]) * rstd[c];
        out[c] = static_cast<T>(scale[c] * static_cast<Sum>(g[c]) - offset[c] - slope[c] * normalized);
      }
    }
  }
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
      std::vector<Channel<Sum>> parameters(channels);
      std::vector<Sums> sums(channels);
      for (int64_t b = begin; b < end; ++b) {
        const T* values = x.const_data_ptr<T>() + b * channels * positions;
        const T* grads = g.const_data_ptr<T>() + b * channels * positions;
        T* out = grad_input.mutable_data_ptr<T>() + b * channels * positions;
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t at = of_sample ? b * groups + c / group_channels : c;
          const Sum factor = factors == nullptr ? Sum(1) : factors[c];
          parameters[c] = {all_means[at], all_rstds[at], factor * all_rstds[at], 0, 0};
        }
        std::fill(sums.begin(), sums.end(), Sums{});
        if (last) {
          sum_rows(values, grads, positions, parameters, sums);
        } else {
          for (int64_t c = 0; c < channels; ++c) {
            const int64_t plane = c * positions;
            sums[c] = sum_plane(values + plane, grads + plane, positions, parameters[c]);
            if (!of_sample) write_plane(values + plane, grads + plane, out + plane, positions, parameters[c]);
          }
        }
        double of_weight = 0, of_bias = 0;
        for (const Sums& sum : sums) {
          of_weight += sum.product * sum.product;
          of_bias += sum.grad * sum.grad;
        }
        norm[b] = static_cast<Sum>((weight_norm ? of_weight : 0) + (bias_norm ? of_bias : 0));
        if (of_sample) {  // the statistics depend on the input too
          for (int64_t first = 0; first < channels; first += group_channels) {
            Sums mean_of;
            for (int64_t c = first; c < first + group_channels; ++c) {
              const double factor = factors == nullptr ? 1 : factors[c];
              mean_of.grad += factor * sums[c].grad / static_cast<double>(group_channels * positions);
              mean_of.product += factor * sums[c].product / static_cast<double>(group_channels * positions);
            }
            for (int64_t c = first; c < first + group_channels; ++c) {
              parameters[c].offset = static_cast<Sum>(mean_of.grad) * parameters[c].rstd;
              parameters[c].slope = static_cast<Sum>(mean_of.product) * parameters[c].rstd;
            }
          }
        }
        if (last) {
          write_rows(values, grads, out, positions, parameters);
        } else if (of_sample) {
          for (int64_t c = 0; c < channels; ++c) {
            const int64_t plane = c * positions;
            write_plane(values + plane, grads + plane, out + plane, positions, parameters[c]);
          }
        }
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
