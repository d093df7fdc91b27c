// grad_sq_norm_*: squared norms of per-sample parameter gradients (defined in ddfast/ops/reference.py).
//
// A thread takes one sample at a time. Its weight gradient G^T X (T positions, I inputs, O outputs; for a convolution X
// holds one row of unfolded pixels a position, I = taps * channels) is never whole. The cheapest of three is taken:
//
//   direct     tiles of it are made, squared, added up and dropped: T I O multiplications.
//   positions  ||G^T X||^2 = <X X^T, G G^T>, two symmetric T x T matrices: T^2 (I + O) / 2.
//   pixels     X X^T at positions t and s is the sum over the kernel's taps of the inner product of the two pixels that
//              the tap sees. So the Gram matrix of the pixels, each taken once, replaces that of the unfolded rows, and
//              the taps cost an addition each: P^2 C / 2 + T^2 (O / 2 + taps) for P pixels of C channels.
//
// There are two bodies. On a CPU with AVX-512, float32 and bfloat16 (widened where the CPU multiplies no bfloat16) take the
// products of avx512_products.h, which unfold nothing: a position's row is read where it lies in the channels-last image. Elsewhere,
// and for float64, torch's matrix products multiply unfolded tiles. Products are summed in the dtype of the result,
// squares in double. A sample's bytes do not depend on its batch, nor, with the former, on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <numeric>
#include <type_traits>
#include <vector>

#include "avx512_products.h"
#include "clones.h"
#include "layout.h"

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
[[gnu::always_inline]] inline double dot_in_lanes(const Sum* a, const Sum* b, int64_t count) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int64_t lane = 0; lane < 8; ++lane) {
      lanes[lane] += static_cast<double>(a[i + lane]) * static_cast<double>(b[i + lane]);
    }
  }
  for (; i < count; ++i) lanes[0] += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return std::accumulate(lanes, lanes + 8, 0.0);
}

DDFAST_CLONES double dot(const float* a, const float* b, int64_t count) { return dot_in_lanes(a, b, count); }

DDFAST_CLONES double dot(const double* a, const double* b, int64_t count) { return dot_in_lanes(a, b, count); }

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

Tensor rows(Tensor matrix, int64_t dim, int64_t begin, int64_t end) {
  return torch::stable::narrow(matrix, dim, begin, end - begin);
}

Tensor transposed(const Tensor& matrices) {
  return torch::stable::transpose(matrices, -2, -1);
}

enum class Form { kDirect, kPositions, kPixels };

struct Convolution {
  int64_t channels, height, width;  // of the input
  int64_t out_channels, out_height, out_width;
  std::array<int64_t, 2> kernel, stride, padding, dilation;
  int64_t groups;

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t pixels() const { return height * width; }
  int64_t positions() const { return out_height * out_width; }
  int64_t group_channels() const { return channels / groups; }
  int64_t group_outputs() const { return out_channels / groups; }
  int64_t group_inputs() const { return group_channels() * taps(); }
  bool padded() const { return padding[0] > 0 || padding[1] > 0; }

  // The form with the fewest multiplications whose matrices fit a tile. The taps' additions read what the products
  // before them have left in memory: each costs as much as `tap_cost` multiplications.
  Form form(double tap_cost = 1) const {
    const double t = positions(), p = pixels(), inputs = group_inputs(), outputs = group_outputs();
    const double direct = t * inputs * outputs;
    const double by_position = t * t * (inputs + outputs) / 2;
    const double by_pixel = (p * p * group_channels() + t * t * outputs) / 2 + t * t * taps() * tap_cost;
    if (p * p <= kTileElements && by_pixel < std::min(direct, by_position) && taps() > 1) return Form::kPixels;
    return t * t <= kTileElements && by_position < direct ? Form::kPositions : Form::kDirect;
  }

  // The outputs begin..end - 1 along a dimension (0 vertical, 1 horizontal) for which a tap sees a pixel of the image.
  std::array<int64_t, 2> seen(int64_t dim, int64_t tap) const {
    const int64_t size = dim == 0 ? height : width, outputs = dim == 0 ? out_height : out_width;
    const int64_t begin = std::clamp<int64_t>(ceil_div(-shift(dim, tap), stride[dim]), 0, outputs);
    return {begin, std::clamp<int64_t>(ceil_div(size - shift(dim, tap), stride[dim]), begin, outputs)};
  }

