// Sums of products on CPUs with AVX-512: the inner loops of grad_sq_norm_*.
//
// All of it is C += A^T B, where a row of A and the row of B beside it are one term of the sum. A row need not follow the
// one before it: rows are addressed by two strides (the rows and columns of an image), so that a convolution's input is
// read where it lies in the image instead of being unfolded. The unit of memory is a word of 32 bits: one float, or two
// bfloat16 of two terms side by side, whose products one instruction adds to a float.
//
// Only the functions marked DDFAST_AVX512 hold such instructions, and they call nothing but each other and intrinsics,
// so that none of them can leak into code for another CPU. Call them only where `supported()`, and those for bfloat16
// (words of two, elements of 16 bits that are written) only where `multiplies_bfloat16()`: floats need no more than the
// AVX-512 of 2017.

#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define DDFAST_HAS_AVX512 1

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of the undefined registers of its own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "cpu_body.h"

namespace ddfast::avx512 {

// Without avx512bf16: a template has one target for all its types. Its two instructions are written out instead.
#define DDFAST_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))

using Pair = uint32_t;  // two bfloat16, the first in the low half

constexpr int64_t kLanes = 16;      // words of a register
constexpr int64_t kPanel = 14;      // columns of A that are multiplied at a time, each with ...
constexpr int64_t kChunk = 32;      // ... this many columns of B: 28 registers of sums
constexpr int64_t kTermBlock = 64;  // of squares, whose sums grow, that are added up before they join a longer sum

inline bool supported() { return cpu_body() >= CpuBody::kAvx512; }

inline bool multiplies_bfloat16() { return cpu_body() >= CpuBody::kAvx512Bf16; }

// Rows of words: row (i, j) begins at words + i * outer + j * inner.
template <typename Word>
struct Rows {
  const Word* words;
  int64_t outer, inner;

  Rows at(int64_t i, int64_t j, int64_t column) const {
    return {words + i * outer + j * inner + column, outer, inner};
  }
};

DDFAST_AVX512 inline __m512 load(__mmask16 mask, const float* words) {
  return _mm512_maskz_loadu_ps(mask, words);
}

DDFAST_AVX512 inline __m512i load(__mmask16 mask, const Pair* words) {
  return _mm512_maskz_loadu_epi32(mask, words);
}

DDFAST_AVX512 inline __m512 broadcast(float word) { return _mm512_set1_ps(word); }

DDFAST_AVX512 inline __m512i broadcast(Pair word) { return _mm512_set1_epi32(static_cast<int>(word)); }

DDFAST_AVX512 inline __m512 multiply_add(__m512 a, __m512 b, __m512 sum) { return _mm512_fmadd_ps(a, b, sum); }

DDFAST_AVX512 inline __m512 multiply_add(__m512i a, __m512i b, __m512 sum) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

DDFAST_AVX512 inline __mmask16 lanes(int64_t count) {
  return count >= kLanes ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << count) - 1);
}

// The sum of the squares of 16 floats, or of their products, in eight lanes of double.
DDFAST_AVX512 inline __m512d add_products(__m512 a, __m512 b, __m512d sum) {
  sum = _mm512_fmadd_pd(
      _mm512_cvtps_pd(_mm512_castps512_ps256(a)), _mm512_cvtps_pd(_mm512_castps512_ps256(b)), sum);
  return _mm512_fmadd_pd(
      _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(b, 1)), sum);
}

// c[m][n] (+)= sum over rows of a[row][m] * b[row][n], for M columns of a and the lanes of N registers of b. The sum is
// complete before it is added, so that many short calls round less than one long one.
template <typename Word, int M, int N>
DDFAST_AVX512 void update(
    Rows<Word> a, Rows<Word> b, int64_t outer, int64_t inner, int64_t width, float* c, int64_t c_stride, bool add) {
  const __mmask16 last = lanes(width - (N - 1) * kLanes);
  __m512 sums[M][N];
#pragma GCC unroll 14
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sums[m][n] = _mm512_setzero_ps();
  }
  for (int64_t i = 0; i < outer; ++i) {
    const Word* left = a.words + i * a.outer;
    const Word* right = b.words + i * b.outer;
    for (int64_t j = 0; j < inner; ++j, left += a.inner, right += b.inner) {
      decltype(load(last, right)) row[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) row[n] = load(n == N - 1 ? last : 0xffff, right + n * kLanes);
#pragma GCC unroll 14
      for (int m = 0; m < M; ++m) {
        const auto factor = broadcast(left[m]);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) sums[m][n] = multiply_add(factor, row[n], sums[m][n]);
      }
    }
  }
