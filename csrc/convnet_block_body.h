// The arithmetic of convnet_block for one instruction set. convnet_block.cpp includes this file once for each, after it
// has defined, in the namespace DDFAST_BODY,
//
//   DDFAST_TARGET                          the attribute of functions that hold its instructions
//   Vec, kLanes, kTiles                    a register of floats, its length, rows of a product that are computed at a time
//   load, store, set, add, subtract, multiply, multiply_add (a b + c), subtract_product (c - a b), positive, where_positive
//
// Only functions marked DDFAST_TARGET hold such instructions, and they call nothing but each other, so that none of them
// can leak into code for another CPU.

namespace DDFAST_BODY {

#define DDFAST_INLINE DDFAST_TARGET inline __attribute__((always_inline))

constexpr int64_t kPanel = 2 * kLanes;  // output channels computed at a time

constexpr int64_t padded(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// --- Winograd's transforms of a row of values. N points for N - 2 outputs: 0, 1, -1 and infinity, or 0, A, -A, B, -B and
// infinity with A = 5/8 and B = 3/2, whose squares and products are exact in float.

constexpr float kA = 0.625f, kB = 1.5f;
constexpr float kAA = kA * kA, kBB = kB * kB;

// B^T d: of pixels.
DDFAST_INLINE void pixel_points(const Vec (&d)[4], Vec (&v)[4]) {
  v[0] = subtract(d[2], d[0]);
  v[1] = add(d[2], d[1]);
  v[2] = subtract(d[2], d[1]);
  v[3] = subtract(d[3], d[1]);
}

DDFAST_INLINE void pixel_points(const Vec (&d)[6], Vec (&v)[6]) {
  const Vec sum = set(kAA + kBB), product = set(kAA * kBB), aa = set(kAA), bb = set(kBB), a = set(kA), b = set(kB);
  v[0] = multiply_add(product, d[0], subtract_product(sum, d[2], d[4]));
  v[5] = multiply_add(product, d[1], subtract_product(sum, d[3], d[5]));
  const Vec even_a = subtract_product(bb, d[2], d[4]), odd_a = subtract_product(bb, d[1], d[3]);
  v[1] = multiply_add(a, odd_a, even_a);
  v[2] = subtract_product(a, odd_a, even_a);
  const Vec even_b = subtract_product(aa, d[2], d[4]), odd_b = subtract_product(aa, d[1], d[3]);
  v[3] = multiply_add(b, odd_b, even_b);
  v[4] = subtract_product(b, odd_b, even_b);
}

// A^T m: of sums of products.
DDFAST_INLINE void outputs(const Vec (&m)[4], Vec (&y)[2]) {
  y[0] = add(m[0], add(m[1], m[2]));
  y[1] = add(subtract(m[1], m[2]), m[3]);
}

DDFAST_INLINE void outputs(const Vec (&m)[6], Vec (&y)[4]) {
  const Vec sum_a = add(m[1], m[2]), difference_a = subtract(m[1], m[2]);
  const Vec sum_b = add(m[3], m[4]), difference_b = subtract(m[3], m[4]);
  y[0] = add(m[0], add(sum_a, sum_b));
  y[1] = multiply_add(set(kA), difference_a, multiply(set(kB), difference_b));
  y[2] = multiply_add(set(kAA), sum_a, multiply(set(kBB), sum_b));
  y[3] = multiply_add(set(kAA * kA), difference_a, multiply_add(set(kBB * kB), difference_b, m[5]));
}

// A y: of gradients at outputs.
DDFAST_INLINE void gradient_points(const Vec (&y)[2], Vec (&z)[4]) {
  z[0] = y[0];
  z[1] = add(y[0], y[1]);
  z[2] = subtract(y[0], y[1]);
  z[3] = y[1];
}

DDFAST_INLINE void gradient_points(const Vec (&y)[4], Vec (&z)[6]) {
  const Vec even_a = multiply_add(set(kAA), y[2], y[0]);
  const Vec odd_a = multiply_add(set(kAA * kA), y[3], multiply(set(kA), y[1]));
  const Vec even_b = multiply_add(set(kBB), y[2], y[0]);
  const Vec odd_b = multiply_add(set(kBB * kB), y[3], multiply(set(kB), y[1]));
  z[0] = y[0];
  z[1] = add(even_a, odd_a);
  z[2] = subtract(even_a, odd_a);
  z[3] = add(even_b, odd_b);
  z[4] = subtract(even_b, odd_b);
  z[5] = y[3];
}

// --- transforms of a tile, for `channels` of all channels at a time. Where a pixel's channels begin is at
// pixels[row * columns + column]. Channel c of point p goes to to[p * point + c].

template <int kRows, int kColumns>
DDFAST_TARGET void transform_pixels(const float* const* pixels, int64_t channels, int64_t point, float* to) {
  for (int64_t c = 0; c < channels; c += kLanes, to += kLanes) {
    Vec half[kRows][kColumns];
#pragma GCC unroll 6
    for (int j = 0; j < kColumns; ++j) {
      Vec d[kRows], v[kRows];
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) d[i] = load(pixels[i * kColumns + j] + c);
      pixel_points(d, v);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) half[i][j] = v[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      Vec v[kColumns];
      pixel_points(half[i], v);
#pragma GCC unroll 6
      for (int j = 0; j < kColumns; ++j) store(to + (i * kColumns + j) * point, v[j]);
    }
  }
}

// A tile of 2 x 4 gradients to 4 x 6 points.
DDFAST_TARGET inline void transform_gradients(const float* const* pixels, int64_t channels, int64_t point, float* to) {
  for (int64_t c = 0; c < channels; c += kLanes, to += kLanes) {
    Vec half[4][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      Vec y[2], z[4];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) y[i] = load(pixels[i * 4 + j] + c);
      gradient_points(y, z);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) half[i][j] = z[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      Vec z[6];
      gradient_points(half[i], z);
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) store(to + (i * 6 + j) * point, z[j]);
    }
  }
}

// A panel of the 2 x 4 outputs of a tile from its 4 x 6 sums. Outputs outside the map are null.
DDFAST_TARGET inline void transform_sums(const float* m, int64_t point, const float* bias, float* const* to) {
#pragma GCC unroll 2
  for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
    Vec half[2][6];
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) {
      Vec sums[4], y[2];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sums[i] = load(m + (i * 6 + j) * point + lane);
      outputs(sums, y);
      half[0][j] = y[0], half[1][j] = y[1];
    }
    const Vec shift = load(bias + lane);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      Vec y[4];
      outputs(half[i], y);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        if (to[4 * i + j] != nullptr) store(to[4 * i + j] + lane, add(y[j], shift));
      }
    }
  }
}

// --- products