  // What a tap sees at output 0.
  int64_t shift(int64_t dim, int64_t tap) const { return tap * dilation[dim] - padding[dim]; }

  // columns [(channels begin..end) * taps, positions]: what each position sees, zero outside the image.
  template <typename Sum>
  void unfold(const Sum* image, int64_t begin, int64_t end, Sum* columns) const {
    for (int64_t channel = begin; channel < end; ++channel) {
      for (int64_t tap = 0; tap < taps(); ++tap) {
        const auto [first_row, last_row] = seen(0, tap / kernel[1]);
        const auto [first, last] = seen(1, tap % kernel[1]);
        for (int64_t i = 0; i < out_height; ++i, columns += out_width) {
          if (i < first_row || i >= last_row) {
            std::fill(columns, columns + out_width, Sum(0));
            continue;
          }
          const int64_t y = i * stride[0] + shift(0, tap / kernel[1]);
          const Sum* row = image + (channel * height + y) * width;
          std::fill(columns, columns + first, Sum(0));
          for (int64_t j = first; j < last; ++j) columns[j] = row[j * stride[1] + shift(1, tap % kernel[1])];
          std::fill(columns + last, columns + out_width, Sum(0));
        }
      }
    }
  }

 private:
  static int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }
};

// The sum over rows and columns begin..end - 1 of left * right, but in the first row from column `first` on. A row's
// columns are `step` apart in left, one apart in right.
template <typename Sum>
double rows_dot(
    const Sum* left, int64_t left_stride, int64_t step, const Sum* right, int64_t right_stride, int64_t row_count,
    int64_t first, int64_t columns) {
  double sum = 0;
  for (int64_t i = 0; i < row_count; ++i, left += left_stride, right += right_stride) {
    for (int64_t k = i == 0 ? first : 0; k < columns; ++k) {
      sum += static_cast<double>(left[k * step]) * static_cast<double>(right[k]);
    }
  }
  return sum;
}

// <X X^T, G G^T> from the upper triangles of the Gram matrices of the pixels [P, P] and of the gradients [T, T]:
// for every tap, the sum over the pairs of positions for which it sees two pixels.
template <typename Sum, typename RowsDot>
double taps_dot(const Convolution& conv, const Sum* pixels_gram, const Sum* grads_gram, const RowsDot& rows_dot) {
  const int64_t pixels = conv.pixels(), positions = conv.positions();
  const int64_t down = conv.stride[0] * conv.width, across = conv.stride[1];
  double total = 0;
  for (int64_t tap = 0; tap < conv.taps(); ++tap) {
    const int64_t ky = tap / conv.kernel[1], kx = tap % conv.kernel[1];
    const auto [top, bottom] = conv.seen(0, ky);
    const auto [begin, end] = conv.seen(1, kx);
    for (int64_t i = top; i < bottom; ++i) {
      // Row i begins, for this tap, at this pixel and position.
      const int64_t pixel = (i * conv.stride[0] + conv.shift(0, ky)) * conv.width + begin * across + conv.shift(1, kx);
      const int64_t position = i * conv.out_width + begin;
      for (int64_t j = 0; j < end - begin; ++j) {
        const Sum* seen = pixels_gram + (pixel + j * across) * pixels;
        const Sum* grads = grads_gram + (position + j) * positions;
        const double itself =
            static_cast<double>(seen[pixel + j * across]) * static_cast<double>(grads[position + j]);
        total += 2 * rows_dot(
                         seen + pixel, down, across, grads + position, conv.out_width, bottom - i, j, end - begin) -
                 itself;
      }
    }
  }
  return total;
}

// --- with torch's matrix products

