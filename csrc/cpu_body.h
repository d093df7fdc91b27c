// Which of the bodies that are written for an instruction set this process runs. They round in different orders, so
// that the body decides the last bits of a result; a run writes it into its manifest (ddfast/ops/_dispatch.py).
//
// It is the best that the CPU has, or what DDFAST_CPU_BODY names, which must be among those. It is settled at the first
// call.

#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdlib>
#include <string_view>

namespace ddfast {

enum class CpuBody : int64_t {
  kPortable,    // no instructions but those that the compiler may take anywhere, and the clones of clones.h
  kAvx2,        // AVX2 and FMA; what has no body of its own for them runs the portable one
  kAvx512,      // AVX-512 F, BW, DQ and VL
  kAvx512Bf16,  // and its bfloat16 extension
};

inline CpuBody best_cpu_body() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return avx2 ? CpuBody::kAvx2 : CpuBody::kPortable;
  }
  return __builtin_cpu_supports("avx512bf16") ? CpuBody::kAvx512Bf16 : CpuBody::kAvx512;
#else
  return CpuBody::kPortable;
#endif
}

inline CpuBody chosen_cpu_body() {
  const CpuBody best = best_cpu_body();
  const char* variable = std::getenv("DDFAST_CPU_BODY");
  const std::string_view name = variable == nullptr ? "" : variable;
  if (name.empty()) return best;
  STD_TORCH_CHECK(name == "portable" || name == "avx2" || name == "avx512" || name == "avx512_bf16",
                  "DDFAST_CPU_BODY must be portable, avx2, avx512 or avx512_bf16, got ", variable);
  const CpuBody wanted = name == "portable" ? CpuBody::kPortable
                         : name == "avx2"   ? CpuBody::kAvx2
                         : name == "avx512" ? CpuBody::kAvx512
                                            : CpuBody::kAvx512Bf16;
  STD_TORCH_CHECK(wanted <= best, "DDFAST_CPU_BODY is ", variable, ", whose instructions this CPU has not: unset it");
  return wanted;
}

inline CpuBody cpu_body() {
  static const CpuBody chosen = chosen_cpu_body();
  return chosen;
}

}  // namespace ddfast
