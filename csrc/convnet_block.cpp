// convnet_block: 3x3 convolution (stride 1, padding 1), InstanceNorm, ReLU and 2x2 average pooling in one pass, forward and
// backward. Defined in ddfast/ops/reference.py.
//
// A panel of output channels of one image (128 KiB at 32 x 32) goes through all four steps in the cache: only the pooled
// map, a quarter, is written, and the two statistics of each channel and image. With few input channels the convolution
// is computed as it is written, from a padded copy of the image; the backward pass computes it again, which costs less than
// to write and read it. With many it is Winograd's (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
// CVPR 2016) over tiles of 2 x 4 outputs, 24 multiplications a pair of channels in place of 72, at the points 0, 1, -1 and
// 0, 5/8, -5/8, 3/2, -3/2; there the forward pass keeps the convolution for the backward pass where it is asked to. The gradient at the
// input is the same convolution with transposed weights. The gradient of the weights is summed in the points and transformed
// back once. Sums are taken in chains of 16 or 32 that are then added up: that is what keeps the error of these tiles below
// twice that of a plain convolution.
//
// Images do not depend on each other, nor any result on the number of threads: sums over images are taken in slabs whose
// number depends on the batch alone.
//
// convnet_block_batch_norm is the same block with BatchNorm. Its statistics are those of the batch, so that each direction goes
// through the maps once more for its sums: with many input channels through the convolution that is kept, with few through
// one that is computed again. With statistics that are given (eval mode) one pass does.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <new>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "clones.h"
#include "cpu_body.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define DDFAST_HAS_X86_BODIES 1
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of the undefined registers of its own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#define DDFAST_HAS_X86_BODIES 0
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kDirectInputs = 4;  // input channels up to which the convolution is computed as it is written
constexpr int64_t kSlabs = 16;        // sums over images that grow side by side, at most

int64_t slabs_of(int64_t parts) { return std::clamp<int64_t>(parts / 2, 1, kSlabs); }

// Floats that begin on a cache line's boundary, not initialised.
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : count_(count), data_(static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(Buffer&& other) noexcept : count_(other.count_), data_(std::exchange(other.data_, nullptr)) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  float* data() { return data_; }
  const float* data() const { return data_; }
  float operator[](int64_t k) const { return data_[k]; }
  void fill(float value) { std::fill_n(data_, count_, value); }

 private:
  int64_t count_;
  float* data_;
};

// A layer and its parameters; gamma, beta and bias may be null.
struct Layer {
  int64_t batch, inputs, outputs, height, width;
  double eps;
  const float *weight, *bias, *gamma, *beta;  // weight [outputs][inputs][3][3]
};

// A map [batch, channels, height, width] and its strides in floats.
struct Strided {
  float* data;
  int64_t batch, channel, row, column;
};

// Maps written or read without strides are channels-last.
struct Forward {
  Layer layer;
  Strided input;
  float *pooled, *mean, *rstd, *conv;  // conv may be null
};

// With BatchNorm.
struct BatchForward {
  Layer layer;
  Strided input;
  float *pooled, *conv;                // conv is null where it is to be computed again
  float *image_means, *image_squares;  // of each image's channels: means, and the sums of squares about them
  const float *mean, *rstd;            // of the batch's channels
};

struct Backward {
  Layer layer;
  Strided input;
  const float *grad_output, *mean, *rstd, *conv;       // conv is null where it is to be computed again
  int64_t by_image;                                    // from an image's mean and rstd to the next's; 0 of a batch's
  const float *offset, *slope;                         // of a batch's channels, see Channels; null of an InstanceNorm
  Strided grad_input;                                  // channels-last; its data and grad_weight may be null
  float *grad_weight, *grad_gamma, *grad_beta;         // the latter two [batch][outputs]
};

