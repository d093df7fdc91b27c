// crop_resize, its transpose, and crop_batch: antialiased bilinear resize of many boxes (defined in
// ddfast/ops/reference.py).
//
// The filter is separable. Forward, each row of a tile is one weighted sum of image rows into a line as wide as the
// crop, then one weighted sum along that line into the tile: the intermediate is a single line that stays in the first
// cache, pixels are read in their own dtype and order, and the tile is written where it lies in its mosaic. Backward
// runs the same steps transposed, box after box, into one image plane at a time. Tiles, and planes, are independent and
// each is the work of one thread, so the number of threads changes no bit. crop_batch takes the same sums, so that its
// bytes are those of crop_resize, and normalises them by a table before they leave the registers.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

#include "dispatch.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPixelsPerTask = 16 * 1024;  // the least work worth handing to another thread

template <typename Element>
using Accumulator = std::conditional_t<std::is_same_v<Element, double>, double, float>;

// The triangle filter along one axis: output i is the sum of `count(i)` pixels from `first(i)` on, times weights(i).
template <typename Sum>
class Filter {
 public:
  Filter(float start, float stop, int64_t size) : offset_(static_cast<int64_t>(std::floor(start))) {
    length_ = static_cast<int64_t>(std::ceil(stop)) - offset_;
    const Sum scale = static_cast<Sum>(static_cast<double>(stop) - start) / static_cast<Sum>(size);
    const Sum support = std::max(scale, Sum(1)), inverse = Sum(1) / support;
    const Sum shift = static_cast<Sum>(start) - static_cast<Sum>(offset_);
    taps_ = std::min(length_, 2 * static_cast<int64_t>(std::ceil(support)) + 1);
    first_.resize(size);
    count_.resize(size);
    weights_.resize(size * taps_);
    for (int64_t i = 0; i < size; ++i) {
      const Sum centre = shift + scale * (static_cast<Sum>(i) + Sum(0.5));
      const int64_t first = std::max<int64_t>(0, static_cast<int64_t>(std::ceil(centre - support - Sum(0.5))));
      Sum* weights = weights_.data() + i * taps_;
      int64_t count = 0;
      Sum total = 0;
      for (int64_t pixel = first; pixel < length_ && count < taps_; ++pixel) {
        const Sum distance = std::abs(static_cast<Sum>(pixel) + Sum(0.5) - centre);
        const Sum weight = std::max(Sum(1) - distance * inverse, Sum(0));
        if (weight == 0 && count > 0) break;
        weights[count++] = weight;
        total += weight;
      }
      for (int64_t k = 0; k < count; ++k) weights[k] /= total;
      first_[i] = first;
      count_[i] = count;
    }
  }

  int64_t offset() const { return offset_; }  // first pixel of the crop
  int64_t length() const { return length_; }  // pixels of the crop
  int64_t first(int64_t i) const { return first_[i]; }
  int64_t count(int64_t i) const { return count_[i]; }
  const Sum* weights(int64_t i) const { return weights_.data() + i * taps_; }

 private:
  int64_t offset_, length_, taps_;
  std::vector<int64_t> first_, count_;
  std::vector<Sum> weights_;
};

// Where the pixels of a batch of images lie.
struct Layout {
  int64_t image, channel, row, col;
  explicit Layout(const Tensor& images)
      : image(images.stride(0)), channel(images.stride(1)), row(images.stride(2)), col(images.stride(3)) {}
};

// Where tile t of a contiguous batch of mosaics lies.
struct Mosaics {
  int64_t channels, height, width, factor;  // of a tile

  int64_t row_stride() const { return factor * width; }
  int64_t plane_stride() const { return factor * height * row_stride(); }
  int64_t tile_offset(int64_t tile) const {
    const int64_t place = tile % (factor * factor);
    const int64_t down = place / factor, across = place % factor;
    return tile / (factor * factor) * channels * plane_stride() + down * height * row_stride() + across * width;
  }
};

template <typename Element, typename Sum>
Element rounded(Sum value) {
  if constexpr (std::is_same_v<Element, uint8_t>) {
    return static_cast<uint8_t>(std::clamp(std::floor(value + Sum(0.5)), Sum(0), Sum(255)));
  } else {
    return static_cast<Element>(value);
  }
}

