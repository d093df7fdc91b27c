// siamese_augment and its adjoint: mirror, colour, shift, warp and cut (defined in ddfast/ops/reference_augment.py).
//
// An image goes through the steps that its row of parameters names, one after another, in buffers that stay in the
// first caches; steps that the row leaves out cost nothing. It is read once and written once. The warp takes four
// channels at a time, side by side in memory, from a frame of zeros around the image, so that a corner of a square of
// pixels is one load and nothing asks where the border is; where it reads, and with what weights, is computed once for
// all channels, and for all images in a row that share their parameters. Its adjoint adds the same weights into such a
// frame. An image is the work of one thread, so the number of threads changes no bit, and no clone of a loop changes
// one either.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "clones.h"
#include "dispatch.h"
#include "layout.h"

namespace {

using torch::stable::Tensor;

constexpr int64_t kColumns = 16;                // of a row of parameters
constexpr int64_t kNumbersPerTask = 32 * 1024;  // the least work worth handing to another thread
constexpr int64_t kLanes = 4;                   // channels that a warp takes at a time
constexpr int64_t kRows = 2;                    // that the adjoint of a warp goes along at once
constexpr int64_t kFew = 16;                    // numbers that a loop holds in registers
constexpr int64_t kBlock = 256;                 // numbers that are added up in their own type before they join a double

template <typename Element>
using Compute = std::conditional_t<std::is_same_v<Element, double>, double, float>;

struct Size {
  int64_t channels, height, width;

  int64_t area() const { return height * width; }
  int64_t numbers() const { return channels * area(); }
};

// What happens to an image, in this order; the linear part of it adds no brightness.
template <typename T>
struct Row {
  Row(const T* given, const Size& size, bool linear) {
    for (int64_t k = 0; k < kColumns; ++k) {
      const bool whole = k == 0 || k == 4 || k == 5 || k >= 12;
      STD_TORCH_CHECK(std::isfinite(given[k]) && (!whole || given[k] == std::trunc(given[k])),
                      "siamese_augment: a parameter is not finite, or not a whole number where it must be");
    }
    STD_TORCH_CHECK(given[0] == 0 || given[0] == 1, "siamese_augment: mirrored must be 0 or 1");
    mirrored = given[0] == 1;
    brightness = linear ? T(0) : given[1];
    saturation = given[2];
    contrast = given[3];
    down = within(given[4], -size.height, size.height);
    across = within(given[5], -size.width, size.width);
    std::copy(given + 6, given + 12, theta);
    top = within(given[12], 0, size.height);
    left = within(given[13], 0, size.width);
    bottom = within(given[14], top, size.height);
    right = within(given[15], left, size.width);
  }

  static int64_t within(T value, int64_t least, int64_t most) {
    return value <= static_cast<T>(least) ? least : value >= static_cast<T>(most) ? most : static_cast<int64_t>(value);
  }

  bool coloured() const { return brightness != 0 || saturation != 1 || contrast != 1; }
  bool shifted() const { return down != 0 || across != 0; }
  bool warped() const {
    return theta[0] != 1 || theta[1] != 0 || theta[2] != 0 || theta[3] != 0 || theta[4] != 1 || theta[5] != 0;
  }
  bool cut() const { return top < bottom && left < right; }

  bool mirrored;
  T brightness, saturation, contrast;
  int64_t down, across;
  T theta[6];
  int64_t top, left, bottom, right;
};

// The part of a line of `size` pixels that a shift fills: pixel k comes from pixel k + by.
struct Span {
  Span(int64_t size, int64_t by) : begin(std::max<int64_t>(0, -by)), end(std::max(begin, std::min(size, size - by))) {}
  int64_t begin, end;
};

// Mirror and shift
// ---------------------------------------------------------------------------------------------------------------------

template <typename T>
void mirror(const T* x, const Size& size, T* out) {
  const int64_t width = size.width;
  for (int64_t line = 0; line < size.channels * size.height; ++line, x += width, out += width) {
    for (int64_t k = 0; k < width; ++k) out[k] = x[width - 1 - k];
  }
}

// Pixel (i, j) comes from (i + down, j + across), and is zero where there is none.
template <typename T>
void shift(const T* x, const Size& size, int64_t down, int64_t across, T* out) {
  const Span rows(size.height, down), columns(size.width, across);
  const int64_t width = size.width;
  for (int64_t channel = 0; channel < size.channels; ++channel, x += size.area(), out += size.area()) {
    std::fill(out, out + rows.begin * width, T(0));
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      T* to = out + i * width;
      std::fill(to, to + columns.begin, T(0));
      if (columns.begin < columns.end) {
        std::copy_n(x + (i + down) * width + columns.begin + across, columns.end - columns.begin, to + columns.begin);
      }
      std::fill(to + columns.end, to + width, T(0));
    }
    std::fill(out + rows.end * width, out + size.area(), T(0));
  }
}

