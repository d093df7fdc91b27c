// convnet_block_curvature: what the second derivative of convnet_block takes from the full-size maps (defined in
// ddfast/ops/reference_convnet.py).
//
// An image at a time, channels side by side. One pass adds up five sums of each channel, which settle everything else;
// a second pass, from what the first left in the cache, writes the two full-size maps and the pooled one. Plain PyTorch
// goes through maps of that size about thirty-five times. A thread takes one image at a time.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "clones.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")  // a comparison may then stand in a loop of vector instructions
#define DDFAST_NO_ALIAS _Pragma("GCC ivdep")
#else
#define DDFAST_NO_ALIAS
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr auto kChannelsLast = torch::headeronly::MemoryFormat::ChannelsLast;
constexpr int64_t kBlock = 16;  // positions that are added up in float before they join a sum in double

struct Sizes {
  int64_t outputs, height, width;

  int64_t positions() const { return height * width; }
  int64_t pooled() const { return (height / 2) * (width / 2); }
};

// One image: maps [height][width][outputs], pooled maps [height / 2][width / 2][outputs], and channels [outputs].
struct Image {
  const float *conv, *mapped, *grad;                              // the grad is pooled
  const float *mean, *rstd, *gamma, *beta, *of_scale, *of_shift;  // of channels
  const float* nothing;                                           // zeros [outputs], where the pooling drops a position
  float *of_conv, *at_conv, *at_grad, *at_scale;
};

// The pooled gradient at a position, or zeros.
inline const float* grad_at(const Image& image, const Sizes& sizes, int64_t row, int64_t column) {
  const int64_t y = row / 2, x = column / 2;
  if (y >= sizes.height / 2 || x >= sizes.width / 2) return image.nothing;
  return image.grad + (y * (sizes.width / 2) + x) * sizes.outputs;
}

// 1 where the ReLU lets a gradient pass, else 0. As a number, since a branch would keep the loops around it scalar.
inline float passes(float x, float gamma, float beta) { return static_cast<float>(x * gamma + beta > 0.0f); }

// Adds dz, dz x, m, m x and m dz of some positions of a row to sums [5][outputs]: x the normalised convolution, dz the
// gradient at the norm's output, m the mapped one.
DDFAST_CLONES
void add_up(const Image& image, const Sizes& sizes, int64_t row, int64_t begin, int64_t end, float* sums) {
  const int64_t outputs = sizes.outputs;
  const float *__restrict__ mean = image.mean, *__restrict__ rstd = image.rstd;
  const float *__restrict__ gamma = image.gamma, *__restrict__ beta = image.beta;
  float *__restrict__ of_dz = sums, *__restrict__ of_dz_x = sums + outputs, *__restrict__ of_m = sums + 2 * outputs;
  float *__restrict__ of_m_x = sums + 3 * outputs, *__restrict__ of_m_dz = sums + 4 * outputs;
  for (int64_t column = begin; column < end; ++column) {
    const int64_t place = (row * sizes.width + column) * outputs;
    const float *__restrict__ conv = image.conv + place, *__restrict__ mapped = image.mapped + place;
    const float* __restrict__ grad = grad_at(image, sizes, row, column);
DDFAST_NO_ALIAS
    for (int64_t o = 0; o < outputs; ++o) {
      const float x = (conv[o] - mean[o]) * rstd[o];
      const float dz = 0.25f * grad[o] * passes(x, gamma[o], beta[o]);
      of_dz[o] += dz;
      of_dz_x[o] += dz * x;
      of_m[o] += mapped[o];
      of_m_x[o] += mapped[o] * x;
      of_m_dz[o] += mapped[o] * dz;
    }
  }
}

// Factors of a channel, [kFactors][outputs]: the maps are linear in m, dz, x and 1.
enum { kAtMapped, kAtDz, kAtX, kAtOne, kOfDz, kOfX, kOfOne, kGradMapped, kGradX, kGradOne, kFactors };

