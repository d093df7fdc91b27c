// winograd_conv2d: 3x3 convolutions, stride 1, padding 1, by the minimal algorithm F(2x2, 3x3) of Winograd, as Lavin and
// Gray apply it ("Fast Algorithms for Convolutional Neural Networks", CVPR 2016). Defined in ddfast/ops/reference.py.
//
// A tile of 2x2 outputs takes 16 multiplications a pair of channels in place of 36. A thread takes a block of tiles at a
// time through three steps: transformed pixels V [16][inputs / 64][tiles][64]; products M [16][outputs / 32][tiles][32] of
// V and the transformed weights, 28 registers of sums in flight; transformed sums, to which the bias and a residual are added
// before the ReLU. Products bind, at the rate of the multiply-add units; V and M stay in the outer caches.
//
// Maps in bfloat16 are widened where they are read and rounded where they are written; all between is float.
//
// Masked images of one kind of coalition are alike in most places. Given a set of players for each map and, for each
// place of a tile, the players that it reads, a tile is computed once for all maps of an image whose sets are equal
// there, and copied to the others.
//
// A sum over input channels is taken in chains of 128 that are then added up, which keeps its rounding errors down and a
// chain's weights in the inner cache. Its order depends neither on the batch nor on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu_body.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define DDFAST_HAS_AVX512 1
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of the undefined registers of its own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#define DDFAST_AVX512F __attribute__((target("avx512f")))
#else
#define DDFAST_HAS_AVX512 0
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPoints = 16;   // of a transformed tile
constexpr int64_t kLanes = 16;    // floats of a register
constexpr int64_t kOutputs = 32;  // output channels of a panel of weights: two registers
constexpr int64_t kInputs = 64;   // input channels that lie side by side in V
constexpr int64_t kChain = 128;   // input channels summed in one chain; the sums of chains are added up in order
constexpr int64_t kPanel = 14;    // tiles multiplied at a time, 28 registers of sums
constexpr int64_t kBlock = 56;    // tiles of a block, at most

bool supported() { return ddfast::cpu_body() >= ddfast::CpuBody::kAvx512; }

struct Shape {
  int64_t batch, inputs, outputs, height, width;
  int64_t tile_rows() const { return (height + 1) / 2; }
  int64_t tile_cols() const { return (width + 1) / 2; }
  int64_t tiles() const { return batch * tile_rows() * tile_cols(); }
};

#if DDFAST_HAS_AVX512

// Floats from a point of V or M to the next. The odd line keeps the points of a tile out of each other's cache sets.
constexpr int64_t point_stride(int64_t channels) { return kBlock * channels + kLanes; }

DDFAST_AVX512F inline __m512 load(const float* from) { return _mm512_loadu_ps(from); }

DDFAST_AVX512F inline __m512 load(const uint16_t* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

DDFAST_AVX512F inline void store(float* to, __m512 values) { _mm512_storeu_ps(to, values); }

// To the nearest bfloat16, ties to even; NaN becomes the quiet NaN.
DDFAST_AVX512F inline void store(uint16_t* to, __m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i high = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(high));
}

// V of one tile: d -> B^T d B, 16 channels at a time. pixels[4 i + j] is where the channels of a pixel begin.
template <typename Element>
DDFAST_AVX512F void transform_pixels(const std::array<const Element*, kPoints>& pixels, int64_t channels, int64_t tile,
                                     float* v) {
  const int64_t stride = point_stride(channels);
  for (int64_t c = 0; c < channels; c += kLanes) {
    __m512 d[4][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) d[i][j] = load(pixels[4 * i + j] + c);
    }
    float* target = v + (c / kInputs * kBlock + tile) * kInputs + c % kInputs;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512 first = _mm512_sub_ps(d[0][j], d[2][j]), second = _mm512_add_ps(d[1][j], d[2][j]);
      const __m512 third = _mm512_sub_ps(d[2][j], d[1][j]), fourth = _mm512_sub_ps(d[1][j], d[3][j]);
      d[0][j] = first, d[1][j] = second, d[2][j] = third, d[3][j] = fourth;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      _mm512_storeu_ps(target + (4 * i) * stride, _mm512_sub_ps(d[i][0], d[i][2]));
      _mm512_storeu_ps(target + (4 * i + 1) * stride, _mm512_add_ps(d[i][1], d[i][2]));
      _mm512_storeu_ps(target + (4 * i + 2) * stride, _mm512_sub_ps(d[i][2], d[i][1]));
      _mm512_storeu_ps(target + (4 * i + 3) * stride, _mm512_sub_ps(d[i][1], d[i][3]));
    }
  }
}