#pragma GCC unroll 14
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      const __mmask16 mask = n == N - 1 ? last : 0xffff;
      float* to = c + m * c_stride + n * kLanes;
      _mm512_mask_storeu_ps(to, mask, add ? _mm512_add_ps(load(mask, to), sums[m][n]) : sums[m][n]);
    }
  }
}

template <typename Word>
using Update = void (*)(Rows<Word>, Rows<Word>, int64_t, int64_t, int64_t, float*, int64_t, bool);

template <typename Word, int N, int... M>
constexpr std::array<Update<Word>, sizeof...(M)> updates(std::integer_sequence<int, M...>) {
  return {&update<Word, M + 1, N>...};
}

// The update of `panel` (1 to kPanel) columns of A and `width` (1 to kChunk) of B.
template <typename Word>
Update<Word> update_of(int64_t panel, int64_t width) {
  static constexpr auto narrow = updates<Word, 1>(std::make_integer_sequence<int, kPanel>());
  static constexpr auto wide = updates<Word, 2>(std::make_integer_sequence<int, kPanel>());
  return (width <= kLanes ? narrow : wide)[panel - 1];
}

// Calls use(begin, size) for the fewest panels, of about equal size, that make up `columns`.
template <typename Use>
void for_each_panel(int64_t columns, const Use& use) {
  const int64_t panels = (columns + kPanel - 1) / kPanel;
  for (int64_t p = 0, begin = 0; p < panels; ++p) {
    const int64_t end = columns * (p + 1) / panels;
    use(begin, end - begin);
    begin = end;
  }
}

// Sum of the squares of rows [count][width], `stride` apart.
DDFAST_AVX512 inline double squares(const float* values, int64_t count, int64_t width, int64_t stride) {
  __m512d sum = _mm512_setzero_pd();
  for (int64_t i = 0; i < count; ++i, values += stride) {
    for (int64_t k = 0; k < width; k += kLanes) {
      const __m512 part = load(lanes(width - k), values + k);
      sum = add_products(part, part, sum);
    }
  }
  return _mm512_reduce_add_pd(sum);
}

// The upper triangle, and some of the lower, of C = A^T A for A [terms][columns].
template <typename Word>
void gram(const Word* a, int64_t terms, int64_t columns, float* c) {
  const Rows<Word> rows{a, 0, columns};
  for (int64_t n = 0; n < columns; n += kChunk) {
    const int64_t width = std::min(kChunk, columns - n);
    for_each_panel(n + width, [&](int64_t m, int64_t panel) {
      for (int64_t k = 0; k < terms; k += kTermBlock) {
        update_of<Word>(panel, width)(
            rows.at(0, k, m), rows.at(0, k, n), 1, std::min(kTermBlock, terms - k), width, c + m * columns + n, columns,
            k > 0);
      }
    });
  }
}

// The sum over rows and columns of left * right, but in the first row from column `first` on.
DDFAST_AVX512 inline double rows_dot(
    const float* left, int64_t left_stride, const float* right, int64_t right_stride, int64_t rows, int64_t first,
    int64_t columns) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < rows; ++i, left += left_stride, right += right_stride) {
    for (int64_t k = i == 0 ? first : 0; k < columns; k += kLanes) {
      const __mmask16 mask = lanes(columns - k);
      sum = _mm512_fmadd_ps(load(mask, left + k), load(mask, right + k), sum);
    }
  }
  return _mm512_reduce_add_pd(
      _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(sum)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(sum, 1))));
}

// c[k] = the sum over rows of a[row][k] * b[row][k].
DDFAST_AVX512 inline void update_elementwise(
    Rows<float> a, Rows<float> b, int64_t outer, int64_t inner, int64_t width, float* c) {
  for (int64_t k = 0; k < width; k += kLanes) {
    const __mmask16 mask = lanes(width - k);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < outer; ++i) {
      const float* left = a.words + i * a.outer + k;
      const float* right = b.words + i * b.outer + k;
      for (int64_t j = 0; j < inner; ++j, left += a.inner, right += b.inner) {
        sum = _mm512_fmadd_ps(load(mask, left), load(mask, right), sum);
      }
    }
    _mm512_mask_storeu_ps(c + k, mask, sum);
  }
}