// c[t][0 .. kPanel - 1] (+)= start + sum over rows r and terms k of a[r * row + t * kStride + k] * b[r, k][0 .. kPanel - 1]
// for kCount rows t. Where `squares` is not null, the sums of the squares of c's columns are added to it.
template <int kStride, int kCount>
DDFAST_TARGET void product(const float* a, int64_t row, const float* b, int64_t rows, int64_t terms, const float* start,
                           float* c, bool accumulate, float* squares) {
  Vec sums[kCount][2];
  const Vec low_start = load(start), high_start = load(start + kLanes);
#pragma GCC unroll 14
  for (int t = 0; t < kCount; ++t) sums[t][0] = low_start, sums[t][1] = high_start;
  for (int64_t r = 0; r < rows; ++r, a += row) {
    for (int64_t k = 0; k < terms; ++k, b += kPanel) {
      const Vec low = load(b), high = load(b + kLanes);
      const float* from = a + k;
      asm("" : "+r"(from));  // else the compiler carries overlapping factors from term to term, through the stack
#pragma GCC unroll 14
      for (int t = 0; t < kCount; ++t) {
        const Vec factor = set(from[t * kStride]);
        sums[t][0] = multiply_add(factor, low, sums[t][0]);
        sums[t][1] = multiply_add(factor, high, sums[t][1]);
      }
    }
  }
#pragma GCC unroll 14
  for (int t = 0; t < kCount; ++t) {
    float* to = c + t * kPanel;
    store(to, accumulate ? add(load(to), sums[t][0]) : sums[t][0]);
    store(to + kLanes, accumulate ? add(load(to + kLanes), sums[t][1]) : sums[t][1]);
  }
  if (squares == nullptr) return;
  Vec low = set(0.0f), high = set(0.0f);
#pragma GCC unroll 14
  for (int t = 0; t < kCount; ++t) {
    low = multiply_add(sums[t][0], sums[t][0], low);
    high = multiply_add(sums[t][1], sums[t][1], high);
  }
  store(squares, add(load(squares), low));
  store(squares + kLanes, add(load(squares + kLanes), high));
}

// c[i][0 .. kPanel - 1] += sum over terms t of a[t * a_stride + i] * b[t * b_stride + 0 .. kPanel - 1] for kCount rows i.
template <int kCount>
DDFAST_TARGET void outer_product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t terms,
                                 float* c, int64_t c_stride) {
  Vec sums[kCount][2];
#pragma GCC unroll 14
  for (int i = 0; i < kCount; ++i) sums[i][0] = sums[i][1] = set(0.0f);
  for (int64_t t = 0; t < terms; ++t, a += a_stride, b += b_stride) {
    const Vec low = load(b), high = load(b + kLanes);
#pragma GCC unroll 14
    for (int i = 0; i < kCount; ++i) {
      const Vec factor = set(a[i]);
      sums[i][0] = multiply_add(factor, low, sums[i][0]);
      sums[i][1] = multiply_add(factor, high, sums[i][1]);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < kCount; ++i) {
    float* to = c + i * c_stride;
    store(to, add(load(to), sums[i][0]));
    store(to + kLanes, add(load(to + kLanes), sums[i][1]));
  }
}

using Product = void (*)(const float*, int64_t, const float*, int64_t, int64_t, const float*, float*, bool, float*);
using OuterProduct = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t);

template <int kStride, int... kCounts>
constexpr std::array<Product, sizeof...(kCounts)> products(std::integer_sequence<int, kCounts...>) {
  return {&product<kStride, kCounts + 1>...};
}

template <int... kCounts>
constexpr std::array<OuterProduct, sizeof...(kCounts)> outer_products(std::integer_sequence<int, kCounts...>) {
  return {&outer_product<kCounts + 1>...};
}

// c[count][kPanel] (+)= a * b as `product` takes them, in panels of about equal size.
template <int kStride>
void multiply_rows(const float* a, int64_t row, const float* b, int64_t rows, int64_t terms, int64_t count,
                   const float* start, float* c, bool accumulate, float* squares = nullptr) {
  static constexpr auto by_count = products<kStride>(std::make_integer_sequence<int, kTiles>());
  const int64_t panels = (count + kTiles - 1) / kTiles;
  for (int64_t p = 0, begin = 0; p < panels; ++p) {
    const int64_t end = count * (p + 1) / panels;
    by_count[end - begin - 1](a + begin * kStride, row, b, rows, terms, start, c + begin * kPanel, accumulate,
                              squares);
    begin = end;
  }
}

// c[count][kPanel] += a^T b as `outer_product` takes them.
inline void multiply_transposed(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t terms,
                                int64_t count, float* c, int64_t c_stride) {
  static constexpr auto by_count = outer_products(std::make_integer_sequence<int, kTiles>());
  const int64_t panels = (count + kTiles - 1) / kTiles;
  for (int64_t p = 0, begin = 0; p < panels; ++p) {
    const int64_t end = count * (p + 1) / panels;
    by_count[end - begin - 1](a + begin, a_stride, b, b_stride, terms, c + begin * c_stride, c_stride);
    begin = end;
  }
}

// --- the norm, the ReLU and the pooling of one image's panel, y [height][width][kPanel]: the convolution less its mean

// What the panel's channels need, a register or two each.
struct Channels {
  alignas(64) float rstd[kPanel], scale[kPanel], shift[kPanel];  // z = y * scale + shift
  alignas(64) float offset[kPanel], slope[kPanel];               // gradient = scale * dz - offset - slope * y
};

// sums[kPanel] over `count` positions. 32 are summed at a time, before their sum joins the others'.
DDFAST_TARGET inline void sum_panel(const float* y, int64_t count, float* sums) {
  Vec low = set(0.0f), high = set(0.0f);
  for (int64_t begin = 0; begin < count; begin += 32) {
    Vec low_part = set(0.0f), high_part = set(0.0f);
    for (int64_t p = begin; p < std::min(begin + 32, count); ++p, y += kPanel) {
      low_part = add(low_part, load(y));
      high_part = add(high_part, load(y + kLanes));
    }
    low = add(low, low_part);
    high = add(high, high_part);
  }
  store(sums, low);
  store(sums + kLanes, high);
}

// Takes the mean away and sums squares[kPanel].
DDFAST_TARGET inline void centre_panel(float* y, int64_t count, const float* mean, float* squares) {
  const Vec low_mean = load(mean), high_mean = load(mean + kLanes);
  Vec low = set(0.0f), high = set(0.0f);
  for (int64_t begin = 0; begin < count; begin += 32) {
    Vec low_part = set(0.0f), high_part = set(0.0f);
    for (int64_t p = begin; p < std::min(begin + 32, count); ++p, y += kPanel) {
      const Vec first = subtract(load(y), low_mean), second = subtract(load(y + kLanes), high_mean);
      low_part = multiply_add(first, first, low_part);
      high_part = multiply_add(second, second, high_part);
      store(y, first);
      store(y + kLanes, second);
    }
    low = add(low, low_part);
    high = add(high, high_part);
  }
  store(squares, low);
  store(squares + kLanes, high);
}

// The pooled map to [height / 2][width / 2], `stride` floats from pixel to pixel.
DDFAST_TARGET inline void pool(const float* y, int64_t height, int64_t width, const Channels& channels, float* to,
                               int64_t stride) {
  const Vec quarter = set(0.25f);  // a power of two: it may come first
  Vec scale[2], shift[2];
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    scale[k] = multiply(quarter, load(channels.scale + k * kLanes));
    shift[k] = multiply(quarter, load(channels.shift + k * kLanes));
  }
  for (int64_t row = 0; row < height / 2; ++row) {
    const float* above = y + 2 * row * width * kPanel;
    const float* below = above + width * kPanel;
    float* out = to + row * (width / 2) * stride;
    for (int64_t col = 0; col < width / 2; ++col, above += 2 * kPanel, below += 2 * kPanel, out += stride) {
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) {
        const int64_t lane = k * kLanes;
        const Vec a = positive(multiply_add(load(above + lane), scale[k], shift[k]));
        const Vec b = positive(multiply_add(load(above + kPanel + lane), scale[k], shift[k]));
        const Vec c = positive(multiply_add(load(below + lane), scale[k], shift[k]));
        const Vec d = positive(multiply_add(load(below + kPanel + lane), scale[k], shift[k]));
        store(out + lane, add(add(a, b), add(c, d)));
      }
    }
  }
}