// line += weight * pixels, or line = weight * pixels for the first row.
template <typename Element, typename Sum>
void add_row(const Element* pixels, int64_t stride, Sum weight, bool first, int64_t length, Sum* line) {
  if (first) std::fill(line, line + length, Sum(0));
  if (stride == 1) {
    for (int64_t x = 0; x < length; ++x) line[x] += weight * static_cast<Sum>(pixels[x]);
  } else {
    for (int64_t x = 0; x < length; ++x) line[x] += weight * static_cast<Sum>(pixels[x * stride]);
  }
}

void check_boxes(const Tensor& boxes, const Tensor& source, int64_t images, int64_t height, int64_t width) {
  const float* box = boxes.const_data_ptr<float>();
  const int64_t* image = source.const_data_ptr<int64_t>();
  for (int64_t m = 0; m < boxes.size(0); ++m, box += 4) {
    const bool inside = box[0] >= 0 && box[1] >= 0 && box[2] <= width && box[3] <= height;
    STD_TORCH_CHECK(
        inside && box[2] - box[0] >= 1 && box[3] - box[1] >= 1 && image[m] >= 0 && image[m] < images,
        "crop_resize: box ", m, " is not inside an image");
  }
}

// The sums of one tile: calls emit(channel, row, column, sum) for each of them, row by row and channel by channel.
template <typename Element, typename Sum, typename Emit>
void resize_box(const Element* image, const Layout& layout, int64_t channels, const float* box, int64_t height,
                int64_t width, std::vector<Sum>& line, const Emit& emit) {
  const Filter<Sum> down(box[1], box[3], height), across(box[0], box[2], width);
  const Element* crop = image + down.offset() * layout.row + across.offset() * layout.col;
  line.resize(across.length());
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t channel = 0; channel < channels; ++channel) {
      const Element* row = crop + channel * layout.channel + down.first(i) * layout.row;
      for (int64_t k = 0; k < down.count(i); ++k, row += layout.row) {
        add_row(row, layout.col, down.weights(i)[k], k == 0, across.length(), line.data());
      }
      for (int64_t j = 0; j < width; ++j) {
        const Sum* span = line.data() + across.first(j);
        const Sum* weights = across.weights(j);
        Sum sum = 0;
        for (int64_t k = 0; k < across.count(j); ++k) sum += weights[k] * span[k];
        emit(channel, i, j, sum);
      }
    }
  }
}

int64_t tiles_per_task(int64_t numbers_per_tile) {
  return std::max<int64_t>(1, kPixelsPerTask / std::max<int64_t>(1, numbers_per_tile));
}

Tensor crop_resize(
    const Tensor& images, const Tensor& boxes_, const Tensor& source_, int64_t height, int64_t width, int64_t factor) {
  const Tensor boxes = torch::stable::contiguous(boxes_), source = torch::stable::contiguous(source_);
  check_boxes(boxes, source, images.size(0), images.size(2), images.size(3));
  const int64_t tiles = boxes.size(0), channels = images.size(1);
  const Mosaics mosaics{channels, height, width, factor};
  Tensor output = torch::stable::new_empty(
      images, {tiles / (factor * factor), channels, factor * height, factor * width});
  const Layout layout(images);
  const float* box_data = boxes.const_data_ptr<float>();
  const int64_t* source_data = source.const_data_ptr<int64_t>();

  ddfast::dispatch_image("crop_resize", images.scalar_type(), [&]<typename Element>(std::type_identity<Element>) {
    using Sum = Accumulator<Element>;
    const Element* pixels = images.const_data_ptr<Element>();
    Element* result = output.mutable_data_ptr<Element>();
    torch::stable::parallel_for(0, tiles, tiles_per_task(channels * height * width), [&](int64_t begin, int64_t end) {
      std::vector<Sum> line;
      for (int64_t tile = begin; tile < end; ++tile) {
        Element* out = result + mosaics.tile_offset(tile);
        const auto emit = [&](int64_t channel, int64_t i, int64_t j, Sum sum) {
          out[channel * mosaics.plane_stride() + i * mosaics.row_stride() + j] = rounded<Element>(sum);
        };
        resize_box(pixels + source_data[tile] * layout.image, layout, channels, box_data + 4 * tile, height, width,
                   line, emit);
      }
    });
  });
  return output;
}

// (x - mean) / std of resized values, one IEEE operation at a time; bytes are rounded as crop_resize rounds them, and
// divided by 255 first. There are only 256 bytes, so theirs is a table.
template <typename Element, typename Sum, typename Out>
class Normalisation {
 public:
  Normalisation(const std::optional<Tensor>& mean, const std::optional<Tensor>& std, int64_t channels)
      : mean_(statistic(mean, channels)), std_(statistic(std, channels)) {
    if constexpr (kBytes) {
      for (int64_t channel = 0; channel < channels; ++channel) {
        for (int byte = 0; byte < 256; ++byte) table_.push_back(normalised(channel, static_cast<Sum>(byte) / Sum(255)));
      }
    }
  }