// Colour
// ---------------------------------------------------------------------------------------------------------------------

template <typename T>
inline double total_of(const T* x, int64_t count) {
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, count);
    T sums[kFew] = {};
    int64_t k = begin;
    for (; k + kFew <= end; k += kFew) {
      for (int64_t lane = 0; lane < kFew; ++lane) sums[lane] += x[k + lane];
    }
    for (; k < end; ++k) sums[0] += x[k];
    double sum = 0;
    for (int64_t lane = 0; lane < kFew; ++lane) sum += static_cast<double>(sums[lane]);
    total += sum;
  }
  return total;
}

// x + brightness; its distance from the mean of the channels times saturation; its distance from the mean of the image,
// which is that before the saturation, times contrast. Linear and symmetric but for the brightness.
template <typename T>
inline void colour_of(const T* x, const Size& size, T brightness, T saturation, T contrast, T* out) {
  const int64_t area = size.area();
  const T channels = static_cast<T>(size.channels);
  T mean = 0;
  if (contrast != 1) {
    mean = static_cast<T>(total_of(x, size.numbers()) / static_cast<double>(size.numbers()) +
                          static_cast<double>(brightness));
  }
  // A few neighbours at a time, whose grey stays in registers.
  const auto few = [&](int64_t begin, auto count) {
    T grey[kFew];
    for (int64_t k = 0; k < count; ++k) grey[k] = x[begin + k];
    for (int64_t channel = 1; channel < size.channels; ++channel) {
      for (int64_t k = 0; k < count; ++k) grey[k] += x[channel * area + begin + k];
    }
    for (int64_t k = 0; k < count; ++k) grey[k] = grey[k] / channels + brightness;
    for (int64_t channel = 0; channel < size.channels; ++channel) {
      const T* __restrict plane = x + channel * area + begin;
      T* __restrict to = out + channel * area + begin;
      for (int64_t k = 0; k < count; ++k) {
        const T value = grey[k] + (plane[k] + brightness - grey[k]) * saturation;
        to[k] = contrast == 1 ? value : mean + (value - mean) * contrast;
      }
    }
  };
  int64_t begin = 0;
  for (; begin + kFew <= area; begin += kFew) few(begin, std::integral_constant<int64_t, kFew>());
  few(begin, area - begin);
}

DDFAST_CLONES void colour(const float* x, const Size& size, float brightness, float saturation, float contrast,
                          float* out) {
  colour_of(x, size, brightness, saturation, contrast, out);
}

DDFAST_CLONES void colour(const double* x, const Size& size, double brightness, double saturation, double contrast,
                          double* out) {
  colour_of(x, size, brightness, saturation, contrast, out);
}

// Warp
// ---------------------------------------------------------------------------------------------------------------------

// Four channels of a pixel, wherever memory for numbers may lie.
template <typename T>
struct Pixel {
  typedef T Vector __attribute__((vector_size(kLanes * sizeof(T)), aligned(alignof(T))));
  Vector lanes;
};

// Four channels of an image in a frame of zeros: one pixel before each row and column, and two behind.
template <typename T>
struct Frame {
  int64_t pitch = 0;
  std::vector<Pixel<T>> pixels;

  void fit(const Size& size) {
    pitch = size.width + 3;
    pixels.assign((size.height + 3) * pitch, Pixel<T>{});
  }
  Pixel<T>* row(int64_t i) { return pixels.data() + (i + 1) * pitch + 1; }
};

// Where the output pixels of a warp read: the upper left one of four pixels in a frame, and how far right of and below
// it.
template <typename T>
struct Reads {
  std::vector<int32_t> at;
  std::vector<T> right, below;
  std::vector<T> from_centre;  // of the columns
};