bool gram_is_cheaper(int64_t positions, int64_t inputs, int64_t outputs) {
  return positions * (inputs + outputs) < inputs * outputs;
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
double positions_sq_norm(const Convolution& conv, const Tensor& image, const Tensor& grads) {
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

// The same from the Gram matrix of the pixels.
template <typename Sum>
double pixels_sq_norm(const Convolution& conv, const Tensor& image, const Tensor& grads) {
  const Tensor pixels = torch::stable::view(image, {conv.groups, conv.group_channels(), conv.pixels()});
  double norm = 0;
  for (int64_t group = 0; group < conv.groups; ++group) {
    const Tensor x = torch::stable::select(pixels, 0, group), g = torch::stable::select(grads, 0, group);
    const Tensor pixels_gram = torch::stable::matmul(transposed(x), x);
    const Tensor grads_gram = torch::stable::matmul(transposed(g), g);
    norm += taps_dot(
        conv, pixels_gram.const_data_ptr<Sum>(), grads_gram.const_data_ptr<Sum>(), rows_dot<Sum>);
  }
  return norm;
}

// Squared norm of the bias's gradient: of the sums over positions of grads, outputs `output_stride` apart.
template <typename Sum>
double bias_sq_norm(
    const Sum* grads, int64_t outputs, int64_t output_stride, int64_t positions, int64_t position_stride) {
  double norm = 0;
  for (int64_t o = 0; o < outputs; ++o) {
    const double sum = total(grads + o * output_stride, positions, position_stride);
    norm += sum * sum;
  }
  return norm;
}

#if DDFAST_HAS_AVX512
// --- with the products of avx512_products.h

namespace avx512 = ddfast::avx512;
using avx512::Pair;

// One convolution for samples of float (Word float) or bfloat16 (Word Pair), each channels-last [H, W, C] or planar
// [C, H, W].
//
// The direct form multiplies runs: words that lie side by side in a row of the channels-last image, so they are one or
// more features of the unfolded row. One operand's run is read into registers, the other's broadcast word by word;
// bfloat16 pairs are those of two neighbouring positions. The Gram forms want the terms of their sums, the channels, as
// rows, which is how planes lie; bfloat16 pairs are those of two neighbouring channels.
template <typename Word>
class WideConvolution {
 public:
  using Element = std::conditional_t<std::is_same_v<Word, float>, float, uint16_t>;
  static constexpr int64_t kTerms = sizeof(Word) / sizeof(Element);
  // Measured on an AMD EPYC with AVX-512 BF16, one thread, layers of 32 to 256 channels of 14 to 32 px: the time of the
  // pixels' form is that of its products, at the direct form's rate, and 0.17 ns (0.15 in bfloat16) an addition. So 128
  // channels of 28 px take 1.22 ms an image in bfloat16 by the direct form in place of 1.65, 96 channels 0.68 for 1.37.
  static constexpr double kTapCost = 8.0 * kTerms;

  WideConvolution(const Convolution& conv, bool image_planar, bool grads_planar)
      : conv_(conv), form_(conv.form(kTapCost)), image_planar_(image_planar), grads_planar_(grads_planar) {
    height_ = conv.height + 2 * conv.padding[0];
    width_ = conv.width + 2 * conv.padding[1];
    depthwise_ = conv.group_channels() == 1 && conv.group_outputs() == 1 && kTerms == 1;
    if (depthwise_) form_ = Form::kDirect;
    steps_ = (conv.out_width + kTerms - 1) / kTerms;
    // A kernel's row is one run, but not where channels are multiplied one by one: each tap has sums of its own then.
    if (conv.groups == 1 && conv.dilation[1] == 1 && !depthwise_) {
      for (int64_t ky = 0; ky < conv.kernel[0]; ++ky) {
        runs_.push_back({ky * conv.dilation[0] * width_ * conv.channels, conv.kernel[1] * conv.channels});
      }
    } else {
      for (int64_t tap = 0; tap < conv.taps(); ++tap) {
        const int64_t row = tap / conv.kernel[1] * conv.dilation[0], column = tap % conv.kernel[1] * conv.dilation[1];
        runs_.push_back({(row * width_ + column) * conv.channels, conv.group_channels()});
      }
    }
    grad_runs_ = {{0, conv.group_outputs()}};
  }

  // Whether pairs of channels, where the form wants them, are whole.
  bool serves() const {
    return form_ == Form::kDirect || (conv_.group_channels() % kTerms == 0 && conv_.group_outputs() % kTerms == 0);
  }

  // Floats of scratch memory that `sq_norm` uses.
  int64_t scratch() const {
    const int64_t image = height_ * width_ * conv_.channels, positions = conv_.positions();
    const int64_t grads = conv_.out_height * steps_ * kTerms * conv_.out_channels;
    int64_t floats = 8 * 16;  // what `carve` skips
    if (form_ == Form::kDirect) {
      const int64_t columns = std::max(conv_.group_inputs(), conv_.group_outputs());
      floats += 2 * image + 2 * grads + std::max(columns * avx512::kChunk, conv_.channels);
    } else {
      const bool by_pixel = form_ == Form::kPixels;
      const int64_t seen = by_pixel ? conv_.pixels() : positions;
      const int64_t terms = by_pixel ? conv_.group_channels() : conv_.group_inputs();
      floats += by_pixel ? 0 : image;
      floats += terms * seen + conv_.group_outputs() * positions + seen * seen + positions * positions;
    }
    return floats;
  }

  // Squared norm of the weight's gradient on one sample.
  double sq_norm(const Element* image, const Element* grads, float* scratch) const {
    return form_ == Form::kDirect ? direct(image, grads, scratch) : by_gram(image, grads, scratch);
  }

 private:
  struct Run {
    int64_t offset, length;
  };

  static constexpr int64_t kBlockWords = 1 << 15;  // of both operands that are multiplied before the sums are stored

  double direct(const Element* image, const Element* grads, float* scratch) const {
    image = padded(image, scratch);
    if (grads_planar_) {
      Element* rows = carve<Element>(scratch, conv_.positions() * conv_.out_channels);
      avx512::transpose(grads, conv_.positions(), rows, conv_.out_channels, conv_.out_channels, conv_.positions());
      grads = rows;
    }
    const Word *pixels, *grad_words;
    if constexpr (kTerms == 1) {
      pixels = image;
      grad_words = grads;
    } else {
      pixels = pixel_pairs(image, scratch);
      grad_words = grad_pairs(grads, scratch);
    }
    const avx512::Rows<Word> x{
        pixels, conv_.stride[0] * width_ * conv_.channels, kTerms * conv_.stride[1] * conv_.channels};
    const avx512::Rows<Word> g{grad_words, steps_ * conv_.out_channels, conv_.out_channels};
    double norm = 0;
    if constexpr (kTerms == 1) {
      if (depthwise_) {
        for (const Run& run : runs_) {
          avx512::update_elementwise(
              x.at(0, 0, run.offset), g, conv_.out_height, steps_, conv_.channels, scratch);
          norm += avx512::squares(scratch, 1, conv_.channels, 0);
        }
        return norm;
      }
    }
    const bool outputs_in_lanes = filled(grad_runs_) > filled(runs_);
    for (int64_t group = 0; group < conv_.groups; ++group) {
      const auto image_rows = x.at(0, 0, group * conv_.group_channels());
      const auto grad_rows = g.at(0, 0, group * conv_.group_outputs());
      norm += outputs_in_lanes ? product(image_rows, runs_, grad_rows, grad_runs_, scratch)
                               : product(grad_rows, grad_runs_, image_rows, runs_, scratch);
    }
    return norm;
  }

  // Squared norm of A^T B. A's columns are broadcast, B's lie in registers.
  double product(
      const avx512::Rows<Word>& a, const std::vector<Run>& a_runs, const avx512::Rows<Word>& b,
      const std::vector<Run>& b_runs, float* buffer) const {
    int64_t columns = 0;
    for (const Run& run : a_runs) columns += run.length;
    const int64_t terms = std::max<int64_t>(16, kBlockWords / (columns + avx512::kChunk));  // of a block
    const int64_t inner = std::min(steps_, terms), outer = std::max<int64_t>(1, terms / steps_);
    double norm = 0;
    for (const Run& b_run : b_runs) {
      for (int64_t n = 0; n < b_run.length; n += avx512::kChunk) {
        const int64_t width = std::min(avx512::kChunk, b_run.length - n);
        for (int64_t i = 0; i < conv_.out_height; i += outer) {
          for (int64_t j = 0; j < steps_; j += inner) {
            const auto right = b.at(i, j, b_run.offset + n);
            float* tile = buffer;
            for (const Run& a_run : a_runs) {
              avx512::for_each_panel(a_run.length, [&](int64_t m, int64_t panel) {
                avx512::update_of<Word>(panel, width)(
                    a.at(i, j, a_run.offset + m), right, std::min(outer, conv_.out_height - i),
                    std::min(inner, steps_ - j), width, tile, avx512::kChunk, i + j > 0);
                tile += panel * avx512::kChunk;
              });
            }
          }
        }
        norm += avx512::squares(buffer, columns, width, avx512::kChunk);
      }
    }
    return norm;
  }

  double by_gram(const Element* image, const Element* grads, float* scratch) const {
    const int64_t positions = conv_.positions(), channels = conv_.group_channels() / kTerms;
    const int64_t outputs = conv_.group_outputs() / kTerms;
    const bool by_pixel = form_ == Form::kPixels;
    const int64_t seen = by_pixel ? conv_.pixels() : positions, terms = by_pixel ? channels : channels * conv_.taps();
    Convolution geometry = conv_;
    if (!by_pixel) {  // a position is a pixel that no other position sees
      geometry.height = conv_.out_height;
      geometry.width = conv_.out_width;
      geometry.kernel = geometry.stride = {1, 1};
      geometry.padding = {0, 0};
      image = padded(image, scratch);
    }
    Word* x_buffer = carve<Word>(scratch, terms * seen);
    Word* g_buffer = carve<Word>(scratch, outputs * positions);
    float* x_gram = carve<float>(scratch, seen * seen);
    float* g_gram = carve<float>(scratch, positions * positions);
    double norm = 0;
    for (int64_t group = 0; group < conv_.groups; ++group) {
      const Word* x = x_buffer;
      if (by_pixel) {
        x = channel_words(image, image_planar_, conv_.channels, seen, group * channels, channels, x_buffer);
      } else {
        const Element* slice = image + group * conv_.group_channels();
        for (int64_t tap = 0; tap < conv_.taps(); ++tap) {
          const int64_t row = tap / conv_.kernel[1] * conv_.dilation[0];
          const int64_t column = tap % conv_.kernel[1] * conv_.dilation[1];
          for (int64_t i = 0; i < conv_.out_height; ++i) {
            transpose_words(
                slice + ((row + i * conv_.stride[0]) * width_ + column) * conv_.channels,
                conv_.stride[1] * conv_.channels, x_buffer + tap * channels * seen + i * conv_.out_width, seen,
                conv_.out_width, channels);
          }
        }
      }
      const Word* g =
          channel_words(grads, grads_planar_, conv_.out_channels, positions, group * outputs, outputs, g_buffer);
      avx512::gram(x, terms, seen, x_gram);
      avx512::gram(g, outputs, positions, g_gram);
      norm += taps_dot(geometry, x_gram, g_gram, wide_rows_dot);
    }
    return norm;
  }

  static double wide_rows_dot(
      const float* left, int64_t left_stride, int64_t step, const float* right, int64_t right_stride,
      int64_t row_count, int64_t first, int64_t columns) {
    if (step != 1) return rows_dot(left, left_stride, step, right, right_stride, row_count, first, columns);
    return avx512::rows_dot(left, left_stride, right, right_stride, row_count, first, columns);
  }

  // Words [columns, rows] of elements [rows, columns * kTerms].
  static void transpose_words(
      const Element* from, int64_t from_stride, Word* to, int64_t to_stride, int64_t rows, int64_t columns) {
    avx512::transpose(
        reinterpret_cast<const Word*>(from), from_stride / kTerms, to, to_stride, rows, columns);
  }

  // Words [count, positions] of the channels from kTerms * first on: planes, or pairs of planes side by side.
  static const Word* channel_words(
      const Element* elements, bool planar, int64_t channels, int64_t positions, int64_t first, int64_t count,
      Word* buffer) {
    if (!planar) {
      transpose_words(elements + first * kTerms, channels, buffer, positions, positions, count);
      return buffer;
    }
    elements += first * kTerms * positions;
    if constexpr (kTerms == 1) {
      return elements;
    } else {
      for (int64_t c = 0; c < count; ++c, elements += 2 * positions) {
        avx512::interleave(elements, elements + positions, buffer + c * positions, positions);
      }
      return buffer;
    }
  }

  // The channels-last image with zeros around it, in scratch memory; itself where it is that already.
  const Element* padded(const Element* image, float*& scratch) const {
    if (!conv_.padded() && !image_planar_) return image;
    const int64_t row = conv_.width * conv_.channels, padded_row = width_ * conv_.channels;
    Element* buffer = carve<Element>(scratch, height_ * padded_row);
    if (conv_.padded()) std::fill_n(buffer, height_ * padded_row, Element(0));
    Element* to = buffer + conv_.padding[0] * padded_row + conv_.padding[1] * conv_.channels;
    for (int64_t y = 0; y < conv_.height; ++y, to += padded_row) {
      if (image_planar_) {
        avx512::transpose(
            image + y * conv_.width, conv_.pixels(), to, conv_.channels, conv_.channels, conv_.width);
      } else {
        std::copy_n(image + y * row, row, to);
      }
    }
    return buffer;
  }

  // The padded image in pairs: each pixel beside the one that the next position sees through the same tap.
  const Pair* pixel_pairs(const uint16_t* padded, float*& scratch) const {
    const int64_t count = height_ * width_ * conv_.channels;
    const int64_t next = std::min(conv_.stride[1] * conv_.channels, count);
    Pair* pairs = carve<Pair>(scratch, count);
    avx512::interleave(padded, padded + next, pairs, count - next);
    avx512::interleave(padded + count - next, nullptr, pairs + count - next, next);
    return pairs;
  }

  // The gradient in pairs of neighbouring positions of a row, the last beside zeros where they are odd.
  const Pair* grad_pairs(const uint16_t* grads, float*& scratch) const {
    Pair* pairs = carve<Pair>(scratch, conv_.out_height * steps_ * conv_.out_channels);
    Pair* to = pairs;
    for (int64_t i = 0; i < conv_.out_height; ++i) {
      for (int64_t j = 0; j < conv_.out_width; j += 2, to += conv_.out_channels) {
        const uint16_t* from = grads + (i * conv_.out_width + j) * conv_.out_channels;
        const uint16_t* next = j + 1 < conv_.out_width ? from + conv_.out_channels : nullptr;
        avx512::interleave(from, next, to, conv_.out_channels);
      }
    }
    return pairs;
  }

  // Share of the registers' lanes that runs fill.
  static double filled(const std::vector<Run>& runs) {
    double used = 0, lanes = 0;
    for (const Run& run : runs) {
      used += run.length;
      lanes += (run.length + avx512::kLanes - 1) / avx512::kLanes * avx512::kLanes;
    }
    return used / lanes;
  }

  // The next `count` elements of the scratch memory, from a multiple of 64 bytes on.
  template <typename T>
  static T* carve(float*& scratch, int64_t count) {
    T* taken = reinterpret_cast<T*>(scratch);
    scratch += (count * sizeof(T) + 63) / 64 * 16;
    return taken;
  }

  Convolution conv_;
  Form form_;
  bool image_planar_, grads_planar_, depthwise_;
  int64_t height_, width_;  // of the padded image
  int64_t steps_;           // of kTerms positions, in a row of the output
  std::vector<Run> runs_, grad_runs_;
};

// Squared norm of the bias's gradient: of the sums over the positions of grads [positions, outputs], or, planar,
// [outputs, positions].
template <typename Element>
double sum_sq_norm(const Element* grads, int64_t positions, int64_t outputs, bool planar) {
  const auto value = [](Element element) {
    if constexpr (std::is_same_v<Element, float>) {
      return static_cast<double>(element);
    } else {
      return static_cast<double>(std::bit_cast<float>(static_cast<uint32_t>(element) << 16));
    }
  };
  std::vector<double> sums(outputs);
  if (planar) {
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t t = 0; t < positions; ++t) sums[o] += value(grads[o * positions + t]);
    }
  } else {
    for (int64_t t = 0; t < positions; ++t) {
      for (int64_t o = 0; o < outputs; ++o) sums[o] += value(grads[t * outputs + o]);
    }
  }
  return dot(sums.data(), sums.data(), outputs);
}