// The sums over an image of dz and of dz * y, where dz is a quarter of the pooled gradient g where z > 0.
DDFAST_TARGET inline void sum_gradients(const float* y, const float* g, int64_t stride, int64_t height, int64_t width,
                                        const Channels& channels, float* grad_sums, float* product_sums) {
  const Vec quarter = set(0.25f);
  Vec scale[2], shift[2], grads[2], products[2];
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    scale[k] = load(channels.scale + k * kLanes);
    shift[k] = load(channels.shift + k * kLanes);
    grads[k] = products[k] = set(0.0f);
  }
  for (int64_t row = 0; row < height / 2; ++row) {
    const float* above = y + 2 * row * width * kPanel;
    const float* below = above + width * kPanel;
    const float* from = g + row * (width / 2) * stride;
    Vec row_grads[2] = {set(0.0f), set(0.0f)}, row_products[2] = {set(0.0f), set(0.0f)};
    for (int64_t col = 0; col < width / 2; ++col, above += 2 * kPanel, below += 2 * kPanel, from += stride) {
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) {
        const int64_t lane = k * kLanes;
        const Vec grad = multiply(quarter, load(from + lane));
        const Vec a = load(above + lane), b = load(above + kPanel + lane);
        const Vec c = load(below + lane), d = load(below + kPanel + lane);
        const Vec da = where_positive(multiply_add(a, scale[k], shift[k]), grad);
        const Vec db = where_positive(multiply_add(b, scale[k], shift[k]), grad);
        const Vec dc = where_positive(multiply_add(c, scale[k], shift[k]), grad);
        const Vec dd = where_positive(multiply_add(d, scale[k], shift[k]), grad);
        row_grads[k] = add(row_grads[k], add(add(da, db), add(dc, dd)));
        const Vec upper = multiply_add(da, a, multiply(db, b)), lower = multiply_add(dc, c, multiply(dd, d));
        row_products[k] = add(row_products[k], add(upper, lower));
      }
    }
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      grads[k] = add(grads[k], row_grads[k]);
      products[k] = add(products[k], row_products[k]);
    }
  }
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    store(grad_sums + k * kLanes, grads[k]);
    store(product_sums + k * kLanes, products[k]);
  }
}

DDFAST_INLINE void gradient_at(float* y, Vec grad, Vec scale, Vec shift, Vec offset, Vec slope) {
  const Vec value = load(y);
  const Vec dz = where_positive(multiply_add(value, scale, shift), grad);
  store(y, subtract(multiply(scale, dz), multiply_add(slope, value, offset)));
}

// Replaces y by the gradient at it.
DDFAST_TARGET inline void gradients(float* y, const float* g, int64_t stride, int64_t height, int64_t width,
                                    const Channels& channels) {
  const Vec quarter = set(0.25f), none = set(0.0f);
  Vec scale[2], shift[2], offset[2], slope[2];
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    scale[k] = load(channels.scale + k * kLanes);
    shift[k] = load(channels.shift + k * kLanes);
    offset[k] = load(channels.offset + k * kLanes);
    slope[k] = load(channels.slope + k * kLanes);
  }
  for (int64_t row = 0; row < height; ++row) {
    float* at = y + row * width * kPanel;
    const float* from = g + row / 2 * (width / 2) * stride;
    const int64_t pooled = row < height / 2 * 2 ? width / 2 : 0;
    for (int64_t col = 0; col < pooled; ++col, at += 2 * kPanel, from += stride) {
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) {
        const Vec grad = multiply(quarter, load(from + k * kLanes));
        gradient_at(at + k * kLanes, grad, scale[k], shift[k], offset[k], slope[k]);
        gradient_at(at + kPanel + k * kLanes, grad, scale[k], shift[k], offset[k], slope[k]);
      }
    }
    for (int64_t col = 2 * pooled; col < width; ++col, at += kPanel) {
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) gradient_at(at + k * kLanes, none, scale[k], shift[k], offset[k], slope[k]);
    }
  }
}

// --- one pass over the batch. Below is plain C++.

// Floats `count` of `from`, then zeros up to a panel.
inline void fill_panel(const float* from, int64_t count, float otherwise, float* to) {
  for (int64_t k = 0; k < kPanel; ++k) to[k] = k >= count ? 0.0f : from == nullptr ? otherwise : from[k];
}

// The panel's affine parameters.
inline void set_affine(const Layer& layer, int64_t first, Channels& channels, float* gamma) {
  const int64_t width = std::min(kPanel, layer.outputs - first);
  fill_panel(layer.gamma == nullptr ? nullptr : layer.gamma + first, width, 1.0f, gamma);
  fill_panel(layer.beta == nullptr ? nullptr : layer.beta + first, width, 0.0f, channels.shift);
}

// The panel from channel `first` on of the kept convolution, from y [positions][kPanel].
inline void keep_panel(const Forward& pass, int64_t image, int64_t first, const float* y, const float* mean) {
  if (pass.conv == nullptr) return;
  const int64_t positions = pass.layer.height * pass.layer.width, valid = std::min(kPanel, pass.layer.outputs - first);
  float* to = pass.conv + image * positions * pass.layer.outputs + first;
  for (int64_t p = 0; p < positions; ++p, y += kPanel, to += pass.layer.outputs) {
    for (int64_t k = 0; k < valid; ++k) to[k] = y[k] + mean[k];
  }
}

inline void store_panel(const Layer& layer, float* conv, int64_t image, int64_t first, const float* y) {
  const int64_t positions = layer.height * layer.width, valid = std::min(kPanel, layer.outputs - first);
  float* to = conv + image * positions * layer.outputs + first;
  for (int64_t p = 0; p < positions; ++p, y += kPanel, to += layer.outputs) std::copy_n(y, valid, to);
}

// Rectifies and pools the panel from channel `first` on of an image; y is its convolution less the mean.
inline void pool_panel(const Layer& layer, float* pooled_map, int64_t image, int64_t first, const float* y,
                       const Channels& channels, float* pooled_panel) {
  const int64_t height = layer.height, width = layer.width, valid = std::min(kPanel, layer.outputs - first);
  const int64_t pooled = (height / 2) * (width / 2);
  float* to = pooled_map + image * pooled * layer.outputs + first;
  if (valid == kPanel) return pool(y, height, width, channels, to, layer.outputs);
  pool(y, height, width, channels, pooled_panel, kPanel);
  for (int64_t p = 0; p < pooled; ++p) std::copy_n(pooled_panel + p * kPanel, valid, to + p * layer.outputs);
}

// Normalises, rectifies and pools such a panel.
inline void finish_panel(const Forward& pass, int64_t image, int64_t first, const float* y, const float* mean,
                         const float* squares, float* pooled_panel) {
  const Layer& layer = pass.layer;
  const int64_t height = layer.height, width = layer.width, valid = std::min(kPanel, layer.outputs - first);
  Channels channels;
  alignas(64) float gamma[kPanel];
  set_affine(layer, first, channels, gamma);
  for (int64_t k = 0; k < kPanel; ++k) {
    const double variance = static_cast<double>(squares[k]) / static_cast<double>(height * width);
    channels.rstd[k] = static_cast<float>(1 / std::sqrt(variance + layer.eps));
    channels.scale[k] = channels.rstd[k] * gamma[k];
  }
  std::copy_n(mean, valid, pass.mean + image * layer.outputs + first);
  std::copy_n(channels.rstd, valid, pass.rstd + image * layer.outputs + first);
  pool_panel(layer, pass.pooled, image, first, y, channels, pooled_panel);
}

