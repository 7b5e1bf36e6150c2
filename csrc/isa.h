// Instruction sets that a function may use beyond those of the whole build, and which of them the machine has.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__GNUC__)
#define COBRA_ALWAYS __attribute__((always_inline))
#define COBRA_NEVER __attribute__((noinline))
#define COBRA_UNROLL _Pragma("GCC unroll 32")  // early, so that arrays of registers are not kept in memory
#else
#define COBRA_ALWAYS
#define COBRA_NEVER
#define COBRA_UNROLL
#endif

#define COBRA_AVX2 __attribute__((target("avx2,fma,f16c")))
#define COBRA_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))

namespace cobra {

// The best up to `level`: 0 portable, 1 AVX2, 2 AVX-512.
inline int64_t supported_level(int64_t level) {
#if defined(__GNUC__) && defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return std::min<int64_t>(level, has_avx512 ? 2 : has_avx2 ? 1 : 0);
#else
  (void)level;
  return 0;
#endif
}

}  // namespace cobra
