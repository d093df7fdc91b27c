// grad_sq_norm_*: squared norms of per-sample parameter gradients (defined in ddfast/ops/reference.py).
//
// One sample at a time, on one thread where there are enough samples: its input and output gradient, as float or double,
// are all that is ever copied. A weight gradient G^T X (T positions, I inputs, O outputs; for a convolution X holds one
// row of unfolded pixels a position) is never whole: either tiles of it are made, squared, summed and dropped, T I O
// multiplications, or ||G^T X||^2 = <X X^T, G G^T> is taken from two T x T matrices, T^2 (I + O), whichever is less.
// The products are torch's own matrix multiplications. Squares are added up in double.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <type_traits>
#include <vector>

#include "dispatch.h"

namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTileElements = 1 << 20;  // of unfolded input, or of a weight gradient, that live at a time

ScalarType sum_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Sample b of a batch, contiguous, in the dtype of the sums. No copy where it is that already.
Tensor sample(const Tensor& batch, int64_t b, ScalarType dtype) {
  Tensor one = torch::stable::select(batch, 0, b);
  if (one.scalar_type() != dtype) one = torch::stable::to(one, dtype);
  return torch::stable::contiguous(one);
}

// Calls norm(b) for each sample: one thread a sample, or, where samples are few, all threads for one after another.
template <typename Sum, typename Norm>
void for_each_sample(int64_t samples, Tensor& norms, const Norm& norm) {
  Sum* result = norms.mutable_data_ptr<Sum>();
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) result[b] = static_cast<Sum>(norm(b));
  };
  if (samples >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    torch::stable::parallel_for(0, samples, /*grain_size=*/1, run);
  } else {
    run(0, samples);
  }
}

// Allocates the result [B] and calls body<float> or body<double>.
template <typename Body>
Tensor per_sample(const Tensor& grad_output, const Body& body) {
  const ScalarType dtype = sum_type(grad_output);
  Tensor norms = torch::stable::new_empty(grad_output, {grad_output.size(0)}, dtype);
  if (dtype == ScalarType::Double) {
    body(std::type_identity<double>{}, dtype, norms);
  } else {
    body(std::type_identity<float>{}, dtype, norms);
  }
  return norms;
}

// Sum of a[i] * b[i], in eight lanes of double.
template <typename Sum>
double dot(const Sum* a, const Sum* b, int64_t count) {
  std::array<double, 8> lanes{};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int64_t lane = 0; lane < 8; ++lane) {
      lanes[lane] += static_cast<double>(a[i + lane]) * static_cast<double>(b[i + lane]);
    }
  }
  for (; i < count; ++i) lanes[0] += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return std::accumulate(lanes.begin(), lanes.end(), 0.0);
}

// Sum of a[i * stride].
template <typename Sum>
double total(const Sum* a, int64_t count, int64_t stride) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(a[i * stride]);
  return sum;
}

template <typename Sum>
double dot(const Tensor& a, const Tensor& b) {
  return dot(a.const_data_ptr<Sum>(), b.const_data_ptr<Sum>(), a.numel());
}

bool gram_is_cheaper(int64_t positions, int64_t inputs, int64_t outputs) {
  return positions * (inputs + outputs) < inputs * outputs;
}

Tensor rows(Tensor matrix, int64_t dim, int64_t begin, int64_t end) {
  return torch::stable::narrow(matrix, dim, begin, end - begin);
}

Tensor transposed(const Tensor& matrices) {
  return torch::stable::transpose(matrices, -2, -1);
}