DDFAST_AVX512 inline __m512i load_word(__mmask16 mask, const float* at) { return _mm512_maskz_loadu_epi32(mask, at); }
DDFAST_AVX512 inline __m512i load_word(__mmask16 mask, const Pair* at) { return _mm512_maskz_loadu_epi32(mask, at); }
DDFAST_AVX512 inline __m512i load_word(__mmask16 mask, const uint16_t* at) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at));
}

DDFAST_AVX512 inline void store_word(float* at, __mmask16 mask, __m512i words) {
  _mm512_mask_storeu_epi32(at, mask, words);
}
DDFAST_AVX512 inline void store_word(Pair* at, __mmask16 mask, __m512i words) {
  _mm512_mask_storeu_epi32(at, mask, words);
}
DDFAST_AVX512 inline void store_word(uint16_t* at, __mmask16 mask, __m512i words) {
  _mm256_mask_storeu_epi16(at, mask, _mm512_cvtepi32_epi16(words));
}

// to[column][row] = from[row][column] for elements of 16 or 32 bits, 16 by 16.
template <typename Element>
DDFAST_AVX512 void transpose(
    const Element* from, int64_t from_stride, Element* to, int64_t to_stride, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int64_t height = std::min<int64_t>(kLanes, rows - r);
    const __mmask16 row_mask = lanes(height);
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int64_t width = std::min<int64_t>(kLanes, columns - c);
      const __mmask16 column_mask = lanes(width);
      __m512i in[kLanes], out[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        in[i] = i < height ? load_word(column_mask, from + (r + i) * from_stride + c) : _mm512_setzero_si512();
      }
#pragma GCC unroll 8
      for (int i = 0; i < kLanes; i += 2) {  // pairs of rows
        out[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
        out[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kLanes; i += 4) {  // fours: in[i + k] holds columns k, k + 4, k + 8 and k + 12
        in[i] = _mm512_unpacklo_epi64(out[i], out[i + 2]);
        in[i + 1] = _mm512_unpackhi_epi64(out[i], out[i + 2]);
        in[i + 2] = _mm512_unpacklo_epi64(out[i + 1], out[i + 3]);
        in[i + 3] = _mm512_unpackhi_epi64(out[i + 1], out[i + 3]);
      }
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const __m512i even = _mm512_shuffle_i32x4(in[k], in[k + 4], 0x88);  // quarters 0 and 2 of each
        const __m512i odd = _mm512_shuffle_i32x4(in[k], in[k + 4], 0xdd);
        const __m512i even_below = _mm512_shuffle_i32x4(in[k + 8], in[k + 12], 0x88);
        const __m512i odd_below = _mm512_shuffle_i32x4(in[k + 8], in[k + 12], 0xdd);
        out[k] = _mm512_shuffle_i32x4(even, even_below, 0x88);
        out[k + 4] = _mm512_shuffle_i32x4(odd, odd_below, 0x88);
        out[k + 8] = _mm512_shuffle_i32x4(even, even_below, 0xdd);
        out[k + 12] = _mm512_shuffle_i32x4(odd, odd_below, 0xdd);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (i < width) store_word(to + (c + i) * to_stride + r, row_mask, out[i]);
      }
    }
  }
}

// to[k] = from[k] in the low half and next[k] in the high half; `next` may be null, for zeros.
DDFAST_AVX512 inline void interleave(const uint16_t* from, const uint16_t* next, Pair* to, int64_t count) {
  for (int64_t k = 0; k < count; k += kLanes) {
    const __mmask16 mask = lanes(count - k);
    __m512i pair = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + k));
    if (next != nullptr) {
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, next + k));
      pair = _mm512_or_si512(pair, _mm512_slli_epi32(high, 16));
    }
    _mm512_mask_storeu_epi32(to + k, mask, pair);
  }
}

// --- one element of 16 bits (bfloat16) or 32 (float) a lane

DDFAST_AVX512 inline __m512 load_floats(__mmask16 mask, const float* at) { return _mm512_maskz_loadu_ps(mask, at); }
DDFAST_AVX512 inline __m512 load_floats(__mmask16 mask, const uint16_t* at) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(load_word(mask, at), 16));
}