// The same from the convolution itself.
inline void centre_and_finish_panel(const Forward& pass, int64_t image, int64_t first, float* y, float* pooled_panel) {
  const int64_t positions = pass.layer.height * pass.layer.width;
  alignas(64) float sums[kPanel], mean[kPanel], none[kPanel] = {};
  keep_panel(pass, image, first, y, none);
  sum_panel(y, positions, sums);
  for (int64_t k = 0; k < kPanel; ++k) {
    mean[k] = static_cast<float>(static_cast<double>(sums[k]) / static_cast<double>(positions));
  }
  centre_panel(y, positions, mean, sums);
  finish_panel(pass, image, first, y, mean, sums, pooled_panel);
}

// Where the pooled gradient of a panel of an image begins, and the floats from pixel to pixel.
struct PooledGradient {
  PooledGradient(const Backward& pass, int64_t image, int64_t first, float* grad_panel)
      : data(pass.grad_output + image * (pass.layer.height / 2) * (pass.layer.width / 2) * pass.layer.outputs + first),
        stride(pass.layer.outputs) {
    const int64_t valid = std::min(kPanel, stride - first), pooled = (pass.layer.height / 2) * (pass.layer.width / 2);
    if (valid == kPanel) return;
    for (int64_t p = 0; p < pooled; ++p) fill_panel(data + p * stride, valid, 0.0f, grad_panel + p * kPanel);
    data = grad_panel, stride = kPanel;
  }

  const float* data;
  int64_t stride;
};

// Scale and shift of the panel's channels.
inline void set_scale(const Backward& pass, int64_t image, int64_t first, Channels& channels) {
  alignas(64) float gamma[kPanel];
  set_affine(pass.layer, first, channels, gamma);
  fill_panel(pass.rstd + image * pass.by_image + first, std::min(kPanel, pass.layer.outputs - first), 0.0f, channels.rstd);
  for (int64_t k = 0; k < kPanel; ++k) channels.scale[k] = channels.rstd[k] * gamma[k];
}

// Replaces the panel y of an image, its convolution less the mean, by the gradient at it. Of an InstanceNorm it also writes
// the image's sums for the norm's parameters, from which what the statistics add to the gradient follows.
inline void differentiate_panel(const Backward& pass, int64_t image, int64_t first, float* y, float* grad_panel) {
  const Layer& layer = pass.layer;
  const int64_t height = layer.height, width = layer.width, positions = height * width;
  const int64_t valid = std::min(kPanel, layer.outputs - first);
  Channels channels;
  set_scale(pass, image, first, channels);
  const PooledGradient g(pass, image, first, grad_panel);
  if (pass.offset != nullptr) {
    fill_panel(pass.offset + first, valid, 0.0f, channels.offset);
    fill_panel(pass.slope + first, valid, 0.0f, channels.slope);
    return gradients(y, g.data, g.stride, height, width, channels);
  }
  alignas(64) float grad_sums[kPanel], product_sums[kPanel];
  sum_gradients(y, g.data, g.stride, height, width, channels, grad_sums, product_sums);
  for (int64_t k = 0; k < kPanel; ++k) {
    const double count = static_cast<double>(positions), rstd = channels.rstd[k], scale = channels.scale[k];
    channels.offset[k] = static_cast<float>(scale * grad_sums[k] / count);
    channels.slope[k] = static_cast<float>(scale * rstd * rstd * product_sums[k] / count);
    product_sums[k] *= channels.rstd[k];
  }
  std::copy_n(grad_sums, valid, pass.grad_beta + image * layer.outputs + first);
  std::copy_n(product_sums, valid, pass.grad_gamma + image * layer.outputs + first);
  gradients(y, g.data, g.stride, height, width, channels);
}

// Few input channels: the convolution as it is written, from an image [height + 2][width + 2][inputs] with a border of
// zeros. Weights are [panel][3 rows][3 columns * inputs][kPanel].

inline void pad_image(const Layer& layer, const Strided& input, int64_t image, float* to) {
  const int64_t channels = layer.inputs, row_floats = (layer.width + 2) * channels;
  std::fill_n(to, row_floats, 0.0f);
  std::fill_n(to + (layer.height + 1) * row_floats, row_floats, 0.0f);
  for (int64_t row = 0; row < layer.height; ++row) {
    float* line = to + (row + 1) * row_floats;
    std::fill_n(line, channels, 0.0f);
    std::fill_n(line + row_floats - channels, channels, 0.0f);
    for (int64_t c = 0; c < channels; ++c) {
      const float* from = input.data + image * input.batch + c * input.channel + row * input.row;
      float* target = line + channels + c;
      for (int64_t col = 0; col < layer.width; ++col) target[col * channels] = from[col * input.column];
    }
  }
}

inline void direct_weights(const Layer& layer, float* to) {
  const int64_t terms = 9 * layer.inputs;
  for (int64_t o = 0; o < padded(layer.outputs, kPanel); ++o) {
    for (int64_t tap = 0; tap < 9; ++tap) {
      for (int64_t c = 0; c < layer.inputs; ++c) {
        to[(o / kPanel * terms + tap * layer.inputs + c) * kPanel + o % kPanel] =
            o < layer.outputs ? layer.weight[(o * layer.inputs + c) * 9 + tap] : 0.0f;
      }
    }
  }
}

// y [height][width][kPanel] of one panel of an image; where `squares` is not null, y's squares are added to it.
inline void direct_panel(const Layer& layer, const float* image, const float* weights, const float* start, float* y,
                         float* squares) {
  const int64_t row_floats = (layer.width + 2) * layer.inputs, terms = 3 * layer.inputs;
  for (int64_t row = 0; row < layer.height; ++row, image += row_floats, y += layer.width * kPanel) {
    const auto run = [&](auto channels) {
      multiply_rows<decltype(channels)::value>(image, row_floats, weights, 3, terms, layer.width, start, y, false,
                                               squares);
    };
    switch (layer.inputs) {
      case 1: run(std::integral_constant<int, 1>()); break;
      case 2: run(std::integral_constant<int, 2>()); break;
      case 3: run(std::integral_constant<int, 3>()); break;
      default: run(std::integral_constant<int, 4>());
    }
  }
}

inline Buffer padded_bias(const Layer& layer) {
  const int64_t count = padded(layer.outputs, kPanel);
  Buffer bias(count);
  std::fill_n(bias.data(), count, 0.0f);
  if (layer.bias != nullptr) std::copy_n(layer.bias, layer.outputs, bias.data());
  return bias;
}

