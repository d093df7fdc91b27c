// From one heatmap to crop boxes: choose a size of window, pool, add scaled noise, take the largest window (defined by
// noisy_crop_boxes in ddfast/ops/reference.py).
//
// Its bits are a promise: every body of the ops that place boxes does the same IEEE single-precision operations in the
// same order, and the build switches contraction to fused multiply-adds off.

#pragma once

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "grid.h"
#include "philox.h"

namespace ddfast {

constexpr int kQuantileBits = 12;  // log2 of the length of the table of normal quantiles

// A window of pool x pool cells, and the pixels of the crop that is centred on it.
struct Window {
  int64_t pool, crop_height, crop_width;
};

// The windows whose numbers stand at the same place of three lists.
inline std::vector<Window> make_windows(const char* op, const std::vector<int64_t>& pools,
                                        const std::vector<int64_t>& crop_heights,
                                        const std::vector<int64_t>& crop_widths) {
  STD_TORCH_CHECK(pools.size() == crop_heights.size() && pools.size() == crop_widths.size(), op,
                  ": pools, crop_heights and crop_widths must be equally many");
  std::vector<Window> windows;
  for (size_t i = 0; i < pools.size(); ++i) windows.push_back({pools[i], crop_heights[i], crop_widths[i]});
  return windows;
}

// Every argument of noisy_crop_boxes that all images share. `windows` goes from the smallest to the largest.
struct CropBoxes {
  const float* quantiles;
  uint64_t seed;
  int64_t rows, cols;
  std::vector<Window> windows;
  int64_t crops;
  bool clean_last;
  float alpha;
  int64_t image_height, image_width;
  float coverage;

  // Refuses arguments that would make it read outside of others. Heatmaps are phi [B, rows * cols].
  void check(const char* op, int64_t players, int64_t quantile_count) const {
    STD_TORCH_CHECK(players == rows * cols, op, ": phi must be [B, rows * cols]");
    STD_TORCH_CHECK(quantile_count == int64_t{1} << kQuantileBits, op, ": quantiles must be [4096]");
    STD_TORCH_CHECK(!windows.empty(), op, ": there must be a window");
    for (const Window& window : windows) {
      STD_TORCH_CHECK(1 <= window.pool && window.pool <= std::min(rows, cols), op, ": pool must fit in the grid");
      STD_TORCH_CHECK(window.crop_height <= image_height && window.crop_width <= image_width, op,
                      ": the crop must fit in the image");
    }
  }

  // Boxes [crops, 4] of one image from its heatmap [rows * cols]. `pooled` is scratch for rows * cols numbers.
  void place(const float* phi, int64_t sample, std::vector<float>& pooled, int32_t* boxes) const {
    pooled.resize(rows * cols);
    const Window& window = smallest_that_holds_enough(phi);
    const int64_t places = pool_windows(phi, window.pool, pooled.data());
    const float scale = noise_scale(pooled.data(), places);
    for (int64_t crop = 0; crop < crops; ++crop, boxes += 4) {
      write_box(window, best_place(pooled.data(), places, scale, static_cast<uint64_t>(sample), crop), boxes);
    }
  }

 private:
  // Sum over the pool x pool window at (top, left), row by row, of value(phi).
  template <typename Function>
  float window_sum(const float* phi, int64_t pool, int64_t top, int64_t left, const Function& value) const {
    float sum = 0.0f;
    for (int64_t row = top; row < top + pool; ++row) {
      for (int64_t col = left; col < left + pool; ++col) sum += value(phi[row * cols + col]);
    }
    return sum;
  }

  // The first window whose best place holds `coverage` of the positive phi; the last one where none does.
  const Window& smallest_that_holds_enough(const float* phi) const {
    if (windows.size() == 1) return windows.front();
    const auto positive = [](float cell) { return cell > 0.0f ? cell : 0.0f; };
    float total = 0.0f;
    for (int64_t cell = 0; cell < rows * cols; ++cell) total += positive(phi[cell]);
    for (const Window& window : windows) {
      float held = 0.0f;
      for (int64_t top = 0; top <= rows - window.pool; ++top) {
        for (int64_t left = 0; left <= cols - window.pool; ++left) {
          held = std::max(held, window_sum(phi, window.pool, top, left, positive));
        }
      }
      if (total > 0.0f && held >= coverage * total) return window;
    }
    return windows.back();
  }

  // Mean of phi over every pool x pool window, stride 1; returns how many there are.
  int64_t pool_windows(const float* phi, int64_t pool, float* pooled) const {
    const float area = static_cast<float>(pool * pool);
    int64_t places = 0;
    for (int64_t top = 0; top <= rows - pool; ++top) {
      for (int64_t left = 0; left <= cols - pool; ++left) {
        pooled[places++] = window_sum(phi, pool, top, left, [](float cell) { return cell; }) / area;
      }
    }
    return places;
  }

  // alpha times the (population) standard deviation of the pooled map.
  float noise_scale(const float* pooled, int64_t places) const {
    const float count = static_cast<float>(places);
    float sum = 0.0f, squares = 0.0f;
    for (int64_t place = 0; place < places; ++place) sum += pooled[place];
    const float mean = sum / count;
    for (int64_t place = 0; place < places; ++place) {
      const float deviation = pooled[place] - mean;
      squares += deviation * deviation;
    }
    return alpha * std::sqrt(squares / count);
  }

  // The first place with the largest value; a NaN counts as minus infinity.
  int64_t best_place(const float* pooled, int64_t places, float scale, uint64_t sample, int64_t crop) const {
    const bool clean = clean_last && crop == crops - 1;
    int64_t best = 0;
    float best_value = -std::numeric_limits<float>::infinity();
    for (int64_t place = 0; place < places; ++place) {
      float value = pooled[place];
      if (!clean) {
        const PhiloxWords words = philox4x32({static_cast<uint32_t>(sample), static_cast<uint32_t>(sample >> 32),
                                              static_cast<uint32_t>(crop), static_cast<uint32_t>(place)},
                                             seed);
        value += scale * quantiles[words[0] >> (32 - kQuantileBits)];
      }
      if (value > best_value) {
        best = place;
        best_value = value;
      }
    }
    return best;
  }

  // Pixel box (x0, y0, x1, y1) of the crop centred on a place of the window, moved inside the image where it sticks out.
  void write_box(const Window& window, int64_t place, int32_t* box) const {
    const int64_t across = cols - window.pool + 1;
    const int64_t y0 = crop_start(place / across, window.pool, image_height, rows, window.crop_height);
    const int64_t x0 = crop_start(place % across, window.pool, image_width, cols, window.crop_width);
    box[0] = static_cast<int32_t>(x0);
    box[1] = static_cast<int32_t>(y0);
    box[2] = static_cast<int32_t>(x0 + window.crop_width);
    box[3] = static_cast<int32_t>(y0 + window.crop_height);
  }

  static int64_t crop_start(int64_t first_part, int64_t pool, int64_t length, int64_t parts, int64_t crop) {
    const int64_t start = part_start(first_part, length, parts);
    const int64_t end = part_start(first_part + pool, length, parts);
    return std::clamp<int64_t>((start + end - crop) / 2, 0, length - crop);
  }
};

}  // namespace ddfast