// ||g^T x||^2 of x [T, I] and g [T, O].
template <typename Sum>
double product_sq_norm(const Tensor& x, const Tensor& g) {
  const int64_t positions = x.size(0), inputs = x.size(1), outputs = g.size(1);
  if (positions == 1) return dot<Sum>(x, x) * dot<Sum>(g, g);
  double norm = 0;
  if (gram_is_cheaper(positions, inputs, outputs)) {
    const int64_t step = std::max<int64_t>(1, kTileElements / positions);
    for (int64_t t = 0; t < positions; t += step) {
      const int64_t end = std::min(t + step, positions);
      norm += dot<Sum>(
          torch::stable::matmul(rows(x, 0, t, end), transposed(x)),
          torch::stable::matmul(rows(g, 0, t, end), transposed(g)));
    }
  } else {
    const int64_t step = std::max<int64_t>(1, kTileElements / std::max<int64_t>(1, outputs));
    for (int64_t i = 0; i < inputs; i += step) {
      const Tensor tile = torch::stable::matmul(transposed(g), rows(x, 1, i, std::min(i + step, inputs)));
      norm += dot<Sum>(tile, tile);
    }
  }
  return norm;
}

Tensor grad_sq_norm_linear(const Tensor& input, const Tensor& grad_output, bool bias) {
  const int64_t inputs = input.size(-1), outputs = grad_output.size(-1);
  const int64_t samples = grad_output.size(0);
  const int64_t positions = outputs * samples == 0 ? 0 : grad_output.numel() / (samples * outputs);
  return per_sample(grad_output, [&]<typename Sum>(std::type_identity<Sum>, ScalarType dtype, Tensor& norms) {
    for_each_sample<Sum>(samples, norms, [&](int64_t b) -> double {
      if (positions == 0) return 0;
      const Tensor x = torch::stable::view(sample(input, b, dtype), {positions, inputs});
      const Tensor g = torch::stable::view(sample(grad_output, b, dtype), {positions, outputs});
      double norm = inputs == 0 ? 0 : product_sq_norm<Sum>(x, g);
      if (bias) {
        const Sum* grads = g.const_data_ptr<Sum>();
        for (int64_t o = 0; o < outputs; ++o) {
          const double sum = total(grads + o, positions, outputs);
          norm += sum * sum;
        }
      }
      return norm;
    });
  });
}

struct Convolution {
  int64_t channels, height, width;          // of the input
  int64_t out_channels, out_height, out_width;
  std::array<int64_t, 2> kernel, stride, padding, dilation;
  int64_t groups;

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t positions() const { return out_height * out_width; }
  int64_t group_channels() const { return channels / groups; }
  int64_t group_outputs() const { return out_channels / groups; }

  // columns [(channels begin..end) * taps, positions]: what each position sees, zero outside the image.
  template <typename Sum>
  void unfold(const Sum* image, int64_t begin, int64_t end, Sum* columns) const {
    for (int64_t channel = begin; channel < end; ++channel) {
      for (int64_t tap = 0; tap < taps(); ++tap) {
        const int64_t dx = tap % kernel[1] * dilation[1] - padding[1];
        const int64_t dy = tap / kernel[1] * dilation[0] - padding[0];
        // Output columns first..last - 1 see a pixel of the image.
        const int64_t first = std::clamp<int64_t>(ceil_div(-dx, stride[1]), 0, out_width);
        const int64_t last = std::clamp<int64_t>(ceil_div(width - dx, stride[1]), first, out_width);
        for (int64_t i = 0; i < out_height; ++i, columns += out_width) {
          const int64_t y = i * stride[0] + dy;
          if (y < 0 || y >= height) {
            std::fill(columns, columns + out_width, Sum(0));
            continue;
          }
          const Sum* row = image + (channel * height + y) * width + dx;
          std::fill(columns, columns + first, Sum(0));
          if (stride[1] == 1) {
            std::copy(row + first, row + last, columns + first);
          } else {
            for (int64_t j = first; j < last; ++j) columns[j] = row[j * stride[1]];
          }
          std::fill(columns + last, columns + out_width, Sum(0));
        }
      }
    }
  }

 private:
  static int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }
};