// Calls use(image, first, y, mean, squares, spare) with every panel y of the convolution of every image less the means of its
// channels and the sums of its squares. The means are `given` [panels][kPanel], or the image's own where that is null.
template <typename Use>
void for_each_direct_panel(const Layer& layer, const Strided& input, const float* given, const Use& use) {
  const int64_t panels = padded(layer.outputs, kPanel) / kPanel, terms = 9 * layer.inputs;
  Buffer weights(panels * terms * kPanel);
  direct_weights(layer, weights.data());
  const Buffer bias = padded_bias(layer);
  torch::stable::parallel_for(0, layer.batch, 1, [&](int64_t begin, int64_t end) {
    Buffer image((layer.height + 2) * (layer.width + 2) * layer.inputs + kTiles * layer.inputs);
    Buffer y(layer.height * layer.width * kPanel), pooled((layer.height / 2) * (layer.width / 2) * kPanel);
    Buffer means(panels * kPanel);
    for (int64_t b = begin; b < end; ++b) {
      pad_image(layer, input, b, image.data());
      if (given == nullptr) {
        direct_means(layer, input, b, weights.data(), bias.data(), panels, kPanel, means.data());
      }
      for (int64_t panel = 0; panel < panels; ++panel) {
        const float* mean = (given == nullptr ? means.data() : given) + panel * kPanel;
        alignas(64) float start[kPanel], squares[kPanel] = {};
        for (int64_t k = 0; k < kPanel; ++k) start[k] = bias[panel * kPanel + k] - mean[k];
        direct_panel(layer, image.data(), weights.data() + panel * terms * kPanel, start, y.data(), squares);
        use(b, panel * kPanel, y.data(), mean, squares, pooled.data());
      }
    }
  });
}

inline void forward_direct(const Forward& pass) {
  for_each_direct_panel(pass.layer, pass.input, nullptr,
                        [&](int64_t image, int64_t first, const float* y, const float* mean, const float* squares,
                            float* spare) {
                          keep_panel(pass, image, first, y, mean);
                          finish_panel(pass, image, first, y, mean, squares, spare);
                        });
}

// A panel of a kept convolution of an image less the means of its channels, [positions][kPanel].
inline void load_panel(const Layer& layer, const float* conv, const float* mean, int64_t image, int64_t first, float* y) {
  const int64_t positions = layer.height * layer.width, valid = std::min(kPanel, layer.outputs - first);
  const float* from = conv + image * positions * layer.outputs + first;
  mean += first;
  for (int64_t p = 0; p < positions; ++p, from += layer.outputs, y += kPanel) {
    for (int64_t k = 0; k < valid; ++k) y[k] = from[k] - mean[k];
    for (int64_t k = valid; k < kPanel; ++k) y[k] = 0.0f;
  }
}

// Weights for the gradient at the input: [panel][kPanel outputs][columns / kPanel][kPanel], column 9 taps * inputs.
inline void direct_transposed_weights(const Layer& layer, int64_t columns, float* to) {
  const int64_t outputs = padded(layer.outputs, kPanel), terms = 9 * layer.inputs;
  std::fill_n(to, outputs * columns, 0.0f);
  for (int64_t o = 0; o < layer.outputs; ++o) {
    for (int64_t term = 0; term < terms; ++term) {
      const int64_t at = (o / kPanel * (columns / kPanel) + term / kPanel) * kPanel * kPanel;
      to[at + o % kPanel * kPanel + term % kPanel] =
          layer.weight[(o * layer.inputs + term % layer.inputs) * 9 + term / layer.inputs];
    }
  }
}

// Adds what each position sends to its 3 x 3 neighbours, parts [columns / kPanel][positions][kPanel], into an image.
inline void scatter_taps(const Layer& layer, const float* parts, float* padded_grad, const Strided& grad, int64_t image) {
  const int64_t channels = layer.inputs, row_floats = (layer.width + 2) * channels, terms = 3 * channels;
  const int64_t positions = layer.height * layer.width;
  std::fill_n(padded_grad, (layer.height + 2) * row_floats, 0.0f);
  for (int64_t row = 0; row < layer.height; ++row) {
    for (int64_t tap = 0; tap < 3; ++tap) {
      for (int64_t col = 0; col < layer.width; ++col) {
        float* to = padded_grad + (row + tap) * row_floats + col * channels;
        for (int64_t k = 0; k < terms; ++k) {
          const int64_t term = tap * terms + k;
          to[k] += parts[(term / kPanel * positions + row * layer.width + col) * kPanel + term % kPanel];
        }
      }
    }
  }
  for (int64_t row = 0; row < layer.height; ++row) {
    const float* from = padded_grad + (row + 1) * row_floats + channels;
    float* to = grad.data + image * grad.batch + row * grad.row;
    for (int64_t col = 0; col < layer.width; ++col) {
      for (int64_t c = 0; c < channels; ++c) to[col * grad.column + c * grad.channel] = from[col * channels + c];
    }
  }
}

inline void backward_direct(const Backward& pass) {
  const Layer& layer = pass.layer;
  const int64_t panels = padded(layer.outputs, kPanel) / kPanel, terms = 9 * layer.inputs;
  const int64_t columns = padded(terms, kPanel), positions = layer.height * layer.width;
  const int64_t row_floats = (layer.width + 2) * layer.inputs;
  const bool to_input = pass.grad_input.data != nullptr, to_weight = pass.grad_weight != nullptr;
  Buffer weights(panels * terms * kPanel), transposed(to_input ? panels * kPanel * columns : 0);
  direct_weights(layer, weights.data());
  if (to_input) direct_transposed_weights(layer, columns, transposed.data());
  const Buffer bias = padded_bias(layer);
  alignas(64) const float none[kPanel] = {};
  const int64_t slabs = slabs_of(layer.batch), sums_count = panels * terms * kPanel;
  Buffer slab_sums(to_weight ? slabs * sums_count : 0);
  torch::stable::parallel_for(0, slabs, 1, [&](int64_t begin, int64_t end) {
    Buffer image((layer.height + 2) * row_floats + kTiles * layer.inputs), y(positions * kPanel);
    Buffer grad_panel((layer.height / 2) * (layer.width / 2) * kPanel);
    Buffer parts(to_input ? positions * columns : 0), padded_grad(to_input ? (layer.height + 2) * row_floats : 0);
    Buffer image_sums(to_weight ? sums_count : 0);
    for (int64_t slab = begin; slab < end; ++slab) {
      float* sums = slab_sums.data() + slab * sums_count;
      if (to_weight) std::fill_n(sums, sums_count, 0.0f);
      for (int64_t b = layer.batch * slab / slabs; b < layer.batch * (slab + 1) / slabs; ++b) {
        pad_image(layer, pass.input, b, image.data());
        if (to_weight) std::fill_n(image_sums.data(), sums_count, 0.0f);
        for (int64_t panel = 0; panel < panels; ++panel) {
          const int64_t first = panel * kPanel;
          if (pass.conv != nullptr) {
            load_panel(layer, pass.conv, pass.mean + b * pass.by_image, b, first, y.data());
          } else {
            alignas(64) float start[kPanel];
            fill_panel(pass.mean + b * pass.by_image + first, std::min(kPanel, layer.outputs - first), 0.0f, start);
            for (int64_t k = 0; k < kPanel; ++k) start[k] = bias[first + k] - start[k];
            direct_panel(layer, image.data(), weights.data() + panel * terms * kPanel, start, y.data(), nullptr);
          }
          differentiate_panel(pass, b, first, y.data(), grad_panel.data());
          for (int64_t row = 0; to_weight && row < layer.height; ++row) {
            for (int64_t tap = 0; tap < 3; ++tap) {
              multiply_transposed(image.data() + (row + tap) * row_floats, layer.inputs,
                                  y.data() + row * layer.width * kPanel, kPanel, layer.width, 3 * layer.inputs,
                                  image_sums.data() + (panel * terms + tap * 3 * layer.inputs) * kPanel, kPanel);
            }
          }
          for (int64_t column = 0; to_input && column < columns; column += kPanel) {
            multiply_rows<kPanel>(y.data(), 0, transposed.data() + (panel * columns + column) * kPanel, 1, kPanel,
                                  positions, none, parts.data() + column * positions, panel > 0);
          }
        }
        for (int64_t k = 0; to_weight && k < sums_count; ++k) sums[k] += image_sums[k];
        if (to_input) scatter_taps(layer, parts.data(), padded_grad.data(), pass.grad_input, b);
      }
    }
  });
  for (int64_t o = 0; to_weight && o < layer.outputs; ++o) {
    for (int64_t c = 0; c < layer.inputs; ++c) {
      for (int64_t tap = 0; tap < 9; ++tap) {
        double sum = 0;
        for (int64_t slab = 0; slab < slabs; ++slab) {
          sum += slab_sums[slab * sums_count + (o / kPanel * terms + tap * layer.inputs + c) * kPanel + o % kPanel];
        }
        pass.grad_weight[(o * layer.inputs + c) * 9 + tap] = static_cast<float>(sum);
      }
    }
  }
}