template <typename Word>
void wide_sq_norms(
    const WideConvolution<Word>& wide, const Convolution& conv, bool grads_planar, const Tensor& input,
    const Tensor& grad_output, bool bias, Tensor& norms) {
  using Element = typename WideConvolution<Word>::Element;
  const int64_t image = conv.pixels() * conv.channels, grad = conv.positions() * conv.out_channels;
  const auto* images = static_cast<const Element*>(input.const_data_ptr());
  const auto* grads = static_cast<const Element*>(grad_output.const_data_ptr());
  float* result = norms.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, norms.numel(), /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    Tensor scratch = torch::stable::new_empty(grad_output, {wide.scratch()}, ScalarType::Float);
    for (int64_t b = begin; b < end; ++b) {
      double norm = wide.sq_norm(images + b * image, grads + b * grad, scratch.mutable_data_ptr<float>());
      if (bias) norm += sum_sq_norm(grads + b * grad, conv.positions(), conv.out_channels, grads_planar);
      result[b] = static_cast<float>(norm);
    }
  });
}

// Fills the norms and returns true where this CPU and the dtype allow it. Not for empty samples.
bool wide_sq_norms(const Convolution& conv, Tensor input, Tensor grad_output, bool bias, Tensor& norms) {
  if (!avx512::supported() || grad_output.scalar_type() == ScalarType::Double) return false;
  // [B, C, H, W] is taken channels-last or planar; [B, positions, C] is the former.
  const bool last = input.dim() != 4;
  const bool image_planar = !last && !ddfast::channels_last(input), grads_planar = !last && !ddfast::channels_last(grad_output);
  if (last || image_planar) input = torch::stable::contiguous(input);
  if (last || grads_planar) grad_output = torch::stable::contiguous(grad_output);
  const WideConvolution<Pair> pairs(conv, image_planar, grads_planar);
  if (grad_output.scalar_type() == ScalarType::BFloat16 && avx512::multiplies_bfloat16() && pairs.serves()) {
    wide_sq_norms(pairs, conv, grads_planar, input, grad_output, bias, norms);
    return true;
  }
  if (grad_output.scalar_type() != ScalarType::Float) {
    input = torch::stable::to(input, ScalarType::Float);
    grad_output = torch::stable::to(grad_output, ScalarType::Float);
  }
  const WideConvolution<float> floats(conv, image_planar, grads_planar);
  wide_sq_norms(floats, conv, grads_planar, input, grad_output, bias, norms);
  return true;
}
#else
bool wide_sq_norms(const Convolution&, const Tensor&, const Tensor&, bool, Tensor&) {
  return false;
}
#endif

