// Blocks of the products of skinny.cpp, which includes this once for each instruction set, with
//   COBRA_ISA     its namespace
//   COBRA_TARGET  the attribute that lets a function use it
//   COBRA_LANES   floats in a register
//   COBRA_SUMS    registers that hold sums

#define COBRA_INLINE static inline COBRA_ALWAYS COBRA_TARGET
#define COBRA_OUTLINE static COBRA_NEVER COBRA_TARGET  // so that the sums have all registers

namespace COBRA_ISA {

constexpr int LANES = COBRA_LANES;
#include "lanes.h"

// Reads rows in the order of memory, which processors foresee; blocks of many rows follow another. Loads, since prefetches are
// dropped where many are under way.
COBRA_INLINE void touch(const float* x, int64_t x_stride, int64_t rows, int64_t columns) {
  float sum = 0;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < columns; d += LINE) sum += x[i * x_stride + d];
  volatile float kept = sum;
  (void)kept;
}

// the first `lanes` numbers
COBRA_INLINE void add_to(float* to, Floats sum, int64_t lanes) {
  if (lanes >= LANES) return store(to, load<Floats>(to) + sum);
  float parts[LANES];
  store(parts, sum);
  for (int64_t i = 0; i < lanes; ++i) to[i] += parts[i];
}

// out (TOKENS, ranks) += x (TOKENS, features) matrix; matrix (features, VECTORS * LANES), 0 beyond the last rank
template <int TOKENS, int VECTORS>
COBRA_OUTLINE void shrink_block(const float* x, int64_t x_stride, int64_t features, const float* matrix, float* out,
                                int64_t out_stride, int64_t ranks) {
  Floats sum[TOKENS][VECTORS];
  COBRA_UNROLL
  for (int t = 0; t < TOKENS; ++t)
    COBRA_UNROLL
    for (int v = 0; v < VECTORS; ++v) sum[t][v] = Floats{};
  for (int64_t d = 0; d < features; ++d)
    COBRA_UNROLL
    for (int t = 0; t < TOKENS; ++t)
      COBRA_UNROLL
      for (int v = 0; v < VECTORS; ++v) sum[t][v] += x[t * x_stride + d] * load<Floats>(matrix + (d * VECTORS + v) * LANES);
  COBRA_UNROLL
  for (int t = 0; t < TOKENS; ++t)
    COBRA_UNROLL
    for (int v = 0; v < VECTORS; ++v) add_to(out + t * out_stride + v * LANES, sum[t][v], ranks - v * LANES);
}

// packed (features, VECTORS * LANES) of the ranks from `rank` on
template <int VECTORS>
COBRA_INLINE void pack(const Shrink& work, int64_t rank, float* packed) {
  for (int64_t d = 0; d < work.features; ++d)
    for (int64_t k = rank; k < rank + VECTORS * LANES; ++k)
      *packed++ = k < work.rank ? work.matrix[k * work.matrix_row + d * work.matrix_column] : 0.0f;
}

template <int VECTORS>
COBRA_INLINE void shrink_ranks(const Shrink& work, int64_t first, int64_t last, int64_t rank, const float* packed) {
  constexpr int TOKENS = std::min(12, COBRA_SUMS / VECTORS);  // more rows at equal strides would evict one another
  const int64_t ranks = std::min<int64_t>(VECTORS * LANES, work.rank - rank);
  for (int64_t d = 0; d < work.features; d += FEATURE_BLOCK) {
    const int64_t features = std::min(FEATURE_BLOCK, work.features - d);
    const float* matrix = packed + d * VECTORS * LANES;
    if (d % TOUCHED == 0) {
      touch(work.x + first * work.x_stride + d, work.x_stride, last - first, std::min(TOUCHED, work.features - d));
    }
    for (int64_t t = first; t < last;) {
      const bool whole = t + TOKENS <= last;
      const auto block = whole ? shrink_block<TOKENS, VECTORS> : shrink_block<1, VECTORS>;
      block(work.x + t * work.x_stride + d, work.x_stride, features, matrix, work.out + t * work.rank + rank, work.rank, ranks);
      t += whole ? TOKENS : 1;
    }
  }
}

