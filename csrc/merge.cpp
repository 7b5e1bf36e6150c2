// W' = round(W + L R) for many sites in one call: one read of W and one write of W'. Memory belongs to the caller.
//
// A site is cut into tiles by its shape alone. Threads take tiles in any order, each tile leaves its sums in its own place, and
// these are added in the order of the tiles: the same bits whatever the number of threads.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>
#endif

#include "export.h"
#include "parallel.h"

namespace cobra {
namespace {

// Words of 64 bits in the order of cobra_kernels/merge_lora.py. Strides count elements; columns of weight and out are adjacent.
struct Site {
  const void* weight;  // (rows, columns)
  void* out;           // (rows, columns), may be weight
  const float* left;   // (rows, rank)
  const float* right;  // (rank, columns)
  int64_t rows, columns, rank;
  int64_t weight_stride, out_stride, left_row, left_rank, right_rank, right_column;
  int64_t dtype;  // 0 fp32, 1 bf16, 2 fp16
};

struct Tile {
  const Site* site;
  int64_t row, rows, column, columns;
};

constexpr int64_t TILE_ROWS = 96;        // a multiple of every ROWS
constexpr int64_t TILE_COLUMNS = 512;    // at most
constexpr int64_t TILE_FACTORS = 32768;  // elements of R in a tile, so that they stay in cache
constexpr int64_t PANEL_COLUMNS = 32;    // a multiple of every PANEL
constexpr int64_t MOST_ROWS = 8;
constexpr int64_t STATISTICS = 3;  // sums of squares: L R, W, (W' - W) - L R

int64_t tile_columns(int64_t rank) {
  return std::clamp(TILE_FACTORS / std::max<int64_t>(rank, 1) / PANEL_COLUMNS * PANEL_COLUMNS, PANEL_COLUMNS, TILE_COLUMNS);
}

#if defined(__GNUC__)
#define COBRA_ALWAYS __attribute__((always_inline))
#define COBRA_NEVER __attribute__((noinline))
#else
#define COBRA_ALWAYS
#define COBRA_NEVER
#endif

#define COBRA_ISA portable
#define COBRA_TARGET
#if defined(__GNUC__)
#define COBRA_LANES 4
#else
#define COBRA_LANES 1
#endif
#define COBRA_ROWS 6
#include "merge_tile.h"

#if defined(__GNUC__) && defined(__x86_64__)
#define COBRA_ISA avx2
#define COBRA_TARGET __attribute__((target("avx2,fma,f16c")))
#define COBRA_LANES 8
#define COBRA_ROWS 6
#include "merge_tile.h"

#define COBRA_ISA avx512
#define COBRA_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define COBRA_LANES 16
#define COBRA_ROWS 8
#include "merge_tile.h"
#endif

using MergeTile = void (*)(const Tile&, float*, float*, double*);

MergeTile pick(int64_t level) {
#if defined(__GNUC__) && defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (level >= 2 && has_avx2 && has_avx512) return avx512::merge_tile;
  if (level >= 1 && has_avx2) return avx2::merge_tile;
#endif
  (void)level;
  return portable::merge_tile;
}

}  // namespace
}  // namespace cobra

COBRA_EXPORT int32_t cobra_merge(const cobra::Site* sites, int64_t count, double* statistics, int64_t threads, int64_t level) try {
  using namespace cobra;
  std::vector<Tile> tiles;
  std::vector<int64_t> first{0};
  for (int64_t s = 0; s < count; ++s) {
    const Site& site = sites[s];
    const int64_t step = tile_columns(site.rank);
    for (int64_t row = 0; row < site.rows; row += TILE_ROWS)
      for (int64_t column = 0; column < site.columns; column += step)
        tiles.push_back({&site, row, std::min(TILE_ROWS, site.rows - row), column, std::min(step, site.columns - column)});
    first.push_back(int64_t(tiles.size()));
  }
  std::vector<double> sums(statistics ? tiles.size() * STATISTICS : 0);
  const MergeTile merge = pick(level);
  parallel_for(int64_t(tiles.size()), threads, [&](int64_t t) {
    static thread_local std::vector<float> scratch;
    const int64_t rank = tiles[t].site->rank;
    scratch.resize(rank * (tile_columns(rank) + 8));
    merge(tiles[t], scratch.data(), scratch.data() + rank * tile_columns(rank), statistics ? &sums[t * STATISTICS] : nullptr);
  });
  for (int64_t s = 0; statistics && s < count; ++s)
    for (int i = 0; i < STATISTICS; ++i) {
      statistics[s * STATISTICS + i] = 0;
      for (int64_t t = first[s]; t < first[s + 1]; ++t) statistics[s * STATISTICS + i] += sums[t * STATISTICS + i];
    }
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
