// One tile of W' = round(W + L R). merge.cpp includes this once for each instruction set, with
//   COBRA_ISA     its namespace
//   COBRA_TARGET  the attribute that lets a function use it
//   COBRA_LANES   floats in a register
//   COBRA_ROWS    rows of L R that are summed at a time, two registers each

#define COBRA_INLINE static inline COBRA_ALWAYS COBRA_TARGET
#define COBRA_OUTLINE static COBRA_NEVER COBRA_TARGET  // a loop that needs all registers

namespace COBRA_ISA {

constexpr int LANES = COBRA_LANES, ROWS = COBRA_ROWS, PANEL = 2 * LANES;
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

// delta (ROWS, PANEL) = L R; -0 where the rank is 0, which leaves every number as it is
COBRA_OUTLINE void multiply(const float* left, const float* right, int64_t rank, float* delta) {
  Floats sum[ROWS][2];
  for (int i = 0; i < ROWS; ++i) sum[i][0] = sum[i][1] = -0.0f - Floats{};
  for (int64_t k = 0; k < rank; ++k) {
    const Floats right0 = load<Floats>(right + k * PANEL), right1 = load<Floats>(right + k * PANEL + LANES);
    for (int i = 0; i < ROWS; ++i) {
      sum[i][0] += left[k * ROWS + i] * right0;
      sum[i][1] += left[k * ROWS + i] * right1;
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    store(delta + i * PANEL, sum[i][0]);
    store(delta + i * PANEL + LANES, sum[i][1]);
  }
}

struct Sums {
  Doubles delta[2], weight[2], lost[2];
};

// adds the squares of n numbers, a multiple of PANEL, in fp64
COBRA_OUTLINE void add_squares(const float* delta, const float* before, const float* after, int64_t n, Sums& total) {
  Sums sums = total;
  for (int64_t j = 0; j < n; j += 2 * DOUBLE_LANES)
    for (int h = 0; h < 2; ++h) {
      const Doubles d = load_doubles(delta + j + h * DOUBLE_LANES), b = load_doubles(before + j + h * DOUBLE_LANES);
      const Doubles lost = load_doubles(after + j + h * DOUBLE_LANES) - b - d;
      sums.delta[h] += d * d;
      sums.weight[h] += b * b;
      sums.lost[h] += lost * lost;
    }
  total = sums;
}

// out = round(weight + delta), a panel of one row
template <class Format, bool STATISTICS>
COBRA_INLINE void finish(const typename Format::Number* weight, typename Format::Number* out, const float* delta, float* before,
                         float* after) {
  for (int j = 0; j < PANEL; j += LANES) {
    const Floats w = Format::get(weight + j);
    const Floats merged = Format::put(out + j, w + load<Floats>(delta + j));
    if (STATISTICS) {
      store(before + j, w);
      store(after + j, merged);
    }
  }
}

// a panel that the next block of rows needs: without it memory idles while this block is summed
template <class Number, bool WRITE>
COBRA_INLINE void prefetch(const Number* panel) {
  for (int j = 0; j < PANEL; j += 64 / int(sizeof(Number))) COBRA_PREFETCH(panel + j, WRITE);
}

template <class Format, bool STATISTICS>
COBRA_INLINE void merge_format(const Tile& tile, float* right, float* left, double* statistics) {
  using Number = typename Format::Number;
  const Site& site = *tile.site;
  Sums sums = {};
  pack_right(tile, right);
  for (int64_t row = 0; row < tile.rows; row += ROWS) {
    const int64_t rows = std::min<int64_t>(ROWS, tile.rows - row);
    pack_left(site, tile.row + row, rows, left);
    const Number* weight = static_cast<const Number*>(site.weight) + (tile.row + row) * site.weight_stride + tile.column;
    Number* out = static_cast<Number*>(site.out) + (tile.row + row) * site.out_stride + tile.column;
    for (int64_t column = 0; column < tile.columns; column += PANEL) {
      float delta[ROWS * PANEL], before[ROWS * PANEL], after[ROWS * PANEL];
      for (int64_t i = ROWS; i < std::min<int64_t>(2 * ROWS, tile.rows - row); ++i) {
        prefetch<Number, false>(weight + i * site.weight_stride + column);
        prefetch<Number, true>(out + i * site.out_stride + column);
      }
      multiply(left, right + column * site.rank, site.rank, delta);
      const int64_t columns = std::min<int64_t>(PANEL, tile.columns - column);
      for (int64_t i = 0; i < rows; ++i) {
        const Number* from = weight + i * site.weight_stride + column;
        Number* to = out + i * site.out_stride + column;
        float* d = delta + i * PANEL;
        if (columns == PANEL) {
          finish<Format, STATISTICS>(from, to, d, before + i * PANEL, after + i * PANEL);
        } else {
          Number edge[PANEL] = {};
          std::memcpy(edge, from, columns * sizeof(Number));
          std::fill(d + columns, d + PANEL, 0.0f);
          finish<Format, STATISTICS>(edge, edge, d, before + i * PANEL, after + i * PANEL);
          std::memcpy(to, edge, columns * sizeof(Number));
        }
      }
      if (STATISTICS) add_squares(delta, before, after, rows * PANEL, sums);
    }
  }
  if (!STATISTICS) return;
  const Doubles* parts[] = {sums.delta, sums.weight, sums.lost};
  for (int s = 0; s < 3; ++s) {
    double lanes[2 * DOUBLE_LANES];
    std::memcpy(lanes, parts[s], sizeof lanes);
    statistics[s] = 0;
    for (double lane : lanes) statistics[s] += lane;
  }
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
#undef COBRA_ROWS