// m[tile][0 .. 31] (+)= sum over channels of v[tile][channel] * panel[channel][0 .. 31], for `Tiles` tiles.
template <int Tiles>
DDFAST_AVX512F void multiply(const float* v, const float* panel, int64_t channels, float* m, bool add) {
  __m512 sums[Tiles][2];
#pragma GCC unroll 14
  for (int t = 0; t < Tiles; ++t) sums[t][0] = sums[t][1] = _mm512_setzero_ps();
  for (int64_t c = 0; c < channels; c += kInputs, v += kBlock * kInputs) {
    for (int64_t k = 0; k < kInputs; ++k, panel += kOutputs) {
      const __m512 low = _mm512_loadu_ps(panel), high = _mm512_loadu_ps(panel + kLanes);
#pragma GCC unroll 14
      for (int t = 0; t < Tiles; ++t) {
        const __m512 pixel = _mm512_set1_ps(v[t * kInputs + k]);
        sums[t][0] = _mm512_fmadd_ps(pixel, low, sums[t][0]);
        sums[t][1] = _mm512_fmadd_ps(pixel, high, sums[t][1]);
      }
    }
  }
#pragma GCC unroll 14
  for (int t = 0; t < Tiles; ++t) {
    float* low = m + t * kOutputs;
    float* high = low + kLanes;
    _mm512_storeu_ps(low, add ? _mm512_add_ps(_mm512_loadu_ps(low), sums[t][0]) : sums[t][0]);
    _mm512_storeu_ps(high, add ? _mm512_add_ps(_mm512_loadu_ps(high), sums[t][1]) : sums[t][1]);
  }
}

using Multiply = void (*)(const float*, const float*, int64_t, float*, bool);

template <int... Tiles>
constexpr std::array<Multiply, sizeof...(Tiles)> multiplies(std::integer_sequence<int, Tiles...>) {
  return {&multiply<Tiles + 1>...};
}

// The four outputs of one tile: m -> A^T m A + bias + other, then the ReLU. Outputs outside the map are null.
template <typename Element>
DDFAST_AVX512F void transform_sums(const float* m, const float* bias, const std::array<const Element*, 4>& other,
                                   const std::array<Element*, 4>& outputs, int64_t channels, bool relu) {
  const int64_t stride = point_stride(channels);
  for (int64_t c = 0; c < channels; c += kLanes) {
    const float* sums = m + c / kOutputs * kBlock * kOutputs + c % kOutputs;
    __m512 rows[2][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512 first = _mm512_loadu_ps(sums + j * stride), second = _mm512_loadu_ps(sums + (4 + j) * stride);
      const __m512 third = _mm512_loadu_ps(sums + (8 + j) * stride);
      const __m512 fourth = _mm512_loadu_ps(sums + (12 + j) * stride);
      rows[0][j] = _mm512_add_ps(_mm512_add_ps(first, second), third);
      rows[1][j] = _mm512_sub_ps(_mm512_sub_ps(second, third), fourth);
    }
    const __m512 shift = bias == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(bias + c);
#pragma GCC unroll 4
    for (int index = 0; index < 4; ++index) {
      if (outputs[index] == nullptr) continue;
      const __m512* row = rows[index / 2];
      __m512 value = index % 2 == 0 ? _mm512_add_ps(_mm512_add_ps(row[0], row[1]), row[2])
                                    : _mm512_sub_ps(_mm512_sub_ps(row[1], row[2]), row[3]);
      value = _mm512_add_ps(value, shift);
      if (other[index] != nullptr) value = _mm512_add_ps(value, load(other[index] + c));
      if (relu) value = _mm512_max_ps(_mm512_setzero_ps(), value);  // NaN, the second operand, stays
      store(outputs[index] + c, value);
    }
  }
}