// Tiles of the weight's gradient: whole groups where several fit a tile, else some input channels of one group.
template <typename Sum>
double direct_sq_norm(const Convolution& conv, const Tensor& image, const Tensor& grads) {
  const int64_t positions = conv.positions(), group_channels = conv.group_channels();
  const int64_t column = conv.taps() * positions;  // elements that one channel unfolds to
  const int64_t fit = std::max<int64_t>(1, kTileElements / column);
  const int64_t group_step = std::max<int64_t>(1, fit / group_channels);
  const int64_t channel_step = std::min(fit, group_channels);
  const Sum* pixels = image.const_data_ptr<Sum>();
  const Tensor buffer = torch::stable::new_empty(
      image, {std::min(group_step, conv.groups) * channel_step * column});
  double norm = 0;
  for (int64_t group = 0; group < conv.groups; group += group_step) {
    const int64_t groups = std::min(group_step, conv.groups - group);
    const Tensor g = rows(grads, 0, group, group + groups);
    for (int64_t channel = 0; channel < group_channels; channel += channel_step) {
      const int64_t channels = groups * std::min(channel_step, group_channels - channel);
      const int64_t begin = group * group_channels + channel;
      conv.unfold(pixels, begin, begin + channels, buffer.mutable_data_ptr<Sum>());
      const Tensor columns = torch::stable::view(
          rows(buffer, 0, 0, channels * column), {groups, channels / groups * conv.taps(), positions});
      const Tensor tile = torch::stable::matmul(g, transposed(columns));
      norm += dot<Sum>(tile, tile);
    }
  }
  return norm;
}

// <X X^T, G G^T>, group by group, X X^T summed over blocks of channels.
template <typename Sum>
double gram_sq_norm(const Convolution& conv, const Tensor& image, const Tensor& grads) {
  const int64_t positions = conv.positions(), group_channels = conv.group_channels();
  const int64_t column = conv.taps() * positions;
  const int64_t channel_step = std::clamp<int64_t>(kTileElements / column, 1, group_channels);
  const Sum* pixels = image.const_data_ptr<Sum>();
  const Tensor buffer = torch::stable::new_empty(image, {channel_step * column});
  double norm = 0;
  for (int64_t group = 0; group < conv.groups; ++group) {
    const Tensor g = torch::stable::select(grads, 0, group);  // [O, T]
    const Tensor grad_gram = torch::stable::matmul(transposed(g), g);
    for (int64_t channel = 0; channel < group_channels; channel += channel_step) {
      const int64_t channels = std::min(channel_step, group_channels - channel);
      const int64_t begin = group * group_channels + channel;
      conv.unfold(pixels, begin, begin + channels, buffer.mutable_data_ptr<Sum>());
      const Tensor columns =
          torch::stable::view(rows(buffer, 0, 0, channels * column), {channels * conv.taps(), positions});
      norm += dot<Sum>(torch::stable::matmul(transposed(columns), columns), grad_gram);
    }
  }
  return norm;
}

Tensor grad_sq_norm_conv2d(
    const Tensor& input, const Tensor& grad_output, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
    std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, bool bias) {
  const auto pair = [](const std::vector<int64_t>& v) { return std::array<int64_t, 2>{v.front(), v.back()}; };
  const Convolution conv{
      input.size(1),       input.size(2),       input.size(3),
      grad_output.size(1), grad_output.size(2), grad_output.size(3),
      pair(kernel_size),   pair(stride),        pair(padding),
      pair(dilation),      groups};
  const int64_t positions = conv.positions();
  const bool weightless = conv.channels == 0 || conv.out_channels == 0 || positions == 0;
  const bool gram = gram_is_cheaper(positions, conv.group_channels() * conv.taps(), conv.group_outputs());
  return per_sample(grad_output, [&]<typename Sum>(std::type_identity<Sum>, ScalarType dtype, Tensor& norms) {
    for_each_sample<Sum>(grad_output.size(0), norms, [&](int64_t b) -> double {
      if (weightless) return 0;
      const Tensor image = sample(input, b, dtype);
      const Tensor grads =
          torch::stable::view(sample(grad_output, b, dtype), {groups, conv.group_outputs(), positions});
      double norm = gram ? gram_sq_norm<Sum>(conv, image, grads) : direct_sq_norm<Sum>(conv, image, grads);
      if (bias) {
        const Sum* values = grads.const_data_ptr<Sum>();
        for (int64_t o = 0; o < conv.out_channels; ++o) {
          const double sum = total(values + o * positions, positions, 1);
          norm += sum * sum;
        }
      }
      return norm;
    });
  });
}