DDFAST_CLONES
void write_maps(const Image& image, const Sizes& sizes, const float* factors) {
  const int64_t outputs = sizes.outputs;
  const auto factor = [&](int64_t which) { return factors + which * outputs; };
  const float *__restrict__ mean = image.mean, *__restrict__ rstd = image.rstd;
  const float *__restrict__ gamma = image.gamma, *__restrict__ beta = image.beta;
  const float *__restrict__ at_m = factor(kAtMapped), *__restrict__ at_dz = factor(kAtDz);
  const float *__restrict__ at_x = factor(kAtX), *__restrict__ at_one = factor(kAtOne);
  const float *__restrict__ of_dz = factor(kOfDz), *__restrict__ of_x = factor(kOfX), *__restrict__ of_one = factor(kOfOne);
  const float *__restrict__ grad_m = factor(kGradMapped), *__restrict__ grad_x = factor(kGradX);
  const float* __restrict__ grad_one = factor(kGradOne);
  for (int64_t row = 0; row < sizes.height; ++row) {
    for (int64_t column = 0; column < sizes.width; ++column) {
      const int64_t place = (row * sizes.width + column) * outputs;
      const float *__restrict__ conv = image.conv + place, *__restrict__ mapped = image.mapped + place;
      const float* __restrict__ grad = grad_at(image, sizes, row, column);
      float *__restrict__ of_conv = image.of_conv + place, *__restrict__ at_conv = image.at_conv + place;
DDFAST_NO_ALIAS
      for (int64_t o = 0; o < outputs; ++o) {
        const float x = (conv[o] - mean[o]) * rstd[o];
        const float dz = 0.25f * grad[o] * passes(x, gamma[o], beta[o]);
        of_conv[o] = of_dz[o] * dz + of_x[o] * x + of_one[o];
        at_conv[o] = (at_m[o] * mapped[o] + at_dz[o] * dz) + (at_x[o] * x + at_one[o]);
      }
      if (grad == image.nothing) continue;
      float* __restrict__ at_grad = image.at_grad + (grad - image.grad);
DDFAST_NO_ALIAS
      for (int64_t o = 0; o < outputs; ++o) {
        const float x = (conv[o] - mean[o]) * rstd[o];
        const float found = 0.25f * (grad_m[o] * mapped[o] + grad_x[o] * x + grad_one[o]);
        at_grad[o] += found * passes(x, gamma[o], beta[o]);
      }
    }
  }
}

