// masked_batch: every image under every coalition of its grid cells (defined in ddfast/ops/reference.py).
//
// Two passes. The first normalises each image and each baseline once, into pixels of interleaved channels in the
// output's dtype. The second assembles the output from those pixels, one memory copy for each run of neighbouring
// cells that are all present or all absent. Arithmetic and conversion are paid once an image instead of once a
// coalition, and the second pass, nearly all of the work, runs at the speed of memory.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "dispatch.h"
#include "grid.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBytesPerTask = 64 * 1024;  // the least work worth handing to another thread

// Pixels read as [image, channel, row, col]; a stride of 0 repeats what a dimension shares.
struct Planes {
  const void* data;
  ScalarType dtype;
  int64_t image_stride, channel_stride, row_stride, col_stride;

  static Planes of_images(const Tensor& images) {
    return {images.const_data_ptr(), images.scalar_type(), images.stride(0),
            images.stride(1),        images.stride(2),     images.stride(3)};
  }

  // A baseline is [C], [C, H, W] or [B, C, H, W].
  static Planes of_baseline(const Tensor& baseline) {
    const int64_t channel = baseline.dim() == 4 ? 1 : 0;
    const bool flat = baseline.dim() == 1;
    return {baseline.const_data_ptr(),
            baseline.scalar_type(),
            channel == 1 ? baseline.stride(0) : 0,
            baseline.stride(channel),
            flat ? 0 : baseline.stride(channel + 1),
            flat ? 0 : baseline.stride(channel + 2)};
  }

  template <typename Compute>
  void read(int64_t image, int64_t channel, int64_t row, int64_t width, Compute* line) const {
    const int64_t offset = image * image_stride + channel * channel_stride + row * row_stride;
    ddfast::dispatch_image("masked_batch", dtype, [&]<typename Element>(std::type_identity<Element>) {
      const Element* source = static_cast<const Element*>(data) + offset;
      for (int64_t col = 0; col < width; ++col) line[col] = static_cast<Compute>(source[col * col_stride]);
    });
  }
};

// (x - mean) / std, after a division by 255 of integers, one IEEE operation at a time.
template <typename Compute>
struct Normalisation {
  bool integers = false;
  std::vector<Compute> mean, std;  // one a channel, or empty

  void apply(int64_t channel, int64_t width, Compute* line) const {
    if (integers) {
      for (int64_t col = 0; col < width; ++col) line[col] /= Compute(255);
    }
    if (!mean.empty()) {
      const Compute shift = mean[channel];
      for (int64_t col = 0; col < width; ++col) line[col] -= shift;
    }
    if (!std.empty()) {
      const Compute scale = std[channel];
      for (int64_t col = 0; col < width; ++col) line[col] /= scale;
    }
  }
};

template <typename Compute>
std::vector<Compute> channel_statistic(const std::optional<Tensor>& statistic, int64_t channels) {
  if (!statistic) return {};
  STD_TORCH_CHECK(statistic->dim() == 1 && statistic->size(0) == channels, "masked_batch: mean and std must be [C]");
  std::vector<Compute> numbers(channels);
  const Planes planes{statistic->const_data_ptr(), statistic->scalar_type(), 0, 0, 0, statistic->stride(0)};
  planes.read(0, 0, 0, channels, numbers.data());
  return numbers;
}

// First pass: [images, rows, width, channels] pixels in `Out`, where dimensions that a baseline shares have size 1.
template <typename Compute, typename Out>
void interleave(const Planes& planes, const Normalisation<Compute>& normalisation, int64_t images, int64_t rows,
                int64_t width, int64_t channels, Out* pixels) {
  const int64_t row_bytes = std::max<int64_t>(1, width * channels * sizeof(Out));
  torch::stable::parallel_for(
      0, images * rows, std::max<int64_t>(1, kBytesPerTask / row_bytes), [&](int64_t begin, int64_t end) {
        std::vector<Compute> line(width);
        for (int64_t index = begin; index < end; ++index) {
          for (int64_t channel = 0; channel < channels; ++channel) {
            planes.read(index / rows, channel, index % rows, width, line.data());
            normalisation.apply(channel, width, line.data());
            Out* pixel = pixels + index * width * channels + channel;
            for (int64_t col = 0; col < width; ++col) pixel[col * channels] = static_cast<Out>(line[col]);
          }
        }
      });
}

// Interleaved pixels of the first pass, addressed in bytes.
struct Pixels {
  const char* data;
  int64_t image_bytes, row_bytes;

  const char* row(int64_t image, int64_t index) const { return data + image * image_bytes + index * row_bytes; }
};