DDFAST_AVX512 inline void store_floats(float* at, __mmask16 mask, __m512 values) {
  _mm512_mask_storeu_ps(at, mask, values);
}
DDFAST_AVX512 inline void store_floats(uint16_t* at, __mmask16 mask, __m512 values) {
  __m256i rounded;
  asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(values));
  _mm256_mask_storeu_epi16(at, mask, rounded);
}

// A channel of a normalisation: normalised = (x - mean) * rstd, gradient = scale * g - offset - slope * normalised.
struct Normalization {
  __m512 mean, rstd, scale, offset, slope;
};

// Lanes of g into its sum, and of g * normalised into theirs; the gradient at the input is written where kWrite.
template <bool kWrite, typename Element>
DDFAST_AVX512 inline void normalize(
    __mmask16 mask, const Element* x, const Element* g, Element* out, const Normalization& channel, __m512& grad_sum,
    __m512& product_sum) {
  const __m512 grad = load_floats(mask, g);
  const __m512 normalized = _mm512_maskz_mul_ps(mask, _mm512_sub_ps(load_floats(mask, x), channel.mean), channel.rstd);
  grad_sum = _mm512_add_ps(grad_sum, grad);
  product_sum = _mm512_fmadd_ps(grad, normalized, product_sum);
  if constexpr (kWrite) {
    const __m512 less = _mm512_fmadd_ps(channel.slope, normalized, channel.offset);
    store_floats(out, mask, _mm512_fmsub_ps(channel.scale, grad, less));
  }
}

// A plane of one channel, whose five numbers are at `channel`. Adds to sums[0] and sums[1].
template <bool kWrite, typename Element>
DDFAST_AVX512 void normalize_plane(
    const Element* x, const Element* g, Element* out, int64_t count, const float* channel, double* sums) {
  const Normalization values{
      _mm512_set1_ps(channel[0]), _mm512_set1_ps(channel[1]), _mm512_set1_ps(channel[2]), _mm512_set1_ps(channel[3]),
      _mm512_set1_ps(channel[4])};
  for (int64_t begin = 0; begin < count; begin += kTermBlock * kLanes) {
    const int64_t end = std::min(begin + kTermBlock * kLanes, count);
    __m512 grad_sum = _mm512_setzero_ps(), product_sum = _mm512_setzero_ps();
    for (int64_t k = begin; k < end; k += kLanes) {
      normalize<kWrite>(lanes(end - k), x + k, g + k, out + k, values, grad_sum, product_sum);
    }
    sums[0] += static_cast<double>(_mm512_reduce_add_ps(grad_sum));
    sums[1] += static_cast<double>(_mm512_reduce_add_ps(product_sum));
  }
}

// Rows [count, width] of `width` channels, whose five numbers are at `channels` [5, width]. Adds to sums [2, width].
template <bool kWrite, typename Element>
DDFAST_AVX512 void normalize_rows(
    const Element* x, const Element* g, Element* out, int64_t count, int64_t width, const float* channels,
    double* sums) {
  for (int64_t begin = 0; begin < count; begin += kTermBlock) {
    const int64_t end = std::min(begin + kTermBlock, count);
    for (int64_t c = 0; c < width; c += kLanes) {
      const __mmask16 mask = lanes(width - c);
      const float* channel = channels + c;
      const Normalization values{
          load(mask, channel), load(mask, channel + width), load(mask, channel + 2 * width),
          load(mask, channel + 3 * width), load(mask, channel + 4 * width)};
      __m512 grad_sum = _mm512_setzero_ps(), product_sum = _mm512_setzero_ps();
      for (int64_t at = begin * width + c; at < end * width; at += width) {
        normalize<kWrite>(mask, x + at, g + at, out + at, values, grad_sum, product_sum);
      }
      float parts[2 * kLanes];
      _mm512_storeu_ps(parts, grad_sum);
      _mm512_storeu_ps(parts + kLanes, product_sum);
      for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, width - c); ++lane) {
        sums[c + lane] += static_cast<double>(parts[lane]);
        sums[width + c + lane] += static_cast<double>(parts[kLanes + lane]);
      }
    }
  }
}

}  // namespace ddfast::avx512
#else
#define DDFAST_HAS_AVX512 0
#endif