struct Place {
  int64_t image, row, col;  // of a tile's first output
};

Place place_of(const Shape& shape, int64_t tile) {
  const int64_t inside = tile % (shape.tile_rows() * shape.tile_cols());
  return {tile / (shape.tile_rows() * shape.tile_cols()), inside / shape.tile_cols() * 2,
          inside % shape.tile_cols() * 2};
}

// The `count` tiles of a list. `zeros` stands for pixels outside the map.
template <typename Element>
void convolve(const Shape& shape, const int64_t* tiles, int64_t count, const Element* input, const float* weight,
              const float* bias, const Element* other, bool relu, const Element* zeros, float* v, float* m,
              Element* output) {
  static constexpr auto by_tiles = multiplies(std::make_integer_sequence<int, kPanel>());
  for (int64_t t = 0; t < count; ++t) {
    const Place at = place_of(shape, tiles[t]);
    std::array<const Element*, kPoints> pixels;
    for (int64_t i = 0; i < 4; ++i) {
      for (int64_t j = 0; j < 4; ++j) {
        const int64_t row = at.row + i - 1, col = at.col + j - 1;
        const bool inside = 0 <= row && row < shape.height && 0 <= col && col < shape.width;
        pixels[4 * i + j] =
            inside ? input + ((at.image * shape.height + row) * shape.width + col) * shape.inputs : zeros;
      }
    }
    transform_pixels(pixels, shape.inputs, t, v);
  }
  const int64_t panels = (count + kPanel - 1) / kPanel;  // of about equal size
  for (int64_t point = 0; point < kPoints; ++point) {
    const float* points = v + point * point_stride(shape.inputs);
    for (int64_t out = 0; out < shape.outputs; out += kOutputs) {
      float* sums = m + point * point_stride(shape.outputs) + out * kBlock;
      for (int64_t c = 0; c < shape.inputs; c += kChain) {
        const int64_t chain = std::min(kChain, shape.inputs - c);
        for (int64_t p = 0, begin = 0; p < panels; ++p) {
          const int64_t end = count * (p + 1) / panels;
          by_tiles[end - begin - 1](points + c * kBlock + begin * kInputs, weight, chain,
                                    sums + begin * kOutputs, c > 0);
          begin = end;
        }
        weight += chain * kOutputs;
      }
    }
  }
  for (int64_t t = 0; t < count; ++t) {
    const Place at = place_of(shape, tiles[t]);
    std::array<const Element*, 4> terms{};
    std::array<Element*, 4> targets{};
    for (int64_t index = 0; index < 4; ++index) {
      const int64_t row = at.row + index / 2, col = at.col + index % 2;
      if (row >= shape.height || col >= shape.width) continue;
      const int64_t offset = ((at.image * shape.height + row) * shape.width + col) * shape.outputs;
      targets[index] = output + offset;
      if (other != nullptr) terms[index] = other + offset;
    }
    transform_sums(m + t * kOutputs, bias, terms, targets, shape.outputs, relu);
  }
}

