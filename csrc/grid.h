// How a grid of players divides an image, the same in every op: part r of `parts` starts at floor(r * length / parts),
// so that parts differ by at most one pixel where the grid does not divide the image.

#pragma once

#include <cstdint>

namespace ddfast {

// First pixel of part `index`; `index == parts` gives `length`.
inline int64_t part_start(int64_t index, int64_t length, int64_t parts) {
  return index * length / parts;
}

// The part that a pixel lies in: the inverse of part_start.
inline int64_t part_of_pixel(int64_t pixel, int64_t length, int64_t parts) {
  return ((pixel + 1) * parts - 1) / length;
}

}  // namespace ddfast