// One row of them: where it reads in pixels, no further than where the frame is zero, taken apart into whole and share.
template <typename T>
inline void row_of_reads(const T* __restrict from_centre, int32_t count, T x_slope, T x_offset, T y_slope, T y_offset,
                         T wide, T high, int32_t pitch, int32_t* __restrict at, T* __restrict right,
                         T* __restrict below) {
  for (int32_t k = 0; k < count; ++k) {
    T x = x_slope * from_centre[k] + x_offset, y = y_slope * from_centre[k] + y_offset;
    x = x > T(-1) ? x : T(-1);
    y = y > T(-1) ? y : T(-1);
    x = x < wide ? x : wide;
    y = y < high ? y : high;
    const int32_t column = static_cast<int32_t>(x + 1), row = static_cast<int32_t>(y + 1);
    right[k] = x - static_cast<T>(column - 1);
    below[k] = y - static_cast<T>(row - 1);
    at[k] = row * pitch + column;
  }
}

template <typename T>
inline void reads_of(const T* theta, const Size& size, int64_t pitch, Reads<T>& reads) {
  const int64_t height = size.height, width = size.width;
  const T high = static_cast<T>(height), wide = static_cast<T>(width);
  reads.at.resize(size.area());
  reads.right.resize(size.area());
  reads.below.resize(size.area());
  reads.from_centre.resize(width);
  for (int64_t k = 0; k < width; ++k) reads.from_centre[k] = static_cast<T>(k) + T(0.5) - wide / 2;
  // theta speaks of positions from -1 to 1 along either side.
  const T xy = theta[1] * (wide / high), x0 = theta[2] * wide / 2 + (wide / 2 - T(0.5));
  const T yx = theta[3] * (high / wide), y0 = theta[5] * high / 2 + (high / 2 - T(0.5));
  for (int64_t i = 0; i < height; ++i) {
    const T down = static_cast<T>(i) + T(0.5) - high / 2;
    row_of_reads(reads.from_centre.data(), static_cast<int32_t>(width), theta[0], xy * down + x0, yx,
                 theta[4] * down + y0, wide, high, static_cast<int32_t>(pitch), reads.at.data() + i * width,
                 reads.right.data() + i * width, reads.below.data() + i * width);
  }
}

// A row of pixels between planes and frame.
template <typename T>
inline void into_lanes(const T* const* planes, int64_t count, Pixel<T>* to) {
  const T *__restrict a = planes[0], *__restrict b = planes[1], *__restrict c = planes[2], *__restrict d = planes[3];
  T* __restrict out = reinterpret_cast<T*>(to);
  for (int64_t k = 0; k < count; ++k) {
    out[4 * k] = a[k];
    out[4 * k + 1] = b[k];
    out[4 * k + 2] = c[k];
    out[4 * k + 3] = d[k];
  }
}

template <typename T>
inline void out_of_lanes(const Pixel<T>* from, int64_t count, T* const* planes) {
  T *__restrict a = planes[0], *__restrict b = planes[1], *__restrict c = planes[2], *__restrict d = planes[3];
  const T* __restrict in = reinterpret_cast<const T*>(from);
  for (int64_t k = 0; k < count; ++k) {
    a[k] = in[4 * k];
    b[k] = in[4 * k + 1];
    c[k] = in[4 * k + 2];
    d[k] = in[4 * k + 3];
  }
}

// Buffers of a warp; those of one thread.
template <typename T>
struct Warp {
  explicit Warp(const Size& size)
      : size(size), zeros(size.width), unused(kLanes * size.width), line(kRows * size.width) {
    frame.fit(size);
  }

  // Where a row begins in each of `four` channels; zeros in place of those that are not there.
  void row_of(const T* x, int64_t four, int64_t offset, const T** planes) const {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      planes[lane] = lane < four ? x + lane * size.area() + offset : zeros.data();
    }
  }

  // The same to write to; what belongs to no channel goes where nothing reads.
  void row_of(T* x, int64_t four, int64_t offset, T** planes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      planes[lane] = lane < four ? x + lane * size.area() + offset : unused.data() + lane * size.width;
    }
  }

  Size size;
  Frame<T> frame;
  Reads<T> reads;
  std::vector<T> zeros, unused;
  std::vector<Pixel<T>> line;
  const T* theta = nullptr;  // of `reads`
};

