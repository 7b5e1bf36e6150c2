// W' = round(W + L R) for many sites in one call: one read of W and one write of W'. Memory belongs to the caller.
//
// A site is cut into tiles by its shape alone. Threads take tiles in any order, each tile leaves its sums in its own place, and
// these are added in the order of the tiles: the same bits whatever the number of threads.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "export.h"
#include "isa.h"
#include "merge_site.h"
#include "parallel.h"

#if defined(__GNUC__)
#define COBRA_PREFETCH(address) __builtin_prefetch(address, 0, 2)
#else
#define COBRA_PREFETCH(address) (void)(address)
#endif

// after stores past the caches, which are not ordered with others
#if defined(__GNUC__) && defined(__x86_64__)
#define COBRA_FENCE() _mm_sfence()
#else
#define COBRA_FENCE() (void)0
#endif

namespace cobra {
namespace {

struct Tile {
  const Site* site;
  int64_t row, rows, column, columns;
};

constexpr int64_t TILE_ROWS = 192;       // a multiple of ROWS
constexpr int64_t TILE_COLUMNS = 512;    // at most
constexpr int64_t TILE_FACTORS = 32768;  // elements of R in a tile, so that they stay in cache
constexpr int64_t MOST_COLUMNS = 64;     // of a panel: a multiple of every PANEL
constexpr int ROWS = 4;                  // of a block

#define COBRA_ISA portable
#define COBRA_TARGET
#if defined(__GNUC__)
#define COBRA_LANES 4
#else
#define COBRA_LANES 1
#endif
#define COBRA_VECTORS 2
#include "merge_tile.h"

#if defined(__GNUC__) && defined(__x86_64__)
#define COBRA_ISA avx2
#define COBRA_TARGET COBRA_AVX2
#define COBRA_LANES 8
#define COBRA_VECTORS 2
#include "merge_tile.h"

#define COBRA_ISA avx512
#define COBRA_TARGET COBRA_AVX512
#define COBRA_LANES 16
#define COBRA_VECTORS 4
#include "merge_tile.h"
#endif

using MergeTile = void (*)(const Tile&, float*, float*, double*);

MergeTile pick(int64_t level) {
  level = supported_level(level);
#if defined(__GNUC__) && defined(__x86_64__)
  if (level >= 2) return avx512::merge_tile;
  if (level >= 1) return avx2::merge_tile;
#endif
  return portable::merge_tile;
}

int64_t tile_columns(int64_t rank) {
  const int64_t fitting = TILE_FACTORS / std::max<int64_t>(rank, 1) / MOST_COLUMNS * MOST_COLUMNS;
  return std::min(std::max(fitting, MOST_COLUMNS), TILE_COLUMNS);
}

// The first write to new memory costs more than the merge, page by page; large pages make it fewer.
void prefer_huge_pages(const Site& site) {
#if defined(__linux__)
  constexpr uintptr_t HUGE_PAGE = 1 << 21;
  const uintptr_t size = uintptr_t(((site.rows - 1) * site.out_stride + site.columns) * (site.dtype == 0 ? 4 : 2));
  const uintptr_t first = (uintptr_t(site.out) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const uintptr_t last = (uintptr_t(site.out) + size) / HUGE_PAGE * HUGE_PAGE;
  if (site.rows > 0 && site.out != site.weight && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)site;
#endif
}

void merge_sites(const Site* sites, int64_t count, double* statistics, int64_t threads, int64_t level) {
  std::vector<Tile> tiles;
  std::vector<int64_t> ends;
  int64_t right_size = 0, left_size = 0;
  for (const Site* site = sites; site != sites + count; ++site) {
    prefer_huge_pages(*site);
    const int64_t step = tile_columns(site->rank);
    for (int64_t row = 0; row < site->rows; row += TILE_ROWS)
      for (int64_t column = 0; column < site->columns; column += step)
        tiles.push_back({site, row, std::min(TILE_ROWS, site->rows - row), column, std::min(step, site->columns - column)});
    ends.push_back(int64_t(tiles.size()));
    right_size = std::max(right_size, site->rank * step);
    left_size = std::max(left_size, site->rank * ROWS);
  }
  std::vector<float> scratch(size_t(std::max<int64_t>(threads, 1) * (right_size + left_size)));
  std::vector<double> sums(statistics ? tiles.size() * SUMS : 0);
  const MergeTile merge = pick(level);
  parallel_for(int64_t(tiles.size()), threads, [&](int64_t tile, int64_t worker) {
    float* right = scratch.data() + worker * (right_size + left_size);
    merge(tiles[tile], right, right + right_size, statistics ? &sums[tile * SUMS] : nullptr);
  });
  if (!statistics) return;
  std::fill(statistics, statistics + count * SUMS, 0.0);
  for (int64_t site = 0, tile = 0; site < count; ++site)
    for (; tile < ends[site]; ++tile)
      for (int64_t s = 0; s < SUMS; ++s) statistics[site * SUMS + s] += sums[tile * SUMS + s];
}

}  // namespace
}  // namespace cobra

// statistics: (count, 3), or null. Returns 0, or 1 where there was no memory to work in.
COBRA_EXPORT int32_t cobra_merge(const void* sites, int64_t count, double* statistics, int64_t threads, int64_t level) {
  try {
    cobra::merge_sites(static_cast<const cobra::Site*>(sites), count, statistics, threads, level);
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}