// For every tile the one to compute in its stead: of the maps of an image, the first whose set of players is the same
// among those that the tile reads. `sets` [images, maps] and `reads` [tiles of a map] are bits, one for each player.
std::vector<int64_t> representatives(const Shape& shape, const int64_t* sets, int64_t maps, const int64_t* reads) {
  const int64_t per_map = shape.tile_rows() * shape.tile_cols();
  std::vector<int64_t> stands_for(shape.tiles());
  torch::stable::parallel_for(0, per_map, 16, [&](int64_t begin, int64_t end) {
    std::vector<std::pair<int64_t, int64_t>> found;  // (set, map)
    for (int64_t image = 0; image < shape.batch; image += maps) {
      for (int64_t inside = begin; inside < end; ++inside) {
        found.clear();
        for (int64_t map = image; map < image + maps; ++map) {
          const int64_t set = sets[map] & reads[inside];
          const auto same = [&](const auto& each) { return each.first == set; };
          const auto known = std::find_if(found.begin(), found.end(), same);
          const int64_t first = known == found.end() ? map : known->second;
          if (first == map) found.emplace_back(set, map);
          stands_for[map * per_map + inside] = first * per_map + inside;
        }
      }
    }
  });
  return stands_for;
}

// Copies to a tile of the output another of the same place.
template <typename Element>
void copy_tile(const Shape& shape, int64_t from, int64_t to, Element* output) {
  const Place source = place_of(shape, from), target = place_of(shape, to);
  const int64_t columns = std::min<int64_t>(2, shape.width - target.col);
  for (int64_t row = target.row; row < std::min(target.row + 2, shape.height); ++row) {
    const auto pixel = [&](int64_t image) {
      return output + ((image * shape.height + row) * shape.width + target.col) * shape.outputs;
    };
    std::copy_n(pixel(source.image), columns * shape.outputs, pixel(target.image));
  }
}

// The whole batch. `sets` is null where every tile is computed.
template <typename Element>
void convolve_batch(const Shape& shape, const Element* input, const float* weight, const float* bias,
                    const Element* other, bool relu, const int64_t* sets, int64_t maps, const int64_t* reads,
                    Element* output) {
  std::vector<int64_t> stands_for, computed;
  if (sets == nullptr) {
    computed.resize(shape.tiles());
    std::iota(computed.begin(), computed.end(), 0);
  } else {
    stands_for = representatives(shape, sets, maps, reads);
    for (int64_t tile = 0; tile < shape.tiles(); ++tile) {
      if (stands_for[tile] == tile) computed.push_back(tile);
    }
  }
  const std::vector<Element> zeros(shape.inputs);
  const int64_t tiles = computed.size(), blocks = (tiles + kBlock - 1) / kBlock;  // of about equal size
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> v(kPoints * point_stride(shape.inputs)), m(kPoints * point_stride(shape.outputs));
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = tiles * block / blocks, last = tiles * (block + 1) / blocks;
      convolve(shape, computed.data() + first, last - first, input, weight, bias, other, relu, zeros.data(), v.data(),
               m.data(), output);
    }
  });
  if (tiles == shape.tiles()) return;
  torch::stable::parallel_for(0, shape.tiles(), 64, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      if (stands_for[tile] != tile) copy_tile(shape, stands_for[tile], tile, output);
    }
  });
}

// Where a weight lies: value (p, q, tap) at from + p * panel + q * term + tap, p the channels of a panel, q the summed ones.
struct Weights {
  const float* from;
  int64_t panel, term;
  bool flipped;  // taps in reverse
};

// One row of G or of its transpose from three rows: (1, 0, 0), (1/2, 1/2, 1/2), (1/2, -1/2, 1/2), (0, 0, 1).
DDFAST_AVX512F inline void transform_taps(const __m512d (&g)[3], __m512d (&points)[4]) {
  const __m512d half = _mm512_set1_pd(0.5), ends = _mm512_add_pd(g[0], g[2]);
  points[0] = g[0];
  points[1] = _mm512_mul_pd(half, _mm512_add_pd(ends, g[1]));
  points[2] = _mm512_mul_pd(half, _mm512_sub_pd(ends, g[1]));
  points[3] = g[2];
}

