// How the dimensions of a batch lie in memory.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace ddfast {

namespace detail {

// Whether dimensions lie in memory without gaps, the given first dimension innermost and the others from last to first.
inline bool dense(const torch::stable::Tensor& batch, int64_t innermost) {
  int64_t expected = 1;
  const auto matches = [&](int64_t dim) {
    const bool match = batch.size(dim) == 1 || batch.stride(dim) == expected;
    expected *= batch.size(dim);
    return match;
  };
  bool all = innermost < 0 || matches(innermost);
  for (int64_t dim = batch.dim() - 1; dim >= 0; --dim) all = (dim == innermost || matches(dim)) && all;
  return all;
}

}  // namespace detail

// The tensor, or a contiguous copy. It spares a call of the dispatcher where there is nothing to copy.
inline torch::stable::Tensor contiguous(const torch::stable::Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Whether a batch [B, C, ...] lies in memory without gaps in that order.
inline bool planar(const torch::stable::Tensor& batch) { return detail::dense(batch, -1); }

// Whether a batch [B, C, ...] lies in memory without gaps as [B, ..., C].
inline bool channels_last(const torch::stable::Tensor& batch) { return detail::dense(batch, 1); }

}  // namespace ddfast