  Out operator()(int64_t channel, Sum value) const {
    if constexpr (kBytes) {
      return table_[channel * 256 + rounded<uint8_t>(value)];
    } else {
      return normalised(channel, value);
    }
  }

 private:
  static constexpr bool kBytes = std::is_same_v<Element, uint8_t>;

  static std::vector<Sum> statistic(const std::optional<Tensor>& numbers, int64_t channels) {
    if (!numbers) return {};
    STD_TORCH_CHECK(numbers->dim() == 1 && numbers->size(0) == channels, "crop_batch: mean and std must be [C]");
    const Tensor dense = torch::stable::contiguous(*numbers);
    const Sum* data = dense.const_data_ptr<Sum>();
    return std::vector<Sum>(data, data + channels);
  }

  Out normalised(int64_t channel, Sum value) const {
    if (!mean_.empty()) value -= mean_[channel];
    if (!std_.empty()) value /= std_[channel];
    return static_cast<Out>(value);
  }

  std::vector<Sum> mean_, std_;
  std::vector<Out> table_;
};

// `batch` is [tiles, channels, padded_height, padded_width], channels last.
template <typename Element, typename Sum, typename Out>
void crop_batch_as(const Tensor& images, const Tensor& boxes, const Tensor& source, const std::optional<Tensor>& mean,
                   const std::optional<Tensor>& std, int64_t height, int64_t width, Tensor& batch) {
  const int64_t tiles = batch.size(0), channels = batch.size(1);
  const int64_t padded_height = batch.size(2), padded_width = batch.size(3);
  const int64_t row_stride = padded_width * channels, tile_stride = padded_height * row_stride;
  const int64_t corner = (padded_height - height) / 2 * row_stride + (padded_width - width) / 2 * channels;
  const bool padded = height < padded_height || width < padded_width;
  const Layout layout(images);
  const Normalisation<Element, Sum, Out> normalisation(mean, std, channels);
  const Element* pixels = images.const_data_ptr<Element>();
  const float* box_data = boxes.const_data_ptr<float>();
  const int64_t* source_data = source.const_data_ptr<int64_t>();
  Out* result = static_cast<Out*>(batch.mutable_data_ptr());
  torch::stable::parallel_for(0, tiles, tiles_per_task(tile_stride), [&](int64_t begin, int64_t end) {
    std::vector<Sum> line;
    for (int64_t tile = begin; tile < end; ++tile) {
      Out* out = result + tile * tile_stride;
      if (padded) std::fill_n(out, tile_stride, Out(0));
      out += corner;
      const auto emit = [&](int64_t channel, int64_t i, int64_t j, Sum sum) {
        out[i * row_stride + j * channels + channel] = normalisation(channel, sum);
      };
      resize_box(pixels + source_data[tile] * layout.image, layout, channels, box_data + 4 * tile, height, width, line,
                 emit);
    }
  });
}

Tensor crop_batch(const Tensor& images, const Tensor& boxes_, const Tensor& source_, const std::optional<Tensor>& mean,
                  const std::optional<Tensor>& std, int64_t height, int64_t width, int64_t padded_height,
                  int64_t padded_width, ScalarType dtype) {
  const Tensor boxes = torch::stable::contiguous(boxes_), source = torch::stable::contiguous(source_);
  check_boxes(boxes, source, images.size(0), images.size(2), images.size(3));
  STD_TORCH_CHECK(height <= padded_height && width <= padded_width, "crop_batch: a tile must fit into its padding");
  Tensor batch = torch::stable::empty({boxes.size(0), images.size(1), padded_height, padded_width}, dtype, std::nullopt,
                                      images.device(), std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  ddfast::dispatch_image("crop_batch", images.scalar_type(), [&]<typename Element>(std::type_identity<Element>) {
    ddfast::dispatch_floating("crop_batch", dtype, [&]<typename Out>(std::type_identity<Out>) {
      constexpr bool kWide = std::is_same_v<Element, double> || std::is_same_v<Out, double>;
      using Sum = std::conditional_t<kWide, double, float>;
      crop_batch_as<Element, Sum, Out>(images, boxes, source, mean, std, height, width, batch);
    });
  });
  return batch;
}

// The boxes of each image, in ascending order: those of image b are members[starts[b]] .. members[starts[b + 1] - 1].
struct BoxesByImage {
  std::vector<int64_t> starts, members;

  BoxesByImage(const int64_t* source, int64_t boxes, int64_t images) : starts(images + 1), members(boxes) {
    for (int64_t m = 0; m < boxes; ++m) ++starts[source[m] + 1];
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t m = 0; m < boxes; ++m) members[next[source[m]]++] = m;
  }
};