Tensor grad_sq_norm_linear(const Tensor& input, const Tensor& grad_output, bool bias) {
  const int64_t inputs = input.size(-1), outputs = grad_output.size(-1);
  const int64_t samples = grad_output.size(0);
  const int64_t positions = outputs * samples == 0 ? 0 : grad_output.numel() / (samples * outputs);
  return per_sample(grad_output, [&]<typename Sum>(std::type_identity<Sum>, ScalarType dtype, Tensor& norms) {
    if (positions > 1 && inputs > 0) {  // the convolution of a row of pixels with kernels of one pixel
      const Convolution conv{inputs, 1, positions, outputs, 1, positions, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 1};
      const bool striped = conv.form() == Form::kDirect && gram_is_cheaper(positions, inputs, outputs);
      // Of four dimensions they would be taken for [B, C, H, W].
      const auto as_rows = [&](const Tensor& rows, int64_t width) {
        return torch::stable::view(torch::stable::contiguous(rows), {samples, positions, width});
      };
      if (!striped && wide_sq_norms(conv, as_rows(input, inputs), as_rows(grad_output, outputs), bias, norms)) return;
    }
    for_each_sample<Sum>(samples, norms, [&](int64_t b) -> double {
      if (positions == 0) return 0;
      const Tensor x = torch::stable::view(sample(input, b, dtype), {positions, inputs});
      const Tensor g = torch::stable::view(sample(grad_output, b, dtype), {positions, outputs});
      double norm = inputs == 0 ? 0 : product_sq_norm<Sum>(x, g);
      if (bias) norm += bias_sq_norm(g.const_data_ptr<Sum>(), outputs, 1, positions, outputs);
      return norm;
    });
  });
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
  const bool weightless = conv.channels == 0 || conv.out_channels == 0 || conv.positions() == 0;
  return per_sample(grad_output, [&]<typename Sum>(std::type_identity<Sum>, ScalarType dtype, Tensor& norms) {
    if (!weightless && wide_sq_norms(conv, input, grad_output, bias, norms)) return;
    const Form form = conv.form();
    for_each_sample<Sum>(grad_output.size(0), norms, [&](int64_t b) -> double {
      if (weightless) return 0;
      const Tensor image = sample(input, b, dtype);
      const Tensor grads =
          torch::stable::view(sample(grad_output, b, dtype), {groups, conv.group_outputs(), conv.positions()});
      double norm = form == Form::kPixels      ? pixels_sq_norm<Sum>(conv, image, grads)
                    : form == Form::kPositions ? positions_sq_norm<Sum>(conv, image, grads)
                                               : direct_sq_norm<Sum>(conv, image, grads);
      if (bias) norm += bias_sq_norm(grads.const_data_ptr<Sum>(), conv.out_channels, conv.positions(), conv.positions(), 1);
      return norm;
    });
  });
}

