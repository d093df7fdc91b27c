// noisy_crop_boxes: from a heatmap to crop boxes (defined in ddfast/ops/reference.py).
//
// Its bits are a promise: every body of this op does the same IEEE single-precision operations in the same order, and
// the build switches contraction to fused multiply-adds off. Images are independent, so threads cannot change a bit.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "grid.h"
#include "philox.h"

namespace {

using torch::stable::Tensor;

constexpr int kQuantileBits = 12;  // log2 of the length of the table of normal quantiles

// What every image shares.
struct CropBoxes {
  const float* quantiles;
  uint64_t seed;
  int64_t rows, cols, pool, crops;
  bool clean_last;
  float alpha;
  int64_t image_height, image_width, crop_height, crop_width;

  int64_t windows_down() const { return rows - pool + 1; }
  int64_t windows_across() const { return cols - pool + 1; }
  int64_t windows() const { return windows_down() * windows_across(); }

  // Mean of phi over every pool x pool window, stride 1.
  void pool_windows(const float* phi, float* pooled) const {
    const float area = static_cast<float>(pool * pool);
    for (int64_t top = 0; top < windows_down(); ++top) {
      for (int64_t left = 0; left < windows_across(); ++left) {
        float sum = 0.0f;
        for (int64_t row = top; row < top + pool; ++row) {
          for (int64_t col = left; col < left + pool; ++col) sum += phi[row * cols + col];
        }
        *pooled++ = sum / area;
      }
    }
  }

  // alpha times the (population) standard deviation of the pooled map.
  float noise_scale(const float* pooled) const {
    const float count = static_cast<float>(windows());
    float sum = 0.0f, squares = 0.0f;
    for (int64_t window = 0; window < windows(); ++window) sum += pooled[window];
    const float mean = sum / count;
    for (int64_t window = 0; window < windows(); ++window) {
      const float deviation = pooled[window] - mean;
      squares += deviation * deviation;
    }
    return alpha * std::sqrt(squares / count);
  }

  // The first window with the largest value; a NaN counts as minus infinity.
  int64_t best_window(const float* pooled, float scale, uint64_t sample, int64_t crop) const {
    const bool clean = clean_last && crop == crops - 1;
    int64_t best = 0;
    float best_value = -std::numeric_limits<float>::infinity();
    for (int64_t window = 0; window < windows(); ++window) {
      float value = pooled[window];
      if (!clean) {
        const ddfast::PhiloxWords words = ddfast::philox4x32(
            {static_cast<uint32_t>(sample), static_cast<uint32_t>(sample >> 32), static_cast<uint32_t>(crop),
             static_cast<uint32_t>(window)},
            seed);
        value += scale * quantiles[words[0] >> (32 - kQuantileBits)];
      }
      if (value > best_value) {
        best = window;
        best_value = value;
      }
    }
    return best;
  }

  // Pixel box (x0, y0, x1, y1) of the crop centred on `window`, moved inside the image where it sticks out.
  void write_box(int64_t window, int32_t* box) const {
    const int64_t row = window / windows_across(), col = window % windows_across();
    const int64_t y0 = crop_start(row, image_height, rows, crop_height);
    const int64_t x0 = crop_start(col, image_width, cols, crop_width);
    box[0] = static_cast<int32_t>(x0);
    box[1] = static_cast<int32_t>(y0);
    box[2] = static_cast<int32_t>(x0 + crop_width);
    box[3] = static_cast<int32_t>(y0 + crop_height);
  }

 private:
  int64_t crop_start(int64_t first_part, int64_t length, int64_t parts, int64_t crop) const {
    const int64_t start = ddfast::part_start(first_part, length, parts);
    const int64_t end = ddfast::part_start(first_part + pool, length, parts);
    return std::clamp<int64_t>((start + end - crop) / 2, 0, length - crop);
  }
};

Tensor noisy_crop_boxes(
    const Tensor& phi, const Tensor& sample_ids, const Tensor& quantiles, int64_t seed, int64_t rows, int64_t cols,
    int64_t pool, int64_t crops, bool clean_last, double alpha, int64_t image_height, int64_t image_width,
    int64_t crop_height, int64_t crop_width) {
  STD_TORCH_CHECK(phi.dim() == 2 && phi.size(1) == rows * cols, "noisy_crop_boxes: phi must be [B, rows * cols]");
  const int64_t images = phi.size(0), players = phi.size(1);
  STD_TORCH_CHECK(sample_ids.dim() == 1 && sample_ids.size(0) == images, "noisy_crop_boxes: sample_ids must be [B]");
  STD_TORCH_CHECK(quantiles.numel() == int64_t{1} << kQuantileBits, "noisy_crop_boxes: quantiles must be [4096]");
  STD_TORCH_CHECK(1 <= pool && pool <= std::min(rows, cols), "noisy_crop_boxes: pool must fit in the grid");
  STD_TORCH_CHECK(crop_height <= image_height && crop_width <= image_width,
                  "noisy_crop_boxes: the crop must fit in the image");
  const Tensor heatmaps = torch::stable::contiguous(phi), ids = torch::stable::contiguous(sample_ids);
  const Tensor table = torch::stable::contiguous(quantiles);
  Tensor boxes = torch::stable::new_empty(phi, {images, crops, 4}, torch::headeronly::ScalarType::Int);

  const CropBoxes op{table.const_data_ptr<float>(), static_cast<uint64_t>(seed), rows, cols, pool, crops, clean_last,
                     static_cast<float>(alpha), image_height, image_width, crop_height, crop_width};
  const float* phi_data = heatmaps.const_data_ptr<float>();
  const int64_t* id_data = ids.const_data_ptr<int64_t>();
  int32_t* box_data = boxes.mutable_data_ptr<int32_t>();
  torch::stable::parallel_for(0, images, /*grain_size=*/16, [&](int64_t begin, int64_t end) {
    std::vector<float> pooled(op.windows());
    for (int64_t image = begin; image < end; ++image) {
      op.pool_windows(phi_data + image * players, pooled.data());
      const float scale = op.noise_scale(pooled.data());
      for (int64_t crop = 0; crop < crops; ++crop) {
        const int64_t best = op.best_window(pooled.data(), scale, static_cast<uint64_t>(id_data[image]), crop);
        op.write_box(best, box_data + (image * crops + crop) * 4);
      }
    }
  });
  return boxes;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ddfast_native, library) {
  library.def(
      "noisy_crop_boxes(Tensor phi, Tensor sample_ids, Tensor quantiles, int seed, int rows, int cols, int pool, "
      "int crops, bool clean_last, float alpha, int image_height, int image_width, int crop_height, int crop_width) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ddfast_native, CPU, library) {
  library.impl("noisy_crop_boxes", TORCH_BOX(&noisy_crop_boxes));
}