Tensor crop_resize_backward(
    const Tensor& grad_output_, const Tensor& boxes_, const Tensor& source_, int64_t images, int64_t image_height,
    int64_t image_width, int64_t factor) {
  const Tensor grad_output = torch::stable::contiguous(grad_output_);
  const Tensor boxes = torch::stable::contiguous(boxes_), source = torch::stable::contiguous(source_);
  check_boxes(boxes, source, images, image_height, image_width);
  const int64_t tiles = boxes.size(0), channels = grad_output.size(1);
  const Mosaics mosaics{channels, grad_output.size(2) / factor, grad_output.size(3) / factor, factor};
  Tensor grad_images = torch::stable::new_empty(grad_output, {images, channels, image_height, image_width});
  const float* box_data = boxes.const_data_ptr<float>();
  const BoxesByImage by_image(source.const_data_ptr<int64_t>(), tiles, images);
  const int64_t plane_size = image_height * image_width;

  const auto run = [&]<typename Element>(std::type_identity<Element>) {
    using Sum = Accumulator<Element>;
    const Element* grads = grad_output.const_data_ptr<Element>();
    Element* result = grad_images.mutable_data_ptr<Element>();
    const int64_t grain = std::max<int64_t>(1, kPixelsPerTask / std::max<int64_t>(1, plane_size));
    torch::stable::parallel_for(0, images * channels, grain, [&](int64_t begin, int64_t end) {
      std::vector<Sum> plane(plane_size), line(image_width);
      for (int64_t index = begin; index < end; ++index) {
        const int64_t image = index / channels, channel = index % channels;
        std::fill(plane.begin(), plane.end(), Sum(0));
        for (int64_t at = by_image.starts[image]; at < by_image.starts[image + 1]; ++at) {
          const int64_t tile = by_image.members[at];
          const float* box = box_data + 4 * tile;
          const Filter<Sum> down(box[1], box[3], mosaics.height), across(box[0], box[2], mosaics.width);
          const Element* grad = grads + mosaics.tile_offset(tile) + channel * mosaics.plane_stride();
          Sum* crop = plane.data() + down.offset() * image_width + across.offset();
          for (int64_t i = 0; i < mosaics.height; ++i, grad += mosaics.row_stride()) {
            std::fill(line.begin(), line.begin() + across.length(), Sum(0));
            for (int64_t j = 0; j < mosaics.width; ++j) {
              const Sum value = static_cast<Sum>(grad[j]);
              Sum* span = line.data() + across.first(j);
              for (int64_t k = 0; k < across.count(j); ++k) span[k] += across.weights(j)[k] * value;
            }
            Sum* row = crop + down.first(i) * image_width;
            for (int64_t k = 0; k < down.count(i); ++k, row += image_width) {
              const Sum weight = down.weights(i)[k];
              for (int64_t x = 0; x < across.length(); ++x) row[x] += weight * line[x];
            }
          }
        }
        std::transform(plane.begin(), plane.end(), result + index * plane_size, rounded<Element, Sum>);
      }
    });
  };
  ddfast::dispatch_floating("crop_resize_backward", grad_output.scalar_type(), run);
  return grad_images;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ddfast_native, library) {
  library.def(
      "crop_resize(Tensor images, Tensor boxes, Tensor source, int height, int width, int factor) -> Tensor");
  library.def(
      "crop_resize_backward(Tensor grad_output, Tensor boxes, Tensor source, int images, int image_height, "
      "int image_width, int factor) -> Tensor");
  library.def(
      "crop_batch(Tensor images, Tensor boxes, Tensor source, Tensor? mean, Tensor? std, int height, int width, "
      "int padded_height, int padded_width, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ddfast_native, CPU, library) {
  library.impl("crop_resize", TORCH_BOX(&crop_resize));
  library.impl("crop_resize_backward", TORCH_BOX(&crop_resize_backward));
  library.impl("crop_batch", TORCH_BOX(&crop_batch));
}
