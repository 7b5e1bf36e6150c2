// Products of many tokens with a small side, fp32. Memory belongs to the caller.
//
//   shrink   out (T, r) = x (T, D) matrixᵀ, matrix (r, D)
//   reduce   out (r, D) = hᵀ x, h (T, r), x (T, D)
//
// Shrink is cut by tokens and reduce by columns, so that no sum is shared: the same bits whatever the number of threads. Long sums
// are made in blocks, as rounding errors grow with the length of a sum.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <vector>

#include "export.h"
#include "isa.h"
#include "parallel.h"

namespace cobra {
namespace {

struct Shrink {
  const float *x, *matrix;
  float* out;  // (tokens, rank), contiguous
  int64_t tokens, features, rank, x_stride, matrix_row, matrix_column;
};

struct Reduce {
  const float *h, *x;
  float* out;  // (rank, features), contiguous
  int64_t tokens, features, rank, h_stride, x_stride;
};

constexpr int64_t FEATURE_BLOCK = 64, TOKEN_BLOCK = 128;  // of a sum
constexpr int64_t TASK_TOKENS = 48, TASK_COLUMNS = 64;
constexpr int64_t LINE = 16, TOUCHED = 64 * FEATURE_BLOCK;  // floats of a cache line, and of a row that is read ahead

#define COBRA_ISA portable
#define COBRA_TARGET
#if defined(__GNUC__)
#define COBRA_LANES 4
#else
#define COBRA_LANES 1
#endif
#define COBRA_SUMS 12
#include "skinny_tile.h"

#if defined(__GNUC__) && defined(__x86_64__)
#define COBRA_ISA avx2
#define COBRA_TARGET COBRA_AVX2
#define COBRA_LANES 8
#define COBRA_SUMS 12
#include "skinny_tile.h"

#define COBRA_ISA avx512
#define COBRA_TARGET COBRA_AVX512
#define COBRA_LANES 16
#define COBRA_SUMS 24
#include "skinny_tile.h"
#endif

struct Functions {
  int64_t lanes;
  void (*pack)(const Shrink&, float*);
  void (*shrink)(const Shrink&, int64_t, int64_t, const float*);
  void (*reduce)(const Reduce&, int64_t, int64_t);
};

Functions functions_of(int64_t level) {
#if defined(__GNUC__) && defined(__x86_64__)
  if (level >= 2) return {16, avx512::pack_matrix, avx512::shrink_tokens, avx512::reduce_columns};
  if (level >= 1) return {8, avx2::pack_matrix, avx2::shrink_tokens, avx2::reduce_columns};
#endif
  (void)level;
  return {portable::LANES, portable::pack_matrix, portable::shrink_tokens, portable::reduce_columns};
}

void shrink(const Shrink& work, int64_t threads, int64_t level) {
  level = supported_level(level);
  if (level == 2 && work.rank <= 8) level = 1;  // wider registers would be half empty
  const Functions functions = functions_of(level);
  const int64_t width = 2 * functions.lanes;
  std::vector<float> packed(size_t((work.rank + width - 1) / width * width * work.features));
  functions.pack(work, packed.data());
  parallel_for((work.tokens + TASK_TOKENS - 1) / TASK_TOKENS, threads, [&](int64_t task, int64_t) {
    const int64_t first = task * TASK_TOKENS;
    functions.shrink(work, first, std::min(first + TASK_TOKENS, work.tokens), packed.data());
  });
}

void reduce(const Reduce& work, int64_t threads, int64_t level) {
  const Functions functions = functions_of(supported_level(level));
  parallel_for((work.features + TASK_COLUMNS - 1) / TASK_COLUMNS, threads, [&](int64_t task, int64_t) {
    const int64_t first = task * TASK_COLUMNS;
    functions.reduce(work, first, std::min(first + TASK_COLUMNS, work.features));
  });
}

}  // namespace
}  // namespace cobra

// Returns 0, or 1 where there was no memory to work in.
COBRA_EXPORT int32_t cobra_shrink(const float* x, const float* matrix, float* out, int64_t tokens, int64_t features, int64_t rank,
                                  int64_t x_stride, int64_t matrix_row, int64_t matrix_column, int64_t threads, int64_t level) {
  try {
    cobra::shrink({x, matrix, out, tokens, features, rank, x_stride, matrix_row, matrix_column}, threads, level);
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

COBRA_EXPORT int32_t cobra_reduce(const float* h, const float* x, float* out, int64_t tokens, int64_t features, int64_t rank,
                                  int64_t h_stride, int64_t x_stride, int64_t threads, int64_t level) {
  try {
    cobra::reduce({h, x, out, tokens, features, rank, h_stride, x_stride}, threads, level);
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}