// G g G^T for 16 channels of a panel, of every term begin .. end - 1: to[point * points + term * kOutputs + channel].
DDFAST_AVX512F void transform_weights(const Weights& weights, int64_t begin, int64_t end, int64_t points, float* to) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i places = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(weights.panel)));
  const bool side_by_side = weights.panel < weights.term;  // what a term takes; the next one's is far away
  for (int64_t q = begin; q < end; ++q) {
    for (int64_t ahead = 0; side_by_side && ahead < 9 * kLanes; ahead += kLanes) {
      _mm_prefetch(weights.from + std::min(q + 4, end - 1) * weights.term + ahead, _MM_HINT_T0);
    }
    __m512 taps[9];
#pragma GCC unroll 9
    for (int tap = 0; tap < 9; ++tap) {
      taps[weights.flipped ? 8 - tap : tap] = _mm512_i32gather_ps(places, weights.from + q * weights.term + tap, 4);
    }
    float* target = to + q * kOutputs;
    __m256 low[kPoints];
#pragma GCC unroll 2
    for (int side = 0; side < 2; ++side) {
      __m512d columns[3][4];
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) {
        __m512d g[3];
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) {
          const __m512d bits = _mm512_castps_pd(taps[3 * i + j]);
          g[i] = _mm512_cvtps_pd(
              _mm256_castpd_ps(side == 0 ? _mm512_castpd512_pd256(bits) : _mm512_extractf64x4_pd(bits, 1)));
        }
        transform_taps(g, columns[j]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512d row[3] = {columns[0][i], columns[1][i], columns[2][i]};
        __m512d transformed[4];
        transform_taps(row, transformed);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const __m256 rounded = _mm512_cvtpd_ps(transformed[j]);
          if (side == 0) {
            low[4 * i + j] = rounded;
          } else {
            const __m512d both = _mm512_insertf64x4(
                _mm512_castpd256_pd512(_mm256_castps_pd(low[4 * i + j])), _mm256_castps_pd(rounded), 1);
            _mm512_storeu_ps(target + (4 * i + j) * points, _mm512_castpd_ps(both));
          }
        }
      }
    }
  }
}

#endif

Tensor winograd_weight(const Tensor& weight, bool transposed) {
  STD_TORCH_CHECK(supported(), "winograd_weight: this CPU has no AVX-512");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == ScalarType::Float && weight.size(2) == 3 &&
                      weight.size(3) == 3 && weight.size(transposed ? 1 : 0) % kOutputs == 0,
                  "winograd_weight: weight must be float32 [O, C, 3, 3], O (C, transposed) a multiple of 32");
  const int64_t outputs = weight.size(transposed ? 1 : 0), inputs = weight.size(transposed ? 0 : 1);
  Tensor panels = torch::stable::new_empty(weight, {kPoints, outputs / kOutputs, inputs, kOutputs});
  if (panels.numel() == 0) return panels;
#if DDFAST_HAS_AVX512
  const Tensor dense = torch::stable::contiguous(weight);
  const float* from = dense.const_data_ptr<float>();
  float* to = panels.mutable_data_ptr<float>();
  const int64_t row = weight.size(1) * 9, halves = outputs / kLanes;
  torch::stable::parallel_for(0, halves, 1, [&](int64_t begin, int64_t end) {
    for (int64_t half = begin; half < end; ++half) {
      const int64_t panel = transposed ? 9 : row, term = transposed ? row : 9;
      transform_weights({from + half * kLanes * panel, panel, term, transposed}, 0, inputs, outputs * inputs,
                        to + half / 2 * inputs * kOutputs + half % 2 * kLanes);
    }
  });
#endif
  return panels;
}

Tensor channels_last(const Tensor& tensor) {
  return torch::stable::contiguous(tensor, torch::headeronly::MemoryFormat::ChannelsLast);
}