template <typename T>
inline void forward_of(Warp<T>& warp, const T* x, int64_t down, int64_t across, T* out) {
  const Size& size = warp.size;
  const int64_t width = size.width, area = size.area(), pitch = warp.frame.pitch;
  const Span rows(size.height, down), columns(width, across);
  for (int64_t first = 0; first < size.channels; first += kLanes, x += kLanes * area, out += kLanes * area) {
    const int64_t four = std::min(kLanes, size.channels - first);
    for (int64_t i = 0; i < size.height; ++i) {
      Pixel<T>* to = warp.frame.row(i);
      if (i < rows.begin || i >= rows.end) {
        std::fill(to, to + width, Pixel<T>{});
        continue;
      }
      const T* planes[kLanes];
      warp.row_of(x, four, (i + down) * width + columns.begin + across, planes);
      std::fill(to, to + columns.begin, Pixel<T>{});
      into_lanes(planes, columns.end - columns.begin, to + columns.begin);
      std::fill(to + columns.end, to + width, Pixel<T>{});
    }
    for (int64_t i = 0; i < size.height; ++i) {
      const int32_t* at = warp.reads.at.data() + i * width;
      const T *right = warp.reads.right.data() + i * width, *below = warp.reads.below.data() + i * width;
      for (int64_t k = 0; k < width; ++k) {
        const Pixel<T>*upper = warp.frame.pixels.data() + at[k], *lower = upper + pitch;
        const auto above = upper[0].lanes + (upper[1].lanes - upper[0].lanes) * right[k];
        const auto under = lower[0].lanes + (lower[1].lanes - lower[0].lanes) * right[k];
        warp.line[k].lanes = above + (under - above) * below[k];
      }
      T* planes[kLanes];
      warp.row_of(out, four, i * width, planes);
      out_of_lanes(warp.line.data(), width, planes);
    }
  }
}

template <typename T>
inline void backward_of(Warp<T>& warp, const T* grad, int64_t down, int64_t across, T* out) {
  const Size& size = warp.size;
  const int64_t width = size.width, area = size.area(), pitch = warp.frame.pitch;
  const Span rows(size.height, -down), columns(width, -across);
  for (int64_t first = 0; first < size.channels; first += kLanes, grad += kLanes * area, out += kLanes * area) {
    const int64_t four = std::min(kLanes, size.channels - first);
    std::fill(warp.frame.pixels.begin(), warp.frame.pixels.end(), Pixel<T>{});
    // Neighbours in a row add to the same pixels, one waiting for the other; rows far apart do not.
    const int64_t apart = (size.height + kRows - 1) / kRows;
    for (int64_t i = 0; i < apart; ++i) {
      int64_t count = 0;
      for (int64_t row = i; row < size.height; row += apart, ++count) {
        const T* planes[kLanes];
        warp.row_of(grad, four, row * width, planes);
        into_lanes(planes, width, warp.line.data() + count * width);
      }
      const auto add = [&](int64_t row, int64_t k) {
        const int64_t place = (i + row * apart) * width + k;
        const auto value = warp.line[row * width + k].lanes;
        const auto under = value * warp.reads.below[place], above = value - under;
        const auto above_right = above * warp.reads.right[place], under_right = under * warp.reads.right[place];
        Pixel<T>*upper = warp.frame.pixels.data() + warp.reads.at[place], *lower = upper + pitch;
        upper[0].lanes += above - above_right;
        upper[1].lanes += above_right;
        lower[0].lanes += under - under_right;
        lower[1].lanes += under_right;
      };
      if (count == kRows) {
        for (int64_t k = 0; k < width; ++k) {
          for (int64_t row = 0; row < kRows; ++row) add(row, k);
        }
      } else {
        for (int64_t row = 0; row < count; ++row) {
          for (int64_t k = 0; k < width; ++k) add(row, k);
        }
      }
    }
    for (int64_t i = 0; i < size.height; ++i) {
      T* to = out + i * width;
      const bool there = i >= rows.begin && i < rows.end;
      for (int64_t lane = 0; lane < four; ++lane) {
        T* plane = to + lane * area;
        std::fill(plane, plane + (there ? columns.begin : width), T(0));
        if (there) std::fill(plane + columns.end, plane + width, T(0));
      }
      if (there) {
        T* planes[kLanes];
        warp.row_of(out, four, i * width + columns.begin, planes);
        out_of_lanes(warp.frame.row(i - down) + columns.begin - across, columns.end - columns.begin, planes);
      }
    }
  }
}

DDFAST_CLONES void warp_reads(const float* theta, const Size& size, int64_t pitch, Reads<float>& reads) {
  reads_of(theta, size, pitch, reads);
}

DDFAST_CLONES void warp_reads(const double* theta, const Size& size, int64_t pitch, Reads<double>& reads) {
  reads_of(theta, size, pitch, reads);
}

DDFAST_CLONES void warp_forward(Warp<float>& warp, const float* x, int64_t down, int64_t across, float* out) {
  forward_of(warp, x, down, across, out);
}

