// One tile of W' = round(W + L R). merge.cpp includes this once for each instruction set, with
//   COBRA_ISA      its namespace
//   COBRA_TARGET   the attribute that lets a function use it
//   COBRA_LANES    floats in a register
//   COBRA_VECTORS  registers in a row of a block: ROWS of them are summed at a time

#define COBRA_INLINE static inline COBRA_ALWAYS COBRA_TARGET
#define COBRA_OUTLINE static COBRA_NEVER COBRA_TARGET

namespace COBRA_ISA {

constexpr int LANES = COBRA_LANES, VECTORS = COBRA_VECTORS, PANEL = VECTORS * LANES;
#include "lanes.h"

// packed: [panel][rank][column]; columns beyond the last one are 0
COBRA_INLINE void pack_right(const Tile& tile, float* packed) {
  const Site& site = *tile.site;
  for (int64_t column = 0; column < tile.columns; column += PANEL) {
    const int64_t columns = std::min<int64_t>(PANEL, tile.columns - column);
    for (int64_t k = 0; k < site.rank; ++k, packed += PANEL) {
      const float* from = site.right + k * site.right_rank + (tile.column + column) * site.right_column;
      if (columns == PANEL && site.right_column == 1) {
        std::memcpy(packed, from, PANEL * sizeof(float));
      } else {
        for (int64_t j = 0; j < PANEL; ++j) packed[j] = j < columns ? from[j * site.right_column] : 0.0f;
      }
    }
  }
}

// packed: [rank][row]; rows beyond the last one are 0
COBRA_INLINE void pack_left(const Site& site, int64_t row, int64_t rows, float* packed) {
  for (int64_t i = 0; i < ROWS; ++i) {
    const float* from = site.left + (row + i) * site.left_row;
    for (int64_t k = 0; k < site.rank; ++k) packed[k * ROWS + i] = i < rows ? from[k * site.left_rank] : 0.0f;
  }
}

// sum (ROWS, PANEL) = L R in registers; left (rank, ROWS), right (rank, PANEL). -0 where the rank is 0: it leaves numbers as they are
COBRA_INLINE void multiply(const float* left, const float* right, int64_t rank, Floats (&sum)[ROWS][VECTORS]) {
  COBRA_UNROLL
  for (int i = 0; i < ROWS; ++i)
    COBRA_UNROLL
    for (int v = 0; v < VECTORS; ++v) sum[i][v] = -0.0f - Floats{};
  for (int64_t k = 0; k < rank; ++k)
    COBRA_UNROLL
    for (int i = 0; i < ROWS; ++i)
      COBRA_UNROLL
      for (int v = 0; v < VECTORS; ++v) sum[i][v] += left[k * ROWS + i] * load<Floats>(right + k * PANEL + v * LANES);
}

// Squares of L R, W and what rounding lost, lane by lane.
struct Squares {
  Floats delta[2], weight[2], lost[2];
};

// out = round(weight + delta), one register
template <class Format, bool STATISTICS, bool STREAMS>
COBRA_INLINE void finish(const typename Format::Number* weight, typename Format::Number* out, Floats delta, Squares& squares, int s) {
  const Floats before = Format::get(weight), after = Format::template put<STREAMS>(out, before + delta);
  if (!STATISTICS) return;
  const Floats lost = Format::lost(before, delta, after);
  squares.delta[s] = add_square(squares.delta[s], delta);
  squares.weight[s] = add_square(squares.weight[s], before);
  squares.lost[s] = add_square(squares.lost[s], lost);
}

// Where a block is, and how much of it there is: up to ROWS rows of up to PANEL columns.
template <class Number>
struct Place {
  const Number* weight;
  Number* out;
  int64_t weight_stride, out_stride, rows, columns;
};

// out = round(weight + L R), a whole block; a function of its own, so that the sums have all registers
template <class Format, bool STATISTICS, bool STREAMS>
COBRA_OUTLINE void merge_block(const float* left, const float* right, int64_t rank, const Place<typename Format::Number>& at,
                               Squares& squares) {
  Floats delta[ROWS][VECTORS];
  multiply(left, right, rank, delta);
  Squares sums = squares;
  COBRA_UNROLL
  for (int i = 0; i < ROWS; ++i)
    COBRA_UNROLL
    for (int v = 0; v < VECTORS; ++v)
      finish<Format, STATISTICS, STREAMS>(at.weight + i * at.weight_stride + v * LANES, at.out + i * at.out_stride + v * LANES,
                                          delta[i][v], sums, v % 2);
  squares = sums;
}

// As merge_block, of any size and rank: what a block lacks is 0, and each RANK_BLOCK ranks are summed by themselves, since
// rounding errors grow with the length of a sum.
template <class Format, bool STATISTICS>
COBRA_OUTLINE void merge_part(const float* left, const float* right, int64_t rank, const Place<typename Format::Number>& at,
                              Squares& squares) {
  typename Format::Number edge[ROWS * PANEL] = {};
  float delta[ROWS * PANEL];
  std::fill_n(delta, ROWS * PANEL, -0.0f);
  for (int64_t k = 0; k < rank; k += RANK_BLOCK) {
    Floats sum[ROWS][VECTORS];
    multiply(left + k * ROWS, right + k * PANEL, std::min(rank - k, RANK_BLOCK), sum);
    for (int i = 0; i < ROWS; ++i)
      for (int v = 0; v < VECTORS; ++v) {
        float* total = delta + i * PANEL + v * LANES;
        store(total, load<Floats>(total) + sum[i][v]);
      }
  }
  for (int64_t i = 0; i < at.rows; ++i) std::copy_n(at.weight + i * at.weight_stride, at.columns, edge + i * PANEL);
  for (int64_t j = 0; j < ROWS * PANEL; j += LANES)
    finish<Format, STATISTICS, false>(edge + j, edge + j, load<Floats>(delta + j), squares, 0);
  for (int64_t i = 0; i < at.rows; ++i) std::copy_n(edge + i * PANEL, at.columns, at.out + i * at.out_stride);
}

// to the second cache: without it memory idles while a block is summed
template <class Number>
COBRA_INLINE void prefetch(const Number* from, int64_t count) {
  for (int64_t j = 0; j < count; j += 64 / int64_t(sizeof(Number))) COBRA_PREFETCH(from + j);
}

COBRA_INLINE double sum_lanes(const Floats (&squares)[2]) {
  float lanes[2 * LANES];
  std::memcpy(lanes, squares, sizeof lanes);
  double sum = 0;
  for (float lane : lanes) sum += lane;
  return sum;
}

template <class Format, bool STATISTICS>
COBRA_INLINE void merge_format(const Tile& tile, float* right, float* left, double* statistics) {
  using Number = typename Format::Number;
  const Site& site = *tile.site;
  const int64_t rank = site.rank, from = site.weight_stride, to = site.out_stride;
  // whole lines of 64 bytes only, or memory is read to fill them
  const bool streams = PANEL * sizeof(Number) % 64 == 0 && uintptr_t(site.out) % 64 == 0 &&
                       to * sizeof(Number) % 64 == 0;
  const auto merge_whole = streams ? merge_block<Format, STATISTICS, true> : merge_block<Format, STATISTICS, false>;
  double sums[SUMS] = {};
  pack_right(tile, right);
  for (int64_t row = 0; row < tile.rows; row += ROWS) {
    const int64_t rows = std::min<int64_t>(ROWS, tile.rows - row), next = std::min<int64_t>(2 * ROWS, tile.rows - row);
    const Number* weight = static_cast<const Number*>(site.weight) + (tile.row + row) * from + tile.column;
    Number* out = static_cast<Number*>(site.out) + (tile.row + row) * to + tile.column;
    Squares squares = {};
    pack_left(site, tile.row + row, rows, left);
    for (int64_t column = 0; column < tile.columns; column += PANEL) {
      const int64_t columns = std::min<int64_t>(PANEL, tile.columns - column);
      for (int64_t i = ROWS; i < next; ++i) prefetch(weight + i * from + column, columns);
      const Place<Number> at = {weight + column, out + column, from, to, rows, columns};
      const bool whole = rows == ROWS && columns == PANEL && rank <= RANK_BLOCK;
      (whole ? merge_whole : merge_part<Format, STATISTICS>)(left, right + column * rank, rank, at, squares);
    }
    if (!STATISTICS) continue;
    sums[0] += sum_lanes(squares.delta);
    sums[1] += sum_lanes(squares.weight);
    sums[2] += sum_lanes(squares.lost);
  }
  if (STATISTICS) std::copy(sums, sums + SUMS, statistics);
  if (streams) COBRA_FENCE();
}

// statistics: (3,), or null
COBRA_TARGET void merge_tile(const Tile& tile, float* right, float* left, double* statistics) {
  switch (2 * tile.site->dtype + (statistics != nullptr)) {
    case 0: return merge_format<Float32, false>(tile, right, left, statistics);
    case 1: return merge_format<Float32, true>(tile, right, left, statistics);
    case 2: return merge_format<BFloat16, false>(tile, right, left, statistics);
    case 3: return merge_format<BFloat16, true>(tile, right, left, statistics);
    case 4: return merge_format<Float16, false>(tile, right, left, statistics);
    default: return merge_format<Float16, true>(tile, right, left, statistics);
  }
}

}  // namespace COBRA_ISA

#undef COBRA_INLINE
#undef COBRA_OUTLINE
#undef COBRA_CONVERT
#undef COBRA_ISA
#undef COBRA_TARGET
#undef COBRA_LANES
#undef COBRA_VECTORS
