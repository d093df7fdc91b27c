// assemble_masked_features: feature maps of every coalition from those of a few (defined in ddfast/ops/reference.py).
//
// Nothing is computed: rows of channels are copied. Along a row of the map, neighbouring locations mostly see the same
// players, so a row falls into a few runs, found once a call; under one coalition a run comes from one variant, and
// runs from the same variant are joined into one memory copy. Bytes moved: the output written once, as much read from
// the variants, which stay in cache while the coalitions of an image pass over them. The speed of memory binds.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBytesPerTask = 64 * 1024;  // the least work worth handing to another thread

// Locations first .. last - 1 of a row, which see the same players: entry `players` of the table.
struct Run {
  int64_t first, last;
  const int32_t* players;
};

// Runs of each row h: runs[starts[h]] .. runs[starts[h + 1] - 1].
struct Runs {
  std::vector<Run> runs;
  std::vector<int64_t> starts;

  Runs(const int32_t* table, int64_t height, int64_t width, int64_t classes) {
    for (int64_t row = 0; row < height; ++row) {
      starts.push_back(static_cast<int64_t>(runs.size()));
      for (int64_t first = 0, last; first < width; first = last) {
        const int32_t* players = table + (row * width + first) * classes;
        for (last = first + 1; last < width && std::equal(players, players + classes, players + (last - first) * classes);)
          ++last;
        runs.push_back({first, last, players});
      }
    }
    starts.push_back(static_cast<int64_t>(runs.size()));
  }
};

int64_t variant_of(const int32_t* players, int64_t classes, const bool* coalition) {
  int64_t variant = 0;
  for (int64_t m = 0; m < classes; ++m) {
    if (players[m] >= 0 && coalition[players[m]]) variant |= int64_t{1} << m;
  }
  return variant;
}

// The maps [B * V, C, H, W] of variants in channels-last order: themselves where they are laid out so.
Tensor interleaved(const Tensor& variants) {
  const int64_t channels = variants.size(2), height = variants.size(3), width = variants.size(4);
  const int64_t wanted[] = {variants.size(1) * height * width * channels, height * width * channels, 1,
                            width * channels, channels};
  bool dense = true;
  for (int64_t dim = 0; dim < 5; ++dim) dense = dense && (variants.size(dim) == 1 || variants.stride(dim) == wanted[dim]);
  if (dense) return variants;
  Tensor copy = torch::stable::new_empty(
      variants, {variants.size(0), variants.size(1), height, width, channels}, variants.scalar_type());
  Tensor planes = torch::stable::transpose(torch::stable::transpose(copy, 3, 4), 2, 3);  // [B, V, C, H, W]
  torch::stable::copy_(planes, variants);
  return copy;
}

Tensor assemble_masked_features(const Tensor& variants, const Tensor& coalitions, const Tensor& table) {
  STD_TORCH_CHECK(variants.dim() == 5, "assemble_masked_features: variants must be [B, 2^M, C, H, W]");
  const int64_t batch = variants.size(0), patterns = variants.size(1), channels = variants.size(2),
                height = variants.size(3), width = variants.size(4);
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Int && table.dim() == 3 && table.size(0) == height &&
                      table.size(1) == width && table.size(2) < 31 && patterns == int64_t{1} << table.size(2),
                  "assemble_masked_features: table must be int32 [H, W, M] with 2^M variants");
  STD_TORCH_CHECK(coalitions.scalar_type() == ScalarType::Bool &&
                      (coalitions.dim() == 2 || (coalitions.dim() == 3 && coalitions.size(0) == batch)),
                  "assemble_masked_features: coalitions must be bool [K, d] or [B, K, d]");
  const int64_t count = coalitions.size(-2), players = coalitions.size(-1), classes = table.size(2);

  Tensor assembled = torch::stable::empty({batch * count, channels, height, width}, variants.scalar_type(),
                                          std::nullopt, variants.device(), std::nullopt,
                                          torch::headeronly::MemoryFormat::ChannelsLast);
  if (assembled.numel() == 0) return assembled;
  const Tensor maps = interleaved(variants), cells = torch::stable::contiguous(coalitions),
               dense_table = torch::stable::contiguous(table);
  const int32_t* entries = dense_table.const_data_ptr<int32_t>();
  STD_TORCH_CHECK(std::all_of(entries, entries + table.numel(), [&](int32_t p) { return -1 <= p && p < players; }),
                  "assemble_masked_features: table must name players from -1 to d - 1");
  const Runs runs(entries, height, width, classes);
  const bool* present = cells.const_data_ptr<bool>();
  const int64_t coalition_image_stride = coalitions.dim() == 3 ? count * players : 0;
  const char* source = static_cast<const char*>(maps.const_data_ptr());
  char* target = static_cast<char*>(assembled.mutable_data_ptr());
  const int64_t location_bytes = channels * static_cast<int64_t>(assembled.element_size());
  const int64_t row_bytes = width * location_bytes, map_bytes = height * row_bytes;

  torch::stable::parallel_for(
      0, batch * count * height, std::max<int64_t>(1, kBytesPerTask / row_bytes), [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) {
          const int64_t row = index % height, coalition = index / height % count, image = index / height / count;
          const bool* cell = present + image * coalition_image_stride + coalition * players;
          const char* map_row = source + image * patterns * map_bytes + row * row_bytes;
          char* target_row = target + index * row_bytes;
          const Run* run = runs.runs.data() + runs.starts[row];
          const Run* stop = runs.runs.data() + runs.starts[row + 1];
          while (run != stop) {
            const int64_t first = run->first, variant = variant_of(run->players, classes, cell);
            int64_t last = run->last;
            for (++run; run != stop && variant_of(run->players, classes, cell) == variant; ++run) last = run->last;
            std::memcpy(target_row + first * location_bytes, map_row + variant * map_bytes + first * location_bytes,
                        (last - first) * location_bytes);
          }
        }
      });
  return assembled;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ddfast_native, library) {
  library.def("assemble_masked_features(Tensor variants, Tensor coalitions, Tensor table) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ddfast_native, CPU, library) {
  library.impl("assemble_masked_features", TORCH_BOX(&assemble_masked_features));
}