// Second pass: row h of image b under coalition k, for all of them.
void assemble(const Pixels& present, const Pixels& absent, const bool* coalitions, int64_t coalition_image_stride,
              int64_t batch, int64_t count, int64_t height, int64_t width, int64_t pixel_bytes, int64_t rows,
              int64_t cols, char* masked) {
  std::vector<int64_t> first_byte(cols + 1);  // of each column of cells, in a row of pixels
  for (int64_t col = 0; col <= cols; ++col) first_byte[col] = ddfast::part_start(col, width, cols) * pixel_bytes;
  const int64_t row_bytes = std::max<int64_t>(1, width * pixel_bytes);
  torch::stable::parallel_for(
      0, batch * count * height, std::max<int64_t>(1, kBytesPerTask / row_bytes), [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) {
          const int64_t row = index % height, coalition = index / height % count, image = index / height / count;
          const bool* cells = coalitions + image * coalition_image_stride + coalition * rows * cols +
                              ddfast::part_of_pixel(row, height, rows) * cols;
          const char* sources[2] = {absent.row(image, row), present.row(image, row)};
          char* target = masked + index * width * pixel_bytes;
          for (int64_t first = 0, last; first < cols; first = last) {
            for (last = first + 1; last < cols && cells[last] == cells[first];) ++last;
            const int64_t offset = first_byte[first];
            std::memcpy(target + offset, sources[cells[first]] + offset, first_byte[last] - offset);
          }
        }
      });
}

template <typename Compute, typename Out>
void masked_batch_as(const Tensor& images, const Tensor& coalitions, const Tensor& baseline,
                     const std::optional<Tensor>& mean, const std::optional<Tensor>& std, int64_t rows, int64_t cols,
                     Tensor& masked) {
  const int64_t batch = images.size(0), channels = images.size(1), height = images.size(2), width = images.size(3);
  const int64_t count = coalitions.size(-2);
  // What the baseline shares between images or rows is stored once.
  const int64_t baselines = baseline.dim() == 4 ? batch : 1, baseline_rows = baseline.dim() == 1 ? 1 : height;
  const ScalarType dtype = masked.scalar_type();
  Tensor present = torch::stable::new_empty(images, {batch, height, width, channels}, dtype);
  Tensor absent = torch::stable::new_empty(images, {baselines, baseline_rows, width, channels}, dtype);

  const Normalisation<Compute> normalisation{images.scalar_type() == ScalarType::Byte,
                                             channel_statistic<Compute>(mean, channels),
                                             channel_statistic<Compute>(std, channels)};
  interleave<Compute, Out>(Planes::of_images(images), normalisation, batch, height, width, channels,
                           static_cast<Out*>(present.mutable_data_ptr()));
  interleave<Compute, Out>(Planes::of_baseline(baseline), {}, baselines, baseline_rows, width, channels,
                           static_cast<Out*>(absent.mutable_data_ptr()));

  const int64_t pixel_bytes = channels * sizeof(Out), row_bytes = width * pixel_bytes;
  assemble({static_cast<const char*>(present.const_data_ptr()), height * row_bytes, row_bytes},
           {static_cast<const char*>(absent.const_data_ptr()), baselines == 1 ? 0 : baseline_rows * row_bytes,
            baseline_rows == 1 ? 0 : row_bytes},
           coalitions.const_data_ptr<bool>(), coalitions.dim() == 3 ? count * rows * cols : 0, batch, count, height,
           width, pixel_bytes, rows, cols, static_cast<char*>(masked.mutable_data_ptr()));
}

Tensor masked_batch(const Tensor& images, const Tensor& coalitions, const Tensor& baseline,
                    const std::optional<Tensor>& mean, const std::optional<Tensor>& std, int64_t rows, int64_t cols,
                    ScalarType dtype) {
  STD_TORCH_CHECK(images.dim() == 4, "masked_batch: images must be [B, C, H, W]");
  const int64_t batch = images.size(0), channels = images.size(1), height = images.size(2), width = images.size(3);
  STD_TORCH_CHECK(coalitions.dim() == 2 || (coalitions.dim() == 3 && coalitions.size(0) == batch),
                  "masked_batch: coalitions must be [K, d] or [B, K, d]");
  STD_TORCH_CHECK(rows > 0 && cols > 0 && coalitions.size(-1) == rows * cols,
                  "masked_batch: coalitions must have rows * cols players");
  const int64_t dims = baseline.dim();
  STD_TORCH_CHECK(
      (dims == 1 && baseline.size(0) == channels) ||
          ((dims == 3 || (dims == 4 && baseline.size(0) == batch)) && baseline.size(-3) == channels &&
           baseline.size(-2) == height && baseline.size(-1) == width),
      "masked_batch: baseline must be [C], [C, H, W] or [B, C, H, W]");

  Tensor masked = torch::stable::empty({batch * coalitions.size(-2), channels, height, width}, dtype, std::nullopt,
                                       images.device(), std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  const Tensor cells = torch::stable::contiguous(coalitions);
  const bool wide = images.scalar_type() == ScalarType::Double || baseline.scalar_type() == ScalarType::Double ||
                    dtype == ScalarType::Double;
  ddfast::dispatch_floating("masked_batch", dtype, [&]<typename Out>(std::type_identity<Out>) {
    if (wide) {
      masked_batch_as<double, Out>(images, cells, baseline, mean, std, rows, cols, masked);
    } else {
      masked_batch_as<float, Out>(images, cells, baseline, mean, std, rows, cols, masked);
    }
  });
  return masked;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ddfast_native, library) {
  library.def(
      "masked_batch(Tensor images, Tensor coalitions, Tensor baseline, Tensor? mean, Tensor? std, int rows, int cols, "
      "ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ddfast_native, CPU, library) {
  library.impl("masked_batch", TORCH_BOX(&masked_batch));
}