Tensor grad_sq_norm_norm(
    const Tensor& normalized, const Tensor& grad_output, int64_t first_dim, int64_t last_dim, bool weight, bool bias) {
  int64_t outer = 1, parameters = 1, inner = 1;  // a sample is [outer, parameters, inner]
  for (int64_t d = 1; d < normalized.dim(); ++d) {
    (d < first_dim ? outer : d <= last_dim ? parameters : inner) *= normalized.size(d);
  }
  return per_sample(grad_output, [&]<typename Sum>(std::type_identity<Sum>, ScalarType dtype, Tensor& norms) {
    for_each_sample<Sum>(grad_output.size(0), norms, [&](int64_t b) -> double {
      const Tensor x = sample(normalized, b, dtype), g = sample(grad_output, b, dtype);
      const Sum* values = x.const_data_ptr<Sum>();
      const Sum* grads = g.const_data_ptr<Sum>();
      std::vector<double> weight_grad(parameters), bias_grad(parameters);
      for (int64_t i = 0; i < outer; ++i) {
        for (int64_t p = 0; p < parameters; ++p, values += inner, grads += inner) {
          if (weight) weight_grad[p] += dot(values, grads, inner);
          if (bias) bias_grad[p] += total(grads, inner, 1);
        }
      }
      return dot(weight_grad.data(), weight_grad.data(), parameters) +
             dot(bias_grad.data(), bias_grad.data(), parameters);
    });
  });
}

Tensor grad_sq_norm_embedding(const Tensor& indices, const Tensor& grad_output, int64_t padding_idx) {
  const int64_t samples = grad_output.size(0), width = grad_output.size(-1);
  const int64_t positions = samples == 0 ? 0 : indices.numel() / samples;
  return per_sample(grad_output, [&]<typename Sum>(std::type_identity<Sum>, ScalarType dtype, Tensor& norms) {
    for_each_sample<Sum>(samples, norms, [&](int64_t b) {
      const Tensor index = sample(indices, b, ScalarType::Long), g = sample(grad_output, b, dtype);
      const int64_t* row = index.const_data_ptr<int64_t>();
      const Sum* grads = g.const_data_ptr<Sum>();
      std::vector<int64_t> order(positions);  // positions that look up the same row, side by side
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t c) { return row[a] < row[c]; });
      std::vector<double> row_grad(width);
      double norm = 0;
      for (int64_t at = 0; at < positions;) {
        const int64_t looked_up = row[order[at]];
        std::fill(row_grad.begin(), row_grad.end(), 0.0);
        for (; at < positions && row[order[at]] == looked_up; ++at) {
          const Sum* grad = grads + order[at] * width;
          for (int64_t i = 0; i < width; ++i) row_grad[i] += static_cast<double>(grad[i]);
        }
        if (looked_up != padding_idx) norm += dot(row_grad.data(), row_grad.data(), width);
      }
      return norm;
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ddfast_native, library) {
  library.def("grad_sq_norm_linear(Tensor input, Tensor grad_output, bool bias) -> Tensor");
  library.def(
      "grad_sq_norm_conv2d(Tensor input, Tensor grad_output, int[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, bool bias) -> Tensor");
  library.def(
      "grad_sq_norm_norm(Tensor normalized, Tensor grad_output, int first_dim, int last_dim, bool weight, bool bias) "
      "-> Tensor");
  library.def("grad_sq_norm_embedding(Tensor indices, Tensor grad_output, int padding_idx) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ddfast_native, CPU, library) {
  library.impl("grad_sq_norm_linear", TORCH_BOX(&grad_sq_norm_linear));
  library.impl("grad_sq_norm_conv2d", TORCH_BOX(&grad_sq_norm_conv2d));
  library.impl("grad_sq_norm_norm", TORCH_BOX(&grad_sq_norm_norm));
  library.impl("grad_sq_norm_embedding", TORCH_BOX(&grad_sq_norm_embedding));
}
