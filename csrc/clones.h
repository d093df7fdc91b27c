// DDFAST_CLONES before a function compiles it for several instruction sets; the widest that the CPU has is taken when the
// library is loaded. No clone fuses a multiplication with an addition (see setup.py) and the compiler may not reorder
// sums, so that all of them give the same bits.

#pragma once

#if defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__) && !defined(__clang__)
#define DDFAST_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DDFAST_CLONES
#endif