// Many input channels: Winograd's algorithm. A map is read where pixels of `block` channels lie side by side.

struct Map {
  const float* data;
  int64_t pixel, block, block_stride;  // floats from pixel to pixel, channels of a block, floats from block to block
};

// Calls use(tile, channel, count, pointers) for each tile of kRows x kColumns outputs of a group of images and each `chunk`
// of channels: where they begin in the pixels of the tile and of a border of kBorder around it, or in `zeros`.
template <int kRows, int kColumns, int kBorder, typename Use>
void for_each_tile(const Layer& layer, const Map& map, int64_t images, int64_t channels, int64_t chunk,
                   const float* zeros, const Use& use) {
  constexpr int kHeight = kRows + 2 * kBorder, kWidth = kColumns + 2 * kBorder;
  int64_t tile = 0;
  for (int64_t image = 0; image < images; ++image) {
    for (int64_t top = 0; top < layer.height; top += kRows) {
      for (int64_t left = 0; left < layer.width; left += kColumns, ++tile) {
        const float *from[kHeight * kWidth], *pixels[kHeight * kWidth];
        bool inside[kHeight * kWidth];
        for (int64_t k = 0; k < kHeight * kWidth; ++k) {
          const int64_t row = top + k / kWidth - kBorder, col = left + k % kWidth - kBorder;
          inside[k] = 0 <= row && row < layer.height && 0 <= col && col < layer.width;
          from[k] = inside[k] ? map.data + ((image * layer.height + row) * layer.width + col) * map.pixel : zeros;
        }
        for (int64_t channel = 0; channel < channels; channel += chunk) {
          const int64_t offset = channel / map.block * map.block_stride + channel % map.block;
          for (int64_t k = 0; k < kHeight * kWidth; ++k) pixels[k] = from[k] + (inside[k] ? offset : 0);
          use(tile, channel, std::min(chunk, channels - channel), pixels);
        }
      }
    }
  }
}

constexpr int64_t kChunk = 32;    // input channels that lie side by side in V
constexpr int64_t kPoints = 24;   // of a tile of 2 x 4 outputs
constexpr int64_t kBlock = 42;    // tiles whose sums are held at a time: three times kTiles of AVX-512; more leave the cache
constexpr int64_t kOddLine = 16;  // keeps the points of a tile out of each other's cache sets

inline int64_t tiles_of(const Layer& layer) { return (layer.height + 1) / 2 * ((layer.width + 3) / 4); }

// A convolution of a group of images in the points of tiles of 2 x 4 outputs.
struct Convolution {
  // Of `layer.inputs` to `layer.outputs` channels; of these to those where `transposed`.
  Convolution(const Layer& layer, bool transposed)
      : layer(layer),
        inputs(transposed ? layer.outputs : layer.inputs),
        outputs(transposed ? layer.inputs : layer.outputs),
        panels(padded(outputs, kPanel) / kPanel),
        chain(transposed ? 16 : 32),
        weights(panels * kPoints * inputs * kPanel) {
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        transform_weights(layer, transposed, panel * kPanel, kPanel, weights.data() + panel * kPoints * inputs * kPanel);
      }
    });
  }

  int64_t point_stride(int64_t tiles) const { return padded(inputs, kChunk) * tiles + kOddLine; }

  const Layer& layer;
  int64_t inputs, outputs, panels;
  int64_t chain;   // terms that are summed before their sum joins the others': gradients have no sign in common
  Buffer weights;  // [panel][point][inputs][kPanel]
};

// The scratch memory of a thread, for groups of `images`.
struct Scratch {
  Scratch(const Convolution& convolution, int64_t images)
      : tiles(images * tiles_of(convolution.layer)),
        v(kPoints * convolution.point_stride(tiles)),
        m(kPoints * (kBlock * kPanel + kOddLine)),
        zeros(std::max(padded(convolution.inputs, kChunk), kPanel)) {
    zeros.fill(0.0f);
  }

  int64_t tiles;
  Buffer v, m, zeros;
};

// V of a group.
inline void transform_map(const Convolution& convolution, const Map& map, int64_t images, Scratch& scratch) {
  const int64_t tiles = images * tiles_of(convolution.layer), point = convolution.point_stride(tiles);
  for_each_tile<2, 4, 1>(
      convolution.layer, map, images, padded(convolution.inputs, kLanes), std::min(map.block, kChunk), scratch.zeros.data(),
      [&](int64_t tile, int64_t channel, int64_t count, const float* const* pixels) {
        float* to = scratch.v.data() + (channel / kChunk * tiles + tile) * kChunk + channel % kChunk;
        transform_pixels<4, 6>(pixels, count, point, to);
      });
}

// One panel of the group's convolution, y [images][positions][kPanel].
inline void convolve_panel(const Convolution& convolution, int64_t panel, int64_t images, const float* bias,
                           Scratch& scratch, float* y) {
  const Layer& layer = convolution.layer;
  const int64_t across = (layer.width + 3) / 4, per_image = tiles_of(layer), tiles = images * per_image;
  const int64_t blocks = (tiles + kBlock - 1) / kBlock, m_point = kBlock * kPanel + kOddLine;
  alignas(64) static constexpr float none[kPanel] = {};
  for (int64_t block = 0, begin = 0; block < blocks; ++block) {
    const int64_t end = tiles * (block + 1) / blocks, count = end - begin;
    const float* weights = convolution.weights.data() + panel * kPoints * convolution.inputs * kPanel;
    for (int64_t point = 0; point < kPoints; ++point) {
      const float* v = scratch.v.data() + point * convolution.point_stride(tiles) + begin * kChunk;
      for (int64_t c = 0; c < convolution.inputs; c += convolution.chain) {
        const int64_t terms = std::min(convolution.chain, convolution.inputs - c);
        multiply_rows<kChunk>(v + c / kChunk * kChunk * tiles + c % kChunk, 0, weights, 1, terms, count, none, scratch.m.data() + point * m_point, c > 0);
        weights += terms * kPanel;
      }
    }
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t inside = tile % per_image, top = inside / across * 2, left = inside % across * 4;
      float* to[8];
      for (int64_t k = 0; k < 8; ++k) {
        const int64_t row = top + k / 4, col = left + k % 4;
        const bool there = row < layer.height && col < layer.width;
        to[k] = there ? y + ((tile / per_image * layer.height + row) * layer.width + col) * kPanel : nullptr;
      }
      transform_sums(scratch.m.data() + (tile - begin) * kPanel, m_point, bias, to);
    }
    begin = end;
  }
}