DDFAST_CLONES void warp_forward(Warp<double>& warp, const double* x, int64_t down, int64_t across, double* out) {
  forward_of(warp, x, down, across, out);
}

DDFAST_CLONES void warp_backward(Warp<float>& warp, const float* grad, int64_t down, int64_t across, float* out) {
  backward_of(warp, grad, down, across, out);
}

DDFAST_CLONES void warp_backward(Warp<double>& warp, const double* grad, int64_t down, int64_t across, double* out) {
  backward_of(warp, grad, down, across, out);
}

// All of it
// ---------------------------------------------------------------------------------------------------------------------

// Takes an image [channels, height, width] through the steps of its row, or back through their adjoints.
template <typename T>
class Augmenter {
 public:
  explicit Augmenter(const Size& size) : size_(size) {}

  void forward(const T* x, const Row<T>& row, const T* parameters, T* out) {
    begin(x, out, row.mirrored + row.coloured() + (row.shifted() || row.warped()));
    if (row.mirrored) step([&](const T* from, T* to) { mirror(from, size_, to); });
    if (row.coloured()) {
      step([&](const T* from, T* to) { colour(from, size_, row.brightness, row.saturation, row.contrast, to); });
    }
    if (row.warped()) {
      step([&](const T* from, T* to) { warp_forward(warp(parameters), from, row.down, row.across, to); });
    } else if (row.shifted()) {
      step([&](const T* from, T* to) { shift(from, size_, row.down, row.across, to); });
    }
    if (at_ != out) std::copy_n(at_, size_.numbers(), out);
    if (row.cut()) cut(row, out);
  }

  void backward(const T* grad, const Row<T>& row, const T* parameters, T* out) {
    begin(grad, out, row.cut() + (row.shifted() || row.warped()) + row.coloured() + row.mirrored);
    if (row.cut()) {
      step([&](const T* from, T* to) {
        std::copy_n(from, size_.numbers(), to);
        cut(row, to);
      });
    }
    if (row.warped()) {
      step([&](const T* from, T* to) { warp_backward(warp(parameters), from, row.down, row.across, to); });
    } else if (row.shifted()) {
      step([&](const T* from, T* to) { shift(from, size_, -row.down, -row.across, to); });
    }
    if (row.coloured()) {
      step([&](const T* from, T* to) { colour(from, size_, row.brightness, row.saturation, row.contrast, to); });
    }
    if (row.mirrored) step([&](const T* from, T* to) { mirror(from, size_, to); });
    if (at_ != out) std::copy_n(at_, size_.numbers(), out);
  }

 private:
  void begin(const T* from, T* out, int steps) {
    at_ = from;
    out_ = out;
    left_ = steps;
  }

  // The last step writes where the result belongs, the others into two buffers in turn.
  template <typename Step>
  void step(const Step& take) {
    T* to = out_;
    if (--left_ > 0) {
      std::vector<T>& buffer = buffers_[left_ % 2];
      buffer.resize(size_.numbers());
      to = buffer.data();
    }
    take(at_, to);
    at_ = to;
  }

  void cut(const Row<T>& row, T* out) const {
    for (int64_t channel = 0; channel < size_.channels; ++channel, out += size_.area()) {
      for (int64_t i = row.top; i < row.bottom; ++i) {
        std::fill(out + i * size_.width + row.left, out + i * size_.width + row.right, T(0));
      }
    }
  }

  // Ready for the row that `parameters` points to.
  Warp<T>& warp(const T* parameters) {
    if (warps_.empty()) warps_.emplace_back(size_);
    Warp<T>& found = warps_.front();
    if (found.theta != parameters) {
      warp_reads(parameters + 6, size_, found.frame.pitch, found.reads);
      found.theta = parameters;
    }
    return found;
  }

  Size size_;
  const T* at_ = nullptr;
  T* out_ = nullptr;
  int left_ = 0;
  std::vector<T> buffers_[2];
  std::vector<Warp<T>> warps_;  // none until it is needed
};

// Reads an image from wherever it lies into [channels, height, width], and back.
template <typename Element, typename T>
void load(const Element* image, const Tensor& images, const Size& size, T* out) {
  const int64_t channel = images.stride(1), row = images.stride(2), col = images.stride(3);
  for (int64_t c = 0; c < size.channels; ++c) {
    for (int64_t i = 0; i < size.height; ++i, out += size.width) {
      const Element* from = image + c * channel + i * row;
      for (int64_t j = 0; j < size.width; ++j) out[j] = static_cast<T>(from[j * col]);
    }
  }
}