// Adds to weight[p] the sum of x * g, and to bias[p] that of g, of samples x and g [outer, parameters, inner].
template <typename Sum>
[[gnu::always_inline]] inline void affine_gradients(
    const Sum* x, const Sum* g, int64_t outer, int64_t parameters, int64_t inner, double* weight, double* bias) {
  constexpr int64_t kLanes = 16;
  for (int64_t i = 0; i < outer && inner == 1; ++i, x += parameters, g += parameters) {
    for (int64_t p = 0; p < parameters; ++p) {
      weight[p] += static_cast<double>(x[p]) * static_cast<double>(g[p]);
      bias[p] += static_cast<double>(g[p]);
    }
  }
  for (int64_t row = 0; row < outer * parameters && inner != 1; ++row, x += inner, g += inner) {
    double products[kLanes] = {}, grads[kLanes] = {};
    int64_t k = 0;
    for (; k + kLanes <= inner; k += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        products[lane] += static_cast<double>(x[k + lane]) * static_cast<double>(g[k + lane]);
        grads[lane] += static_cast<double>(g[k + lane]);
      }
    }
    for (int64_t lane = 0; k < inner; ++k, ++lane) {
      products[lane] += static_cast<double>(x[k]) * static_cast<double>(g[k]);
      grads[lane] += static_cast<double>(g[k]);
    }
    weight[row % parameters] += std::accumulate(products, products + kLanes, 0.0);
    bias[row % parameters] += std::accumulate(grads, grads + kLanes, 0.0);
  }
}