Tensor winograd_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& other, bool relu, const std::optional<Tensor>& sets,
                       const std::optional<Tensor>& reads) {
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(supported(), "winograd_conv2d: this CPU has no AVX-512");
  STD_TORCH_CHECK(input.dim() == 4 && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16),
                  "winograd_conv2d: input must be float32 or bfloat16 [B, C, H, W]");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == ScalarType::Float && weight.size(0) == kPoints &&
                      weight.size(2) == input.size(1) && weight.size(3) == kOutputs && input.size(1) % kInputs == 0,
                  "winograd_conv2d: weight must be float32 [16, O / 32, C, 32] with C a multiple of 64");
  const Shape shape{input.size(0), input.size(1), weight.size(1) * kOutputs, input.size(2), input.size(3)};
  STD_TORCH_CHECK(!bias || (bias->scalar_type() == ScalarType::Float && bias->numel() == shape.outputs),
                  "winograd_conv2d: bias must be float32 [O]");
  STD_TORCH_CHECK(!other || (other->scalar_type() == dtype && other->dim() == 4 && other->size(0) == shape.batch &&
                             other->size(1) == shape.outputs && other->size(2) == shape.height &&
                             other->size(3) == shape.width),
                  "winograd_conv2d: other must be [B, O, H, W] in the dtype of input");
  STD_TORCH_CHECK(sets.has_value() == reads.has_value(), "winograd_conv2d: sets and reads go together");
  STD_TORCH_CHECK(!sets || (sets->scalar_type() == ScalarType::Long && sets->dim() == 2 &&
                            sets->numel() == shape.batch && reads->scalar_type() == ScalarType::Long &&
                            reads->numel() == shape.tile_rows() * shape.tile_cols()),
                  "winograd_conv2d: sets must be int64 [images, maps], B in all, and reads int64, one a tile");
  Tensor output = torch::stable::empty({shape.batch, shape.outputs, shape.height, shape.width}, dtype, std::nullopt,
                                       input.device(), std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  if (output.numel() == 0) return output;
#if DDFAST_HAS_AVX512
  const Tensor pixels = channels_last(input), weights = torch::stable::contiguous(weight);
  const Tensor shift = bias ? torch::stable::contiguous(*bias) : input, terms = other ? channels_last(*other) : input;
  const Tensor players = sets ? torch::stable::contiguous(*sets) : input;
  const Tensor places = reads ? torch::stable::contiguous(*reads) : input;
  const auto run = [&]<typename Element>(std::type_identity<Element>) {
    convolve_batch(shape, static_cast<const Element*>(pixels.const_data_ptr()), weights.const_data_ptr<float>(),
                   bias ? shift.const_data_ptr<float>() : nullptr,
                   other ? static_cast<const Element*>(terms.const_data_ptr()) : nullptr, relu,
                   sets ? players.const_data_ptr<int64_t>() : nullptr, sets ? sets->size(1) : 1,
                   reads ? places.const_data_ptr<int64_t>() : nullptr, static_cast<Element*>(output.mutable_data_ptr()));
  };
  if (dtype == ScalarType::Float) {
    run(std::type_identity<float>{});
  } else {
    run(std::type_identity<uint16_t>{});
  }
#endif
  return output;
}

bool winograd_supported() { return supported(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ddfast_native, library) {
  library.def(
      "winograd_conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor? other, bool relu, Tensor? sets=None, "
      "Tensor? reads=None) -> Tensor");
  library.def("winograd_weight(Tensor weight, bool transposed) -> Tensor");
  library.def("winograd_supported() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(ddfast_native, CPU, library) {
  library.impl("winograd_conv2d", TORCH_BOX(&winograd_conv2d));
  library.impl("winograd_weight", TORCH_BOX(&winograd_weight));
}

STABLE_TORCH_LIBRARY_IMPL(ddfast_native, CompositeExplicitAutograd, library) {
  library.impl("winograd_supported", TORCH_BOX(&winograd_supported));
}