template <typename Element, typename T>
void store(const T* x, const Size& size, bool last, Element* out) {
  const int64_t area = size.area(), channels = size.channels;
  if (!last) {
    for (int64_t k = 0; k < size.numbers(); ++k) out[k] = static_cast<Element>(x[k]);
    return;
  }
  for (int64_t k = 0; k < area; ++k, out += channels) {
    for (int64_t c = 0; c < channels; ++c) out[c] = static_cast<Element>(x[c * area + k]);
  }
}

template <typename Element>
void augment_as(const Tensor& images, const Tensor& parameters, bool backward, bool linear, bool last, Tensor& result) {
  using T = Compute<Element>;
  const Size size{images.size(1), images.size(2), images.size(3)};
  const int64_t count = images.size(0), rows = parameters.size(0), each = count / rows;
  const T* all = parameters.const_data_ptr<T>();
  std::vector<Row<T>> parsed;
  parsed.reserve(rows);
  for (int64_t row = 0; row < rows; ++row) parsed.emplace_back(all + row * kColumns, size, linear);

  const bool direct = std::is_same_v<Element, T>;
  const bool dense = images.stride(3) == 1 && images.stride(2) == size.width && images.stride(1) == size.area();
  const Element* from = images.const_data_ptr<Element>();
  Element* to = result.mutable_data_ptr<Element>();
  const int64_t grain = std::max<int64_t>(1, kNumbersPerTask / size.numbers());
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    Augmenter<T> augmenter(size);
    std::vector<T> loaded, made;
    for (int64_t image = begin; image < end; ++image) {
      const Element* source = from + image * images.stride(0);
      Element* target = to + image * size.numbers();
      const T* x;
      if (direct && dense) {
        x = reinterpret_cast<const T*>(source);
      } else {
        loaded.resize(size.numbers());
        load(source, images, size, loaded.data());
        x = loaded.data();
      }
      T* out;
      if (direct && !last) {
        out = reinterpret_cast<T*>(target);
      } else {
        made.resize(size.numbers());
        out = made.data();
      }
      const int64_t row = image / each;
      if (backward) {
        augmenter.backward(x, parsed[row], all + row * kColumns, out);
      } else {
        augmenter.forward(x, parsed[row], all + row * kColumns, out);
      }
      if (!direct || last) store(out, size, last, target);
    }
  });
}

Tensor augmented(const Tensor& images, const Tensor& parameters_, bool backward, bool linear) {
  STD_TORCH_CHECK(images.dim() == 4, "siamese_augment: images must be [N, C, H, W]");
  STD_TORCH_CHECK(parameters_.dim() == 2 && parameters_.size(1) == kColumns,
                  "siamese_augment: parameters must be [G, 16]");
  const int64_t count = images.size(0), rows = parameters_.size(0);
  STD_TORCH_CHECK(images.numel() == 0 || (rows > 0 && count % rows == 0),
                  "siamese_augment: the rows of parameters must divide the images");
  STD_TORCH_CHECK((images.size(2) + 3) * (images.size(3) + 3) <= std::numeric_limits<int32_t>::max(),
                  "siamese_augment: an image has too many pixels");
  const bool last = !images.is_contiguous() && ddfast::channels_last(images);
  Tensor result = torch::stable::empty(
      {count, images.size(1), images.size(2), images.size(3)}, images.scalar_type(), std::nullopt, images.device(),
      std::nullopt,
      last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
  if (images.numel() == 0) return result;
  const Tensor parameters = ddfast::contiguous(parameters_);
  const auto run = [&]<typename Element>(std::type_identity<Element>) {
    augment_as<Element>(images, parameters, backward, linear, last, result);
  };
  ddfast::dispatch_floating("siamese_augment", images.scalar_type(), run);
  return result;
}

Tensor siamese_augment(const Tensor& images, const Tensor& parameters, bool linear) {
  return augmented(images, parameters, false, linear);
}

Tensor siamese_augment_backward(const Tensor& grad_output, const Tensor& parameters) {
  return augmented(grad_output, parameters, true, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ddfast_native, library) {
  library.def("siamese_augment(Tensor images, Tensor parameters, bool linear) -> Tensor");
  library.def("siamese_augment_backward(Tensor grad_output, Tensor parameters) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ddfast_native, CPU, library) {
  library.impl("siamese_augment", TORCH_BOX(&siamese_augment));
  library.impl("siamese_augment_backward", TORCH_BOX(&siamese_augment_backward));
}