// The input of a group with channels in whole registers: where it lies, or a copy padded with zeros.
inline Map whole_registers(const Layer& layer, const Strided& input, int64_t image, int64_t images, Buffer& copy) {
  const float* from = input.data + image * input.batch;
  const int64_t channels = padded(layer.inputs, kLanes), positions = layer.height * layer.width;
  if (channels == layer.inputs) return {from, channels, channels, 0};
  for (int64_t p = 0; p < images * positions; ++p, from += layer.inputs) {
    std::copy_n(from, layer.inputs, copy.data() + p * channels);
    std::fill_n(copy.data() + p * channels + layer.inputs, channels - layer.inputs, 0.0f);
  }
  return {copy.data(), channels, channels, 0};
}

inline int64_t copy_floats(const Layer& layer, int64_t images) {
  const int64_t channels = padded(layer.inputs, kLanes);
  return channels == layer.inputs ? 0 : images * layer.height * layer.width * channels;
}

inline int64_t group_images(const Layer& layer) { return std::max<int64_t>(1, kBlock / tiles_of(layer)); }

// Calls use(image, first, y, spare) with every panel y of the convolution of every image, from channel `first` on; `spare`
// holds a pooled panel.
template <typename Use>
void for_each_winograd_panel(const Layer& layer, const Strided& input, const Use& use) {
  const Convolution convolution(layer, false);
  const Buffer bias = padded_bias(layer);
  const int64_t positions = layer.height * layer.width;
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t group = std::clamp<int64_t>((layer.batch + threads - 1) / threads, 1, group_images(layer));
  torch::stable::parallel_for(0, (layer.batch + group - 1) / group, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(convolution, group);
    Buffer copy(copy_floats(layer, group)), y(group * positions * kPanel);
    Buffer pooled((layer.height / 2) * (layer.width / 2) * kPanel);
    for (int64_t first = begin * group; first < std::min(end * group, layer.batch); first += group) {
      const int64_t images = std::min(group, layer.batch - first);
      transform_map(convolution, whole_registers(layer, input, first, images, copy), images, scratch);
      for (int64_t panel = 0; panel < convolution.panels; ++panel) {
        convolve_panel(convolution, panel, images, bias.data() + panel * kPanel, scratch, y.data());
        for (int64_t b = 0; b < images; ++b) {
          use(first + b, panel * kPanel, y.data() + b * positions * kPanel, pooled.data());
        }
      }
    }
  });
}

inline void forward_winograd(const Forward& pass) {
  for_each_winograd_panel(pass.layer, pass.input, [&](int64_t image, int64_t first, float* y, float* spare) {
    centre_and_finish_panel(pass, image, first, y, spare);
  });
}

// Adds the products of a group's pixels and gradients in the points of its tiles: sums [point][inputs][padded outputs].
inline void add_weight_products(const Layer& layer, const Map& map, const Map& gradient, int64_t images,
                                const float* zeros, Buffer& v, Buffer& z, float* sums) {
  const int64_t tiles = images * tiles_of(layer);
  const int64_t inputs = padded(layer.inputs, kLanes), outputs = padded(layer.outputs, kPanel);
  const int64_t v_point = tiles * inputs + kOddLine, z_point = tiles * outputs + kOddLine;
  for_each_tile<2, 4, 1>(layer, map, images, inputs, map.block, zeros,
                         [&](int64_t tile, int64_t channel, int64_t count, const float* const* pixels) {
                           transform_pixels<4, 6>(pixels, count, v_point, v.data() + tile * inputs + channel);
                         });
  for_each_tile<2, 4, 0>(layer, gradient, images, outputs, gradient.block, zeros,
                         [&](int64_t tile, int64_t channel, int64_t count, const float* const* pixels) {
                           transform_gradients(pixels, count, z_point, z.data() + tile * outputs + channel);
                         });
  for (int64_t point = 0; point < kPoints; ++point) {
    for (int64_t o = 0; o < outputs; o += kPanel) {
      for (int64_t t = 0; t < tiles; t += kChunk) {
        multiply_transposed(v.data() + point * v_point + t * inputs, inputs, z.data() + point * z_point + t * outputs + o,
                            outputs, std::min(kChunk, tiles - t), layer.inputs,
                            sums + point * layer.inputs * outputs + o, outputs);
      }
    }
  }
}

inline void backward_winograd(const Backward& pass) {
  const Layer& layer = pass.layer;
  const bool to_input = pass.grad_input.data != nullptr, to_weight = pass.grad_weight != nullptr;
  std::optional<Convolution> forward, transposed;
  if (pass.conv == nullptr) forward.emplace(layer, false);
  if (to_input) transposed.emplace(layer, true);
  const Buffer bias = padded_bias(layer);
  const int64_t positions = layer.height * layer.width, outputs = padded(layer.outputs, kPanel);
  const int64_t group = group_images(layer), groups = (layer.batch + group - 1) / group;
  const int64_t slabs = slabs_of(groups), weight_count = layer.outputs * layer.inputs * 9;
  const int64_t weight_tiles = group * tiles_of(layer);
  Buffer slab_weights(to_weight ? slabs * weight_count : 0);
  torch::stable::parallel_for(0, slabs, 1, [&](int64_t begin, int64_t end) {
    std::optional<Scratch> forward_scratch, transposed_scratch;
    if (forward) forward_scratch.emplace(*forward, group);
    if (transposed) transposed_scratch.emplace(*transposed, group);
    Buffer y(group * positions * outputs), copy(copy_floats(layer, group));
    Buffer grad_panel((layer.height / 2) * (layer.width / 2) * kPanel);
    Buffer grad_input(to_input ? group * positions * kPanel : 0);
    Buffer v(to_weight ? kPoints * (weight_tiles * padded(layer.inputs, kLanes) + kOddLine) : 0);
    Buffer z(to_weight ? kPoints * (weight_tiles * outputs + kOddLine) : 0);
    Buffer sums(to_weight ? kPoints * layer.inputs * outputs : 0);
    Buffer zeros(std::max(padded(layer.inputs, kLanes), outputs));
    zeros.fill(0.0f);
    alignas(64) const float none[kPanel] = {};
    for (int64_t slab = begin; slab < end; ++slab) {
      sums.fill(0.0f);
      for (int64_t each = groups * slab / slabs; each < groups * (slab + 1) / slabs; ++each) {
        const int64_t first = each * group, images = std::min(group, layer.batch - first);
        const Map map = whole_registers(layer, pass.input, first, images, copy);
        if (forward) transform_map(*forward, map, images, *forward_scratch);
        for (int64_t o = 0; o < outputs; o += kPanel) {
          float* panel = y.data() + o * group * positions;
          if (forward) {
            convolve_panel(*forward, o / kPanel, images, bias.data() + o, *forward_scratch, panel);
          }
          for (int64_t b = 0; b < images; ++b, panel += positions * kPanel) {
            alignas(64) float mean[kPanel], squares[kPanel];
            fill_panel(pass.mean + (first + b) * pass.by_image + o, std::min(kPanel, layer.outputs - o), 0.0f, mean);
            if (forward) {
              centre_panel(panel, positions, mean, squares);
            } else {
              load_panel(layer, pass.conv, pass.mean + (first + b) * pass.by_image, first + b, o, panel);
            }
            differentiate_panel(pass, first + b, o, panel, grad_panel.data());
          }
        }
        const Map gradient{y.data(), kPanel, kPanel, group * positions * kPanel};
        if (to_weight) add_weight_products(layer, map, gradient, images, zeros.data(), v, z, sums.data());
        if (!to_input) continue;
        transform_map(*transposed, gradient, images, *transposed_scratch);
        for (int64_t panel = 0; panel < transposed->panels; ++panel) {
          convolve_panel(*transposed, panel, images, none, *transposed_scratch, grad_input.data());
          const int64_t valid = std::min(kPanel, layer.inputs - panel * kPanel);
          float* to = pass.grad_input.data + first * pass.grad_input.batch + panel * kPanel;
          for (int64_t p = 0; p < images * positions; ++p) {
            std::copy_n(grad_input.data() + p * kPanel, valid, to + p * layer.inputs);
          }
        }
      }
      if (to_weight) weights_of_points(layer, sums.data(), outputs, slab_weights.data() + slab * weight_count);
    }
  });
  for (int64_t k = 0; to_weight && k < weight_count; ++k) {
    double sum = 0;
    for (int64_t slab = 0; slab < slabs; ++slab) sum += slab_weights[slab * weight_count + k];
    pass.grad_weight[k] = static_cast<float>(sum);
  }
}