COBRA_TARGET void pack_matrix(const Shrink& work, float* packed) {
  int64_t rank = 0;
  for (; work.rank - rank > LANES; rank += 2 * LANES, packed += 2 * LANES * work.features) pack<2>(work, rank, packed);
  if (rank < work.rank) pack<1>(work, rank, packed);
}

// tokens [first, last)
COBRA_TARGET void shrink_tokens(const Shrink& work, int64_t first, int64_t last, const float* packed) {
  std::fill(work.out + first * work.rank, work.out + last * work.rank, 0.0f);
  int64_t rank = 0;
  for (; work.rank - rank > LANES; rank += 2 * LANES, packed += 2 * LANES * work.features)
    shrink_ranks<2>(work, first, last, rank, packed);
  if (rank < work.rank) shrink_ranks<1>(work, first, last, rank, packed);
}

constexpr int PANEL = 2 * LANES, RANKS = COBRA_SUMS >= 16 ? 8 : 4;

// out (COUNT, columns) += hᵀ x; h (tokens, COUNT), x (tokens, PANEL)
template <int COUNT>
COBRA_OUTLINE void reduce_block(const float* h, int64_t h_stride, const float* x, int64_t x_stride, int64_t tokens, float* out,
                                int64_t out_stride, int64_t columns) {
  Floats sum[COUNT][2];
  COBRA_UNROLL
  for (int k = 0; k < COUNT; ++k) sum[k][0] = sum[k][1] = Floats{};
  for (int64_t t = 0; t < tokens; ++t) {
    const Floats x0 = load<Floats>(x + t * x_stride), x1 = load<Floats>(x + t * x_stride + LANES);
    COBRA_UNROLL
    for (int k = 0; k < COUNT; ++k) {
      sum[k][0] += h[t * h_stride + k] * x0;
      sum[k][1] += h[t * h_stride + k] * x1;
    }
  }
  COBRA_UNROLL
  for (int k = 0; k < COUNT; ++k) {
    add_to(out + k * out_stride, sum[k][0], columns);
    add_to(out + k * out_stride + LANES, sum[k][1], columns - LANES);
  }
}

// columns [first, last) of out
COBRA_TARGET void reduce_columns(const Reduce& work, int64_t first, int64_t last) {
  using Block = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t, int64_t);
  constexpr Block blocks[] = {reduce_block<1>, reduce_block<2>, reduce_block<4>, reduce_block<8>};
  float edge[TOKEN_BLOCK * PANEL];
  for (int64_t k = 0; k < work.rank; ++k) std::fill(work.out + k * work.features + first, work.out + k * work.features + last, 0.0f);
  for (int64_t t = 0; t < work.tokens; t += TOKEN_BLOCK) {
    const int64_t tokens = std::min(TOKEN_BLOCK, work.tokens - t);
    for (int64_t column = first; column < last; column += PANEL) {
      const int64_t columns = std::min<int64_t>(PANEL, last - column);
      const float* x = work.x + t * work.x_stride + column;
      int64_t x_stride = work.x_stride;
      if (columns < PANEL) {
        std::fill_n(edge, TOKEN_BLOCK * PANEL, 0.0f);
        for (int64_t i = 0; i < tokens; ++i) std::copy_n(x + i * x_stride, columns, edge + i * PANEL);
        x = edge, x_stride = PANEL;
      }
      for (int64_t rank = 0, count = RANKS, power = RANKS == 8 ? 3 : 2; rank < work.rank; rank += count) {
        for (; count > work.rank - rank; --power) count /= 2;
        blocks[power](work.h + t * work.h_stride + rank, work.h_stride, x, x_stride, tokens,
                      work.out + rank * work.features + column, work.features, columns);
      }
    }
  }
}

}  // namespace COBRA_ISA

#undef COBRA_INLINE
#undef COBRA_OUTLINE
#undef COBRA_CONVERT
#undef COBRA_ISA
#undef COBRA_TARGET
#undef COBRA_LANES
#undef COBRA_SUMS
