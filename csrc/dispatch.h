// From a dtype known at run time to a type known at compile time:
//
//   dispatch_floating("op", tensor.scalar_type(), [&]<typename T>(std::type_identity<T>) { ... T ... });

#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <type_traits>

namespace ddfast {

// Calls `function` with the C++ type of a floating-point dtype of 16 to 64 bits.
template <typename Function>
void dispatch_floating(const char* op, torch::headeronly::ScalarType dtype, const Function& function) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Half:
      return function(std::type_identity<torch::headeronly::Half>{});
    case ScalarType::BFloat16:
      return function(std::type_identity<torch::headeronly::BFloat16>{});
    case ScalarType::Float:
      return function(std::type_identity<float>{});
    case ScalarType::Double:
      return function(std::type_identity<double>{});
    default:
      STD_TORCH_CHECK(false, op, ": the dtype ", torch::headeronly::toString(dtype), " is not served");
  }
}

// The same, with uint8 besides: the dtypes of images.
template <typename Function>
void dispatch_image(const char* op, torch::headeronly::ScalarType dtype, const Function& function) {
  if (dtype == torch::headeronly::ScalarType::Byte) return function(std::type_identity<uint8_t>{});
  dispatch_floating(op, dtype, function);
}

}  // namespace ddfast