inline void forward(const Forward& pass) {
  return pass.layer.inputs <= kDirectInputs ? forward_direct(pass) : forward_winograd(pass);
}

inline void backward(const Backward& pass) {
  return pass.layer.inputs <= kDirectInputs ? backward_direct(pass) : backward_winograd(pass);
}

// BatchNorm: the statistics are those of the whole batch, so that the forward pass goes through it twice, and the backward pass
// takes its sums before it.

// Writes the statistics of each image's channels, and the convolution where it is kept.
inline void measure(const BatchForward& pass) {
  const Layer& layer = pass.layer;
  const int64_t positions = layer.height * layer.width;
  const auto note = [&](int64_t image, int64_t first, const float* mean, const float* squares) {
    const int64_t valid = std::min(kPanel, layer.outputs - first);
    std::copy_n(mean, valid, pass.image_means + image * layer.outputs + first);
    std::copy_n(squares, valid, pass.image_squares + image * layer.outputs + first);
  };
  if (layer.inputs <= kDirectInputs) {
    return for_each_direct_panel(layer, pass.input, nullptr,
                                 [&](int64_t image, int64_t first, const float*, const float* mean, const float* squares,
                                     float*) { note(image, first, mean, squares); });
  }
  for_each_winograd_panel(layer, pass.input, [&](int64_t image, int64_t first, float* y, float*) {
    alignas(64) float sums[kPanel], mean[kPanel];
    store_panel(layer, pass.conv, image, first, y);
    sum_panel(y, positions, sums);
    for (int64_t k = 0; k < kPanel; ++k) {
      mean[k] = static_cast<float>(static_cast<double>(sums[k]) / static_cast<double>(positions));
    }
    centre_panel(y, positions, mean, sums);
    note(image, first, mean, sums);
  });
}

// Normalises by the statistics that are known, rectifies and pools: the kept convolution, or where it is not kept, anew.
inline void finish(const BatchForward& pass) {
  const Layer& layer = pass.layer;
  const int64_t count = padded(layer.outputs, kPanel), positions = layer.height * layer.width;
  Buffer means(count);
  std::fill_n(means.data(), count, 0.0f);
  std::copy_n(pass.mean, layer.outputs, means.data());
  const auto finish_panel = [&](int64_t image, int64_t first, const float* y, float* spare) {
    Channels channels;
    alignas(64) float gamma[kPanel];
    set_affine(layer, first, channels, gamma);
    fill_panel(pass.rstd + first, std::min(kPanel, layer.outputs - first), 0.0f, channels.rstd);
    for (int64_t k = 0; k < kPanel; ++k) channels.scale[k] = channels.rstd[k] * gamma[k];
    pool_panel(layer, pass.pooled, image, first, y, channels, spare);
  };
  if (layer.inputs <= kDirectInputs) {
    return for_each_direct_panel(layer, pass.input, means.data(),
                                 [&](int64_t image, int64_t first, const float* y, const float*, const float*,
                                     float* spare) { finish_panel(image, first, y, spare); });
  }
  if (pass.conv == nullptr) {
    Buffer start(layer.outputs);  // in the place of the bias: the convolution comes without its mean
    for (int64_t o = 0; o < layer.outputs; ++o) start.data()[o] = (layer.bias == nullptr ? 0.0f : layer.bias[o]) - pass.mean[o];
    Layer centred = layer;
    centred.bias = start.data();
    return for_each_winograd_panel(centred, pass.input, finish_panel);
  }
  torch::stable::parallel_for(0, layer.batch, 1, [&](int64_t begin, int64_t end) {
    Buffer y(positions * kPanel), spare((layer.height / 2) * (layer.width / 2) * kPanel);
    for (int64_t image = begin; image < end; ++image) {
      for (int64_t first = 0; first < layer.outputs; first += kPanel) {
        load_panel(layer, pass.conv, means.data(), image, first, y.data());
        finish_panel(image, first, y.data(), spare.data());
      }
    }
  });
}

// The sums over each image of dz and of dz y, to grad_beta and grad_gamma.
inline void sum_gradients(const Backward& pass) {
  const Layer& layer = pass.layer;
  const int64_t count = padded(layer.outputs, kPanel), positions = layer.height * layer.width;
  const auto sum = [&](int64_t image, int64_t first, const float* y, float* spare) {
    Channels channels;
    set_scale(pass, image, first, channels);
    const PooledGradient g(pass, image, first, spare);
    alignas(64) float grad_sums[kPanel], product_sums[kPanel];
    sum_gradients(y, g.data, g.stride, layer.height, layer.width, channels, grad_sums, product_sums);
    const int64_t valid = std::min(kPanel, layer.outputs - first);
    std::copy_n(grad_sums, valid, pass.grad_beta + image * layer.outputs + first);
    std::copy_n(product_sums, valid, pass.grad_gamma + image * layer.outputs + first);
  };
  if (pass.conv == nullptr) {
    Buffer means(count);
    std::fill_n(means.data(), count, 0.0f);
    std::copy_n(pass.mean, layer.outputs, means.data());
    return for_each_direct_panel(layer, pass.input, means.data(),
                                 [&](int64_t image, int64_t first, const float* y, const float*, const float*,
                                     float* spare) { sum(image, first, y, spare); });
  }
  torch::stable::parallel_for(0, layer.batch, 1, [&](int64_t begin, int64_t end) {
    Buffer y(positions * kPanel), spare((layer.height / 2) * (layer.width / 2) * kPanel);
    for (int64_t image = begin; image < end; ++image) {
      for (int64_t first = 0; first < layer.outputs; first += kPanel) {
        load_panel(layer, pass.conv, pass.mean, image, first, y.data());
        sum(image, first, y.data(), spare.data());
      }
    }
  });
}

#undef DDFAST_INLINE

}  // namespace DDFAST_BODY