void run(const Image& image, const Sizes& sizes) {
  const int64_t outputs = sizes.outputs;
  std::vector<double> sums(5 * outputs, 0.0);
  std::vector<float> partial(5 * outputs), factors(kFactors * outputs);
  for (int64_t row = 0; row < sizes.height; ++row) {
    for (int64_t begin = 0; begin < sizes.width; begin += kBlock) {
      std::fill(partial.begin(), partial.end(), 0.0f);
      add_up(image, sizes, row, begin, std::min(begin + kBlock, sizes.width), partial.data());
      for (int64_t k = 0; k < 5 * outputs; ++k) sums[k] += static_cast<double>(partial[k]);
    }
  }
  const double count = static_cast<double>(sizes.positions());
  for (int64_t o = 0; o < outputs; ++o) {
    const double r = image.rstd[o], gamma = image.gamma[o], scale = image.of_scale[o], shift = image.of_shift[o];
    const double dz = sums[o] / count, dz_x = sums[outputs + o] / count, m = sums[2 * outputs + o] / count;
    const double m_x = sums[3 * outputs + o] / count, m_dz = sums[4 * outputs + o] / count;
    // E[m P a], E[h] and E[h x], with a = gamma dz and h as in the reference.
    const double m_projected = gamma * (m_dz - dz * m - dz_x * m_x);
    const double h = -r * gamma * (m * dz_x + dz * m_x) + scale * dz;
    const double h_x = -2 * r * gamma * m_x * dz_x + scale * dz_x;
    const auto set = [&](int64_t which, double value) { factors[which * outputs + o] = static_cast<float>(value); };
    set(kAtMapped, -r * r * gamma * dz_x);
    set(kAtDz, r * (scale - r * gamma * m_x));
    set(kAtX, -r * (h_x + r * m_projected));
    set(kAtOne, -r * h);
    set(kOfDz, r * gamma);
    set(kOfX, -r * gamma * dz_x);
    set(kOfOne, -r * gamma * dz);
    set(kGradMapped, gamma * r);
    set(kGradX, scale - gamma * r * m_x);
    set(kGradOne, shift - gamma * r * m);
    image.at_scale[o] = static_cast<float>(count * r * (m_dz - m * dz - m_x * dz_x));
  }
  std::fill(image.at_grad, image.at_grad + sizes.pooled() * outputs, 0.0f);
  write_maps(image, sizes, factors.data());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> convnet_block_curvature(
    const Tensor& grad_output, const Tensor& conv, const Tensor& mapped, const std::optional<Tensor>& norm_weight,
    const std::optional<Tensor>& norm_bias, const Tensor& mean, const Tensor& rstd, const std::optional<Tensor>& of_scale,
    const std::optional<Tensor>& of_shift) {
  STD_TORCH_CHECK(conv.dim() == 4 && mapped.dim() == 4 && grad_output.dim() == 4,
                  "convnet_block_curvature: the maps must be [B, O, H, W]");
  const int64_t batch = conv.size(0);
  const Sizes sizes{conv.size(1), conv.size(2), conv.size(3)};
  const auto of_shape = [&](const Tensor& map, int64_t height, int64_t width) {
    return map.scalar_type() == ScalarType::Float && map.size(0) == batch && map.size(1) == sizes.outputs &&
           map.size(2) == height && map.size(3) == width;
  };
  const auto statistic = [&](const Tensor& values) {
    return values.dim() == 2 && values.scalar_type() == ScalarType::Float && values.size(0) == batch &&
           values.size(1) == sizes.outputs;
  };
  STD_TORCH_CHECK(of_shape(conv, sizes.height, sizes.width) && of_shape(mapped, sizes.height, sizes.width) &&
                      of_shape(grad_output, sizes.height / 2, sizes.width / 2) && statistic(mean) && statistic(rstd),
                  "convnet_block_curvature: the shapes do not fit each other, or are not float32");
  std::vector<float> ones(sizes.outputs, 1.0f), zeros(sizes.outputs, 0.0f);
  std::vector<Tensor> held;
  held.reserve(4);
  const auto channels = [&](const std::optional<Tensor>& values, const std::vector<float>& otherwise) {
    if (!values.has_value()) return otherwise.data();
    STD_TORCH_CHECK(values->dim() == 1 && values->scalar_type() == ScalarType::Float && values->size(0) == sizes.outputs,
                    "convnet_block_curvature: values of channels must be float32 [O]");
    held.push_back(torch::stable::contiguous(*values));
    return held.back().const_data_ptr<float>();
  };
  const float *gamma = channels(norm_weight, ones), *beta = channels(norm_bias, zeros);
  const float *scale = channels(of_scale, zeros), *shift = channels(of_shift, zeros);
  const Tensor convs = torch::stable::contiguous(conv, kChannelsLast);
  const Tensor mappeds = torch::stable::contiguous(mapped, kChannelsLast);
  const Tensor grads = torch::stable::contiguous(grad_output, kChannelsLast);
  const Tensor means = torch::stable::contiguous(mean), rstds = torch::stable::contiguous(rstd);
  const auto empty = [&](int64_t height, int64_t width) {
    return torch::stable::empty({batch, sizes.outputs, height, width}, ScalarType::Float, std::nullopt, conv.device(),
                                std::nullopt, kChannelsLast);
  };
  Tensor of_conv = empty(sizes.height, sizes.width), at_conv = empty(sizes.height, sizes.width);
  Tensor at_grad = empty(sizes.height / 2, sizes.width / 2);
  Tensor at_scale = torch::stable::new_empty(conv, {batch, sizes.outputs});
  const int64_t map = sizes.positions() * sizes.outputs, pooled = sizes.pooled() * sizes.outputs;
  const float *conv_data = convs.const_data_ptr<float>(), *mapped_data = mappeds.const_data_ptr<float>();
  const float *grad_data = grads.const_data_ptr<float>(), *mean_data = means.const_data_ptr<float>();
  const float* rstd_data = rstds.const_data_ptr<float>();
  float *of_data = of_conv.mutable_data_ptr<float>(), *at_data = at_conv.mutable_data_ptr<float>();
  float *at_grad_data = at_grad.mutable_data_ptr<float>(), *at_scale_data = at_scale.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t channel = b * sizes.outputs;
      run({conv_data + b * map, mapped_data + b * map, grad_data + b * pooled, mean_data + channel, rstd_data + channel,
           gamma, beta, scale, shift, zeros.data(), of_data + b * map, at_data + b * map, at_grad_data + b * pooled,
           at_scale_data + channel},
          sizes);
    }
  });
  return {of_conv, at_conv, at_grad, at_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ddfast_native, library) {
  library.def(
      "convnet_block_curvature(Tensor grad_output, Tensor conv, Tensor mapped, Tensor? norm_weight, Tensor? norm_bias, "
      "Tensor mean, Tensor rstd, Tensor? of_scale, Tensor? of_shift) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ddfast_native, CPU, library) {
  library.impl("convnet_block_curvature", TORCH_BOX(&convnet_block_curvature));
}