DDFAST_CLONES void add_affine_gradients_in_double(
    const float* x, const float* g, int64_t outer, int64_t parameters, int64_t inner, double* weight, double* bias) {
  affine_gradients(x, g, outer, parameters, inner, weight, bias);
}

void add_affine_gradients(
    const float* x, const float* g, int64_t outer, int64_t parameters, int64_t inner, double* weight, double* bias) {
#if DDFAST_HAS_AVX512
  if (avx512::supported() && inner != 1) {  // the sums of normalization_backward, of what is normalised already
    constexpr std::array<float, 5> kNormalized{0, 1, 0, 0, 0};
    for (int64_t row = 0; row < outer * parameters; ++row, x += inner, g += inner) {
      std::array<double, 2> sums{};
      avx512::normalize_plane<false>(x, g, static_cast<float*>(nullptr), inner, kNormalized.data(), sums.data());
      bias[row % parameters] += sums[0];
      weight[row % parameters] += sums[1];
    }
    return;
  }
#endif
  add_affine_gradients_in_double(x, g, outer, parameters, inner, weight, bias);
}

DDFAST_CLONES void add_affine_gradients(
    const double* x, const double* g, int64_t outer, int64_t parameters, int64_t inner, double* weight, double* bias) {
  affine_gradients(x, g, outer, parameters, inner, weight, bias);
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
      add_affine_gradients(values, grads, outer, parameters, inner, weight_grad.data(), bias_grad.data());
      if (!weight) std::fill(weight_grad.begin(), weight_grad.end(), 0.0);
      if (!bias) std::fill(bias_grad.begin(), bias_grad.end(), 0.0);
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