constexpr double kFirst = 0.625, kSecond = 1.5;  // the points A and B, see convnet_block_body.h
constexpr double kFirstSquare = kFirst * kFirst, kSecondSquare = kSecond * kSecond;
constexpr double kFirstFactor = 1 / (2 * kFirstSquare * (kFirstSquare - kSecondSquare));
constexpr double kSecondFactor = 1 / (2 * kSecondSquare * (kSecondSquare - kFirstSquare));
// G: taps to points.
constexpr double kFourPoints[4][3] = {{-1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
constexpr double kSixPoints[6][3] = {{1 / (kFirstSquare * kSecondSquare), 0, 0},
                                     {kFirstFactor, kFirst * kFirstFactor, kFirstSquare * kFirstFactor},
                                     {kFirstFactor, -kFirst * kFirstFactor, kFirstSquare * kFirstFactor},
                                     {kSecondFactor, kSecond * kSecondFactor, kSecondSquare * kSecondFactor},
                                     {kSecondFactor, -kSecond * kSecondFactor, kSecondSquare * kSecondFactor},
                                     {0, 0, 1}};
constexpr int64_t kWidest = 32;  // channels of a panel, at most

// G g G^T for `count` output channels from `first` on and tiles of 2 x 4 outputs: to [24][inputs][count], zeros beyond the
// last channel. `transposed`: of the convolution that maps gradients at the outputs to those at the inputs.
DDFAST_CLONES void transform_weights(const Layer& layer, bool transposed, int64_t first, int64_t count, float* to) {
  const int64_t inputs = transposed ? layer.outputs : layer.inputs, outputs = transposed ? layer.inputs : layer.outputs;
  const int64_t by_output = transposed ? 9 : layer.inputs * 9, by_input = transposed ? layer.inputs * 9 : 9;
  for (int64_t c = 0; c < inputs; ++c) {
    double taps[9][kWidest] = {};
    for (int64_t lane = 0; lane < std::min(count, outputs - first); ++lane) {
      const float* from = layer.weight + (first + lane) * by_output + c * by_input;
      for (int64_t tap = 0; tap < 9; ++tap) taps[tap][lane] = static_cast<double>(from[transposed ? 8 - tap : tap]);
    }
    for (int64_t i = 0; i < 4; ++i) {
      double row[3][kWidest];
      for (int64_t j = 0; j < 3; ++j) {
        for (int64_t lane = 0; lane < kWidest; ++lane) {
          row[j][lane] = kFourPoints[i][0] * taps[j][lane] + kFourPoints[i][1] * taps[3 + j][lane] +
                         kFourPoints[i][2] * taps[6 + j][lane];
        }
      }
      for (int64_t j = 0; j < 6; ++j) {
        float* target = to + ((i * 6 + j) * inputs + c) * count;
        for (int64_t lane = 0; lane < count; ++lane) {
          target[lane] = static_cast<float>(kSixPoints[j][0] * row[0][lane] + kSixPoints[j][1] * row[1][lane] +
                                            kSixPoints[j][2] * row[2][lane]);
        }
      }
    }
  }
}

// G^T s G: the weights' gradient [outputs][inputs][3][3] from its sums in the points, s
// [24][inputs][stride].
DDFAST_CLONES void weights_of_points(const Layer& layer, const float* sums, int64_t stride, float* to) {
  for (int64_t c = 0; c < layer.inputs; ++c) {
    for (int64_t first = 0; first < layer.outputs; first += kWidest) {
      const int64_t count = std::min(kWidest, layer.outputs - first);
      double half[3][6][kWidest] = {}, taps[9][kWidest] = {};
      for (int64_t i = 0; i < 4; ++i) {
        for (int64_t j = 0; j < 6; ++j) {
          const float* from = sums + ((i * 6 + j) * layer.inputs + c) * stride + first;
          for (int64_t k = 0; k < 3; ++k) {
            const double factor = kFourPoints[i][k];
            for (int64_t lane = 0; lane < count; ++lane) half[k][j][lane] += factor * static_cast<double>(from[lane]);
          }
        }
      }
      for (int64_t k = 0; k < 3; ++k) {
        for (int64_t j = 0; j < 6; ++j) {
          for (int64_t l = 0; l < 3; ++l) {
            const double factor = kSixPoints[j][l];
            for (int64_t lane = 0; lane < kWidest; ++lane) taps[3 * k + l][lane] += factor * half[k][j][lane];
          }
        }
      }
      for (int64_t lane = 0; lane < count; ++lane) {
        float* target = to + ((first + lane) * layer.inputs + c) * 9;
        for (int64_t tap = 0; tap < 9; ++tap) target[tap] = static_cast<float>(taps[tap][lane]);
      }
    }
  }
}

// The means of the convolution's planes, to [panels][panel]: it is linear, so they follow from the means of what each tap
// reads, and the convolution less its mean is computed at once.
DDFAST_CLONES void direct_means(const Layer& layer, const Strided& input, int64_t image, const float* weights,
                                const float* bias, int64_t panels, int64_t panel, float* to) {
  const int64_t height = layer.height, width = layer.width, terms = 9 * layer.inputs;
  double taps[9 * kDirectInputs];  // [3 rows][3 columns][inputs]
  for (int64_t c = 0; c < layer.inputs; ++c) {
    const float* plane = input.data + image * input.batch + c * input.channel;
    const auto at = [&](int64_t row, int64_t col) {
      return static_cast<double>(plane[row * input.row + col * input.column]);
    };
    double rows[3] = {}, left[3] = {}, right[3] = {};  // all rows; the last and the first, which a tap may not read
    for (int64_t row = 0; row < height; ++row) {
      double parts[4] = {};
      int64_t col = 0;
      for (; col + 4 <= width; col += 4) {
        for (int64_t k = 0; k < 4; ++k) parts[k] += at(row, col + k);
      }
      for (; col < width; ++col) parts[0] += at(row, col);
      const double sum = (parts[0] + parts[1]) + (parts[2] + parts[3]);
      const bool read[3] = {row < height - 1, true, row > 0};  // by the taps of the row above, of this one and of that below
      for (int64_t tap = 0; tap < 3; ++tap) {
        if (!read[tap]) continue;
        rows[tap] += sum;
        left[tap] += at(row, 0);
        right[tap] += at(row, width - 1);
      }
    }
    for (int64_t tap = 0; tap < 3; ++tap) {
      taps[(tap * 3) * layer.inputs + c] = rows[tap] - right[tap];
      taps[(tap * 3 + 1) * layer.inputs + c] = rows[tap];
      taps[(tap * 3 + 2) * layer.inputs + c] = rows[tap] - left[tap];
    }
  }
  for (int64_t each = 0; each < panels; ++each, weights += terms * panel) {
    double sums[kWidest] = {};
    for (int64_t term = 0; term < terms; ++term) {
      for (int64_t k = 0; k < panel; ++k) sums[k] += taps[term] * static_cast<double>(weights[term * panel + k]);
    }
    for (int64_t k = 0; k < panel; ++k, ++to, ++bias) {
      *to = static_cast<float>(static_cast<double>(*bias) + sums[k] / static_cast<double>(height * width));
    }
  }
}

// --- the bodies

#if DDFAST_HAS_X86_BODIES

#define DDFAST_BODY avx512
#define DDFAST_TARGET __attribute__((target("avx512f")))
namespace DDFAST_BODY {
using Vec = __m512;
constexpr int64_t kLanes = 16;
constexpr int kTiles = 14;  // 28 of 32 registers hold sums
DDFAST_TARGET inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
DDFAST_TARGET inline void store(float* to, Vec values) { _mm512_storeu_ps(to, values); }
DDFAST_TARGET inline Vec set(float value) { return _mm512_set1_ps(value); }
DDFAST_TARGET inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
DDFAST_TARGET inline Vec subtract(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
DDFAST_TARGET inline Vec multiply(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
DDFAST_TARGET inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
DDFAST_TARGET inline Vec subtract_product(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }
DDFAST_TARGET inline Vec positive(Vec a) { return _mm512_max_ps(_mm512_setzero_ps(), a); }  // NaN, the second, stays
DDFAST_TARGET inline Vec where_positive(Vec a, Vec b) {  // or where a is NaN
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_NLE_UQ), b);
}
}  // namespace DDFAST_BODY
#include "convnet_block_body.h"
#undef DDFAST_BODY
#undef DDFAST_TARGET

#define DDFAST_BODY avx2
#define DDFAST_TARGET __attribute__((target("avx2,fma")))
namespace DDFAST_BODY {
using Vec = __m256;
constexpr int64_t kLanes = 8;
constexpr int kTiles = 6;  // 12 of 16 registers hold sums
DDFAST_TARGET inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
DDFAST_TARGET inline void store(float* to, Vec values) { _mm256_storeu_ps(to, values); }
DDFAST_TARGET inline Vec set(float value) { return _mm256_set1_ps(value); }
DDFAST_TARGET inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
DDFAST_TARGET inline Vec subtract(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
DDFAST_TARGET inline Vec multiply(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
DDFAST_TARGET inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
DDFAST_TARGET inline Vec subtract_product(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
DDFAST_TARGET inline Vec positive(Vec a) { return _mm256_max_ps(_mm256_setzero_ps(), a); }
DDFAST_TARGET inline Vec where_positive(Vec a, Vec b) {
  return _mm256_and_ps(_mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_NLE_UQ), b);
}
}  // namespace DDFAST_BODY
#include "convnet_block_body.h"
#undef DDFAST_BODY
#undef DDFAST_TARGET

#endif

// Four floats at a time, which compilers map to what every CPU of a family has (SSE2, NEON).
#define DDFAST_BODY portable
#define DDFAST_TARGET
namespace DDFAST_BODY {
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Bits __attribute__((vector_size(16)));
constexpr int64_t kLanes = 4;
constexpr int kTiles = 6;
inline Vec load(const float* from) {
  Vec values;
  __builtin_memcpy(&values, from, sizeof(values));
  return values;
}
inline void store(float* to, Vec values) { __builtin_memcpy(to, &values, sizeof(values)); }
inline Vec set(float value) { return Vec{value, value, value, value}; }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec subtract(Vec a, Vec b) { return a - b; }
inline Vec multiply(Vec a, Vec b) { return a * b; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec subtract_product(Vec a, Vec b, Vec c) { return c - a * b; }
inline Vec where_positive(Vec a, Vec b) { return (Vec)(~(Bits)(a <= set(0.0f)) & (Bits)b); }
inline Vec positive(Vec a) { return where_positive(a, a); }
}  // namespace DDFAST_BODY
#include "convnet_block_body.h"
#undef DDFAST_BODY
#undef DDFAST_TARGET

enum class Body { portable, avx2, avx512 };

Body body() {
  const ddfast::CpuBody chosen = ddfast::cpu_body();
  if (chosen >= ddfast::CpuBody::kAvx512) return Body::avx512;
  return chosen == ddfast::CpuBody::kAvx2 ? Body::avx2 : Body::portable;
}

// Calls a function of the body that runs.
#if DDFAST_HAS_X86_BODIES
#define DDFAST_RUN(call)           \
  switch (body()) {                \
    case Body::avx512:             \
      avx512::call;                \
      break;                       \
    case Body::avx2:               \
      avx2::call;                  \
      break;                       \
    default:                       \
      portable::call;              \
  }
#else
#define DDFAST_RUN(call) portable::call
#endif

// --- the ops

constexpr auto kChannelsLast = torch::headeronly::MemoryFormat::ChannelsLast;

Tensor channels_last(const Tensor& map) { return torch::stable::contiguous(map, kChannelsLast); }

Tensor empty_channels_last(const Tensor& like, int64_t channels, int64_t height, int64_t width) {
  return torch::stable::empty({like.size(0), channels, height, width}, ScalarType::Float, std::nullopt, like.device(),
                              std::nullopt, kChannelsLast);
}

Strided strided(const Tensor& map) {
  return {const_cast<float*>(map.const_data_ptr<float>()), map.stride(0), map.stride(1), map.stride(2), map.stride(3)};
}

// The arguments in the layout that a body reads.
struct Arguments {
  Arguments(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
            const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, double eps)
      : input(weight.size(1) <= kDirectInputs ? input : channels_last(input)),
        weight(torch::stable::contiguous(weight)) {
    layer = {input.size(0), weight.size(1), weight.size(0), input.size(2), input.size(3), eps,
             this->weight.const_data_ptr<float>(), vector(bias), vector(norm_weight), vector(norm_bias)};
    source = strided(this->input);
    if (weight.size(1) > kDirectInputs) source.batch = layer.height * layer.width * layer.inputs;
  }

  const float* vector(const std::optional<Tensor>& given) {
    if (!given) return nullptr;
    vectors[count] = torch::stable::contiguous(*given);
    return vectors[count++]->const_data_ptr<float>();
  }

  Tensor input, weight;
  std::array<std::optional<Tensor>, 3> vectors;
  int64_t count = 0;
  Layer layer;
  Strided source;
};

void check(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
           const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias) {
  STD_TORCH_CHECK(input.dim() == 4 && weight.dim() == 4 && input.scalar_type() == ScalarType::Float &&
                      weight.scalar_type() == ScalarType::Float && weight.size(1) == input.size(1) &&
                      weight.size(2) == 3 && weight.size(3) == 3 && input.size(1) > 0 && input.size(2) > 1 &&
                      input.size(3) > 1,
                  "convnet_block: input must be float32 [B, C, H, W], 2 x 2 or more, and weight [O, C, 3, 3]");
  for (const auto* vector : {&bias, &norm_weight, &norm_bias}) {
    STD_TORCH_CHECK(!*vector || ((*vector)->scalar_type() == ScalarType::Float && (*vector)->dim() == 1 &&
                                 (*vector)->size(0) == weight.size(0)),
                    "convnet_block: bias, norm_weight and norm_bias must be float32 [O]");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> convnet_block(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, double eps, bool keep) {
  check(input, weight, bias, norm_weight, norm_bias);
  const int64_t batch = input.size(0), outputs = weight.size(0), height = input.size(2), width = input.size(3);
  Tensor pooled = empty_channels_last(input, outputs, height / 2, width / 2);
  Tensor mean = torch::stable::new_empty(input, {batch, outputs}), rstd = torch::stable::new_empty(input, {batch, outputs});
  Tensor conv = keep ? empty_channels_last(input, outputs, height, width) : torch::stable::new_empty(input, {0});
  if (pooled.numel() == 0) return {pooled, mean, rstd, conv};
  const Arguments arguments(input, weight, bias, norm_weight, norm_bias, eps);
  const Forward pass{arguments.layer, arguments.source, pooled.mutable_data_ptr<float>(), mean.mutable_data_ptr<float>(),
                     rstd.mutable_data_ptr<float>(), keep ? conv.mutable_data_ptr<float>() : nullptr};
  DDFAST_RUN(forward(pass));
  return {pooled, mean, rstd, conv};
}

// Floats of a register of the body that runs.
int64_t convnet_block_lanes() {
#if DDFAST_HAS_X86_BODIES
  if (body() == Body::avx512) return avx512::kLanes;
  if (body() == Body::avx2) return avx2::kLanes;
#endif
  return portable::kLanes;
}

// sums[o] = the sum over images of parts [batch][outputs].
void add_images(const Tensor& parts, Tensor& sums) {
  const float* from = parts.const_data_ptr<float>();
  float* to = sums.mutable_data_ptr<float>();
  for (int64_t o = 0; o < parts.size(1); ++o) {
    double sum = 0;
    for (int64_t b = 0; b < parts.size(0); ++b) sum += from[b * parts.size(1) + o];
    to[o] = static_cast<float>(sum);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> convnet_block_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, const Tensor& mean,
    const Tensor& rstd, const Tensor& conv, double eps, bool to_input, bool to_weight) {
  check(input, weight, bias, norm_weight, norm_bias);
  const int64_t batch = input.size(0), outputs = weight.size(0), height = input.size(2), width = input.size(3);
  const auto of_shape = [&](const Tensor& map, int64_t rows, int64_t columns) {
    return map.dim() == 4 && map.scalar_type() == ScalarType::Float && map.size(0) == batch &&
           map.size(1) == outputs && map.size(2) == rows && map.size(3) == columns;
  };
  const auto statistic = [&](const Tensor& values) {
    return values.dim() == 2 && values.scalar_type() == ScalarType::Float && values.size(0) == batch &&
           values.size(1) == outputs;
  };
  const bool kept = conv.dim() == 4;
  STD_TORCH_CHECK(of_shape(grad_output, height / 2, width / 2) && statistic(mean) && statistic(rstd) &&
                      (!kept || of_shape(conv, height, width)),
                  "convnet_block_backward: grad_output, mean, rstd and conv must be what convnet_block made");
  Tensor grad_input = to_input ? empty_channels_last(input, input.size(1), height, width)
                               : torch::stable::new_empty(input, {0});
  Tensor grad_weight = to_weight ? torch::stable::new_empty(weight, {outputs, input.size(1), 3, 3})
                                 : torch::stable::new_empty(weight, {0});
  Tensor grad_gamma = torch::stable::new_empty(weight, {outputs}), grad_beta = torch::stable::new_empty(weight, {outputs});
  Tensor gammas = torch::stable::new_empty(mean, {batch, outputs}), betas = torch::stable::new_empty(mean, {batch, outputs});
  if (batch == 0 || outputs == 0) {
    for (Tensor* sums : {&grad_input, &grad_weight, &grad_gamma, &grad_beta}) torch::stable::zero_(*sums);
    return {grad_input, grad_weight, grad_gamma, grad_beta};
  }
  const Arguments arguments(input, weight, bias, norm_weight, norm_bias, eps);
  const Tensor grads = channels_last(grad_output), means = torch::stable::contiguous(mean);
  const Tensor rstds = torch::stable::contiguous(rstd), kept_conv = kept ? channels_last(conv) : conv;
  Strided target{};
  if (to_input) {
    const int64_t row = width * input.size(1);
    target = {grad_input.mutable_data_ptr<float>(), height * row, 1, row, input.size(1)};
  }
  const Backward pass{arguments.layer,
                      arguments.source,
                      grads.const_data_ptr<float>(),
                      means.const_data_ptr<float>(),
                      rstds.const_data_ptr<float>(),
                      kept ? kept_conv.const_data_ptr<float>() : nullptr,
                      outputs,
                      nullptr,
                      nullptr,
                      target,
                      to_weight ? grad_weight.mutable_data_ptr<float>() : nullptr,
                      gammas.mutable_data_ptr<float>(),
                      betas.mutable_data_ptr<float>()};
  DDFAST_RUN(backward(pass));
  add_images(gammas, grad_gamma);
  add_images(betas, grad_beta);
  return {grad_input, grad_weight, grad_gamma, grad_beta};
}

// --- the same with BatchNorm

constexpr const char* kBatchNorm = "convnet_block_batch_norm";

// 1 / deviation of each channel, from the variances.
Tensor inverse_deviations(const Tensor& variance, double eps) {
  Tensor rstd = torch::stable::new_empty(variance, {variance.size(0)});
  const float* from = variance.const_data_ptr<float>();
  float* to = rstd.mutable_data_ptr<float>();
  for (int64_t o = 0; o < variance.size(0); ++o) to[o] = static_cast<float>(1 / std::sqrt(from[o] + eps));
  return rstd;
}

// Mean and variance of a batch of `positions` pixels an image, from those of its images.
void join_statistics(const Tensor& image_means, const Tensor& image_squares, int64_t positions, Tensor& mean,
                     Tensor& variance) {
  const int64_t batch = image_means.size(0), outputs = image_means.size(1);
  const float *means = image_means.const_data_ptr<float>(), *squares = image_squares.const_data_ptr<float>();
  float *to_mean = mean.mutable_data_ptr<float>(), *to_variance = variance.mutable_data_ptr<float>();
  for (int64_t o = 0; o < outputs; ++o) {
    double sum = 0, inner = 0, between = 0;
    for (int64_t b = 0; b < batch; ++b) sum += means[b * outputs + o], inner += squares[b * outputs + o];
    const double average = sum / static_cast<double>(batch);
    for (int64_t b = 0; b < batch; ++b) between += (means[b * outputs + o] - average) * (means[b * outputs + o] - average);
    to_mean[o] = static_cast<float>(average);
    to_variance[o] = static_cast<float>((inner / static_cast<double>(positions) + between) / static_cast<double>(batch));
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> convnet_block_batch_norm(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, double eps) {
  check(input, weight, bias, norm_weight, norm_bias);
  const int64_t batch = input.size(0), outputs = weight.size(0), height = input.size(2), width = input.size(3);
  STD_TORCH_CHECK(batch > 0, kBatchNorm, ": no images have no statistics");
  const bool kept = input.size(1) > kDirectInputs;
  Tensor pooled = empty_channels_last(input, outputs, height / 2, width / 2);
  Tensor mean = torch::stable::new_empty(input, {outputs}), variance = torch::stable::new_empty(input, {outputs});
  Tensor conv = kept ? empty_channels_last(input, outputs, height, width) : torch::stable::new_empty(input, {0});
  if (outputs == 0) return {pooled, mean, variance, conv};
  Tensor means = torch::stable::new_empty(input, {batch, outputs});
  Tensor squares = torch::stable::new_empty(input, {batch, outputs});
  const Arguments arguments(input, weight, bias, norm_weight, norm_bias, eps);
  BatchForward pass{arguments.layer,
                    arguments.source,
                    pooled.mutable_data_ptr<float>(),
                    kept ? conv.mutable_data_ptr<float>() : nullptr,
                    means.mutable_data_ptr<float>(),
                    squares.mutable_data_ptr<float>(),
                    mean.const_data_ptr<float>(),
                    nullptr};
  DDFAST_RUN(measure(pass));
  join_statistics(means, squares, height * width, mean, variance);
  const Tensor rstd = inverse_deviations(variance, eps);
  pass.rstd = rstd.const_data_ptr<float>();
  DDFAST_RUN(finish(pass));
  return {pooled, mean, variance, conv};
}

Tensor convnet_block_batch_norm_eval(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                     const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
                                     const Tensor& mean, const Tensor& variance, double eps) {
  check(input, weight, bias, norm_weight, norm_bias);
  for (const Tensor* values : {&mean, &variance}) {
    STD_TORCH_CHECK(values->dim() == 1 && values->scalar_type() == ScalarType::Float && values->size(0) == weight.size(0),
                    kBatchNorm, "_eval: mean and variance must be float32 [O]");
  }
  Tensor pooled = empty_channels_last(input, weight.size(0), input.size(2) / 2, input.size(3) / 2);
  if (pooled.numel() == 0) return pooled;
  const Arguments arguments(input, weight, bias, norm_weight, norm_bias, eps);
  const Tensor means = torch::stable::contiguous(mean);
  const Tensor rstd = inverse_deviations(torch::stable::contiguous(variance), eps);
  const BatchForward pass{arguments.layer, arguments.source, pooled.mutable_data_ptr<float>(), nullptr, nullptr, nullptr,
                          means.const_data_ptr<float>(), rstd.const_data_ptr<float>()};
  DDFAST_RUN(finish(pass));
  return pooled;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> convnet_block_batch_norm_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, const Tensor& mean,
    const Tensor& variance, const Tensor& conv, double eps, bool to_input, bool to_weight) {
  check(input, weight, bias, norm_weight, norm_bias);
  const int64_t batch = input.size(0), outputs = weight.size(0), height = input.size(2), width = input.size(3);
  const bool kept = input.size(1) > kDirectInputs;
  const auto of_shape = [&](const Tensor& map, int64_t rows, int64_t columns) {
    return map.dim() == 4 && map.scalar_type() == ScalarType::Float && map.size(0) == batch &&
           map.size(1) == outputs && map.size(2) == rows && map.size(3) == columns;
  };
  const auto statistic = [&](const Tensor& values) {
    return values.dim() == 1 && values.scalar_type() == ScalarType::Float && values.size(0) == outputs;
  };
  STD_TORCH_CHECK(batch > 0 && of_shape(grad_output, height / 2, width / 2) && statistic(mean) && statistic(variance) &&
                      (!kept || of_shape(conv, height, width)),
                  kBatchNorm, "_backward: grad_output, mean, variance and conv must be what ", kBatchNorm, " made");
  Tensor grad_input = to_input ? empty_channels_last(input, input.size(1), height, width)
                               : torch::stable::new_empty(input, {0});
  Tensor grad_weight = to_weight ? torch::stable::new_empty(weight, {outputs, input.size(1), 3, 3})
                                 : torch::stable::new_empty(weight, {0});
  Tensor grad_gamma = torch::stable::new_empty(weight, {outputs}), grad_beta = torch::stable::new_empty(weight, {outputs});
  if (outputs == 0) {
    torch::stable::zero_(grad_input);
    return {grad_input, grad_weight, grad_gamma, grad_beta};
  }
  Tensor gammas = torch::stable::new_empty(mean, {batch, outputs}), betas = torch::stable::new_empty(mean, {batch, outputs});
  Tensor offset = torch::stable::new_empty(mean, {outputs}), slope = torch::stable::new_empty(mean, {outputs});
  const Arguments arguments(input, weight, bias, norm_weight, norm_bias, eps);
  const Tensor grads = channels_last(grad_output), means = torch::stable::contiguous(mean);
  const Tensor rstd = inverse_deviations(torch::stable::contiguous(variance), eps), kept_conv = kept ? channels_last(conv) : conv;
  Strided target{};
  if (to_input) {
    const int64_t row = width * input.size(1);
    target = {grad_input.mutable_data_ptr<float>(), height * row, 1, row, input.size(1)};
  }
  Backward pass{arguments.layer,
                arguments.source,
                grads.const_data_ptr<float>(),
                means.const_data_ptr<float>(),
                rstd.const_data_ptr<float>(),
                kept ? kept_conv.const_data_ptr<float>() : nullptr,
                0,
                nullptr,
                nullptr,
                target,
                to_weight ? grad_weight.mutable_data_ptr<float>() : nullptr,
                gammas.mutable_data_ptr<float>(),
                betas.mutable_data_ptr<float>()};
  DDFAST_RUN(sum_gradients(pass));
  add_images(betas, grad_beta);
  add_images(gammas, grad_gamma);  // of dz y, where y is not divided by the deviation yet
  const double count = static_cast<double>(batch * height * width);
  for (int64_t o = 0; o < outputs; ++o) {
    float& of_gamma = grad_gamma.mutable_data_ptr<float>()[o];
    const double inverse = pass.rstd[o], gamma = pass.layer.gamma == nullptr ? 1 : pass.layer.gamma[o];
    offset.mutable_data_ptr<float>()[o] = static_cast<float>(gamma * inverse * grad_beta.const_data_ptr<float>()[o] / count);
    slope.mutable_data_ptr<float>()[o] = static_cast<float>(gamma * inverse * inverse * inverse * of_gamma / count);
    of_gamma = static_cast<float>(inverse * of_gamma);
  }
  pass.offset = offset.const_data_ptr<float>();
  pass.slope = slope.const_data_ptr<float>();
  if (to_input || to_weight) DDFAST_RUN(backward(pass));
  return {grad_input, grad_weight, grad_gamma, grad_beta};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ddfast_native, library) {
  library.def(
      "convnet_block(Tensor input, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float eps, "
      "bool keep) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "convnet_block_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? bias, Tensor? norm_weight, "
      "Tensor? norm_bias, Tensor mean, Tensor rstd, Tensor conv, float eps, bool to_input, bool to_weight) -> (Tensor, Tensor, "
      "Tensor, Tensor)");
  library.def(
      "convnet_block_batch_norm(Tensor input, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float eps) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "convnet_block_batch_norm_eval(Tensor input, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
      "Tensor mean, Tensor variance, float eps) -> Tensor");
  library.def(
      "convnet_block_batch_norm_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? bias, Tensor? norm_weight, "
      "Tensor? norm_bias, Tensor mean, Tensor variance, Tensor conv, float eps, bool to_input, bool to_weight) -> (Tensor, "
      "Tensor, Tensor, Tensor)");
  library.def("convnet_block_lanes() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(ddfast_native, CPU, library) {
  library.impl("convnet_block", TORCH_BOX(&convnet_block));
  library.impl("convnet_block_backward", TORCH_BOX(&convnet_block_backward));
  library.impl("convnet_block_batch_norm", TORCH_BOX(&convnet_block_batch_norm));
  library.impl("convnet_block_batch_norm_eval", TORCH_BOX(&convnet_block_batch_norm_eval));
  library.impl("convnet_block_batch_norm_backward", TORCH_BOX(&convnet_block_batch_norm_backward));
}

STABLE_TORCH_LIBRARY_IMPL(ddfast_native, CompositeExplicitAutograd, library) {
  library.impl("convnet_block_lanes", TORCH_BOX(&convnet_block_lanes));
}
