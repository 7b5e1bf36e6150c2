// W' = round(W + L R) for many sites in one launch: one read of W and one write of W'.
//
// A block has one tile of one site, which it finds by the first tile of each. A sum over ranks has the order of csrc/merge.cpp with
// its multiply-adds, so that W' has the same bits. Statistics are summed by tile, and these in the order of the tiles.
#include "cuda_formats.h"
#include "cuda_launch.h"
#include "export.h"
#include "merge_site.h"

namespace cobra {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int ROWS = 4, FOURS = 2;                           // of a thread: rows, and groups of four columns in each
constexpr int ACROSS = 16;                                   // threads along a row
constexpr int TILE_ROWS = THREADS / ACROSS * ROWS;           // 64
constexpr int TILE_COLUMNS = ACROSS * 4 * FOURS;             // 128
constexpr int RANKS = 16;                                    // in shared memory at a time
constexpr int LEFT_STRIDE = TILE_ROWS + 4;                   // keeps rows aligned to four, and spreads them over the banks

template <class Number>
struct alignas(4 * sizeof(Number)) Four {
  Number number[4];
};

struct Shared {
  Site site;  // functions take it by value: what they write could change it otherwise, and they would read it again and again
  alignas(16) float left[RANKS * LEFT_STRIDE];    // [rank][row]
  alignas(16) float right[RANKS * TILE_COLUMNS];  // [rank][column]
  double sums[WARPS * SUMS];
};

// Four adjacent numbers, of which `count` exist; the others are 0
template <class Number>
__device__ inline Four<Number> load_four(const Number* from, int count, bool aligned) {
  if (aligned && count >= 4) return *reinterpret_cast<const Four<Number>*>(from);
  Four<Number> four = {};
  for (int j = 0; j < 4; ++j)
    if (j < count) four.number[j] = from[j];
  return four;
}

template <class Number>
__device__ inline void store_four(Number* to, const Four<Number>& four, int count, bool aligned) {
  if (aligned && count >= 4) {
    *reinterpret_cast<Four<Number>*>(to) = four;
    return;
  }
  for (int j = 0; j < 4; ++j)
    if (j < count) to[j] = four.number[j];
}

// Ranks [rank, rank + count) of the tile at (row, column); what lies beyond the site is 0
__device__ inline void stage(const Site site, int64_t row, int64_t column, int64_t rank, int count, Shared& shared) {
#pragma unroll 2
  for (int i = threadIdx.x; i < TILE_ROWS * RANKS; i += THREADS) {
    const int k = i % RANKS, m = i / RANKS;
    const bool inside = k < count && row + m < site.rows;
    shared.left[k * LEFT_STRIDE + m] = inside ? site.left[(row + m) * site.left_row + (rank + k) * site.left_rank] : 0.0f;
  }
#pragma unroll 2
  for (int i = threadIdx.x; i < RANKS * TILE_COLUMNS; i += THREADS) {
    const int n = i % TILE_COLUMNS, k = i / TILE_COLUMNS;
    const bool inside = k < count && column + n < site.columns;
    shared.right[i] = inside ? site.right[(rank + k) * site.right_rank + (column + n) * site.right_column] : 0.0f;
  }
}

using Delta = float[ROWS][FOURS * 4];

// sum += L R over the ranks that are staged
__device__ inline void multiply(const Shared& shared, int count, Delta& sum) {
  const float* left = shared.left + threadIdx.x / ACROSS * ROWS;
  const float* right = shared.right + threadIdx.x % ACROSS * 4;
#pragma unroll 2
  for (int k = 0; k < count; ++k) {
    const Four<float> l = *reinterpret_cast<const Four<float>*>(left + k * LEFT_STRIDE);
#pragma unroll
    for (int f = 0; f < FOURS; ++f) {
      const Four<float> r = *reinterpret_cast<const Four<float>*>(right + k * TILE_COLUMNS + f * ACROSS * 4);
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][f * 4 + j] = fmaf(l.number[i], r.number[j], sum[i][f * 4 + j]);
    }
  }
}

// delta = L R: each RANK_BLOCK ranks are summed by themselves. -0 where the rank is 0: it leaves numbers as they are
__device__ inline void multiply_all(const Site site, int64_t row, int64_t column, Shared& shared, Delta& delta) {
  Delta sum;
  for (int i = 0; i < ROWS * FOURS * 4; ++i) (&delta[0][0])[i] = (&sum[0][0])[i] = -0.0f;
  for (int64_t rank = 0; rank < site.rank; rank += RANKS) {
    const int count = int(min(int64_t(RANKS), site.rank - rank));
    __syncthreads();  // the ranks before are used up
    stage(site, row, column, rank, count, shared);
    __syncthreads();
    multiply(shared, count, sum);
    if ((rank + RANKS) % RANK_BLOCK && rank + RANKS < site.rank) continue;
    for (int i = 0; i < ROWS * FOURS * 4; ++i) {
      (&delta[0][0])[i] += (&sum[0][0])[i];
      (&sum[0][0])[i] = -0.0f;
    }
  }
}

// Of all threads, in a fixed order; statistics: (SUMS,)
__device__ inline void reduce_block(double (&squares)[SUMS], double (&shared)[WARPS * SUMS], double* statistics) {
  for (int s = 0; s < SUMS; ++s) {
    for (int step = 16; step; step /= 2) squares[s] += __shfl_down_sync(0xFFFFFFFFu, squares[s], step);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32 * SUMS + s] = squares[s];
  }
  __syncthreads();
  if (threadIdx.x >= SUMS) return;
  double sum = 0;
  for (int warp = 0; warp < WARPS; ++warp) sum += shared[warp * SUMS + threadIdx.x];
  statistics[threadIdx.x] = sum;
}

// out = round(weight + delta) of a thread's rows, of which as many are read at a time as registers hold
template <class Format>
__device__ inline void finish(const Site site, int64_t row, int64_t column, const Delta& delta, double (&squares)[SUMS]) {
  using Number = typename Format::Number;
  constexpr int BATCH = sizeof(Number) == 4 ? ROWS / 2 : ROWS;
  row += threadIdx.x / ACROSS * ROWS;
  column += threadIdx.x % ACROSS * 4;
  const Number* weight = static_cast<const Number*>(site.weight) + row * site.weight_stride + column;
  Number* out = static_cast<Number*>(site.out) + row * site.out_stride + column;
  const uintptr_t steps = (site.weight_stride | site.out_stride) * sizeof(Number);
  const bool aligned = ((uintptr_t(weight) | uintptr_t(out) | steps) & (4 * sizeof(Number) - 1)) == 0;
  const int rows = int(max(min(site.rows - row, int64_t(ROWS)), int64_t(0)));
  const int columns = int(min(site.columns - column, int64_t(TILE_COLUMNS)));
  float sums[SUMS] = {};
#pragma unroll
  for (int start = 0; start < ROWS; start += BATCH) {
    Four<Number> fours[BATCH][FOURS];
#pragma unroll
    for (int i = 0; i < BATCH; ++i, weight += site.weight_stride)
#pragma unroll
      for (int f = 0; f < FOURS; ++f) {
        const int at = f * ACROSS * 4, count = start + i < rows ? columns - at : 0;
        fours[i][f] = load_four(weight + at, count, aligned);
      }
#pragma unroll
    for (int i = 0; i < BATCH; ++i, out += site.out_stride)
#pragma unroll
      for (int f = 0; f < FOURS; ++f) {
        const int at = f * ACROSS * 4, count = start + i < rows ? columns - at : 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          Number& number = fours[i][f].number[j];
          const float before = Format::get(number), change = delta[start + i][f * 4 + j];
          number = Format::put(before + change);
          if (j >= count) continue;
          const float lost = Format::lost(before, change, Format::get(number));
          sums[0] = fmaf(change, change, sums[0]);
          sums[1] = fmaf(before, before, sums[1]);
          sums[2] = fmaf(lost, lost, sums[2]);
        }
        store_four(out + at, fours[i][f], count, aligned);
      }
  }
  for (int s = 0; s < SUMS; ++s) squares[s] = sums[s];
}

// Grid (tiles,). statistics: (tiles, SUMS), or null
__global__ void __launch_bounds__(THREADS, 2)
    merge_kernel(const Site* sites, const int64_t* first_tile, int64_t count, double* statistics) {
  __shared__ Shared shared;
  const int64_t tile = blockIdx.x, found = find_site(first_tile, count, tile), within = tile - first_tile[found];
  if (threadIdx.x == 0) shared.site = sites[found];
  __syncthreads();
  const int64_t across = ceil_div<int64_t>(shared.site.columns, TILE_COLUMNS);
  const int64_t row = within / across * TILE_ROWS, column = within % across * TILE_COLUMNS;
  Delta delta;
  multiply_all(shared.site, row, column, shared, delta);
  double squares[SUMS];
  const int64_t dtype = shared.site.dtype;
  if (dtype == 0) finish<Float32>(shared.site, row, column, delta, squares);
  if (dtype == 1) finish<BFloat16>(shared.site, row, column, delta, squares);
  if (dtype == 2) finish<Float16>(shared.site, row, column, delta, squares);
  if (statistics) reduce_block(squares, shared.sums, statistics + tile * SUMS);
}

// Grid (sites,): the sums of each site's tiles
__global__ void __launch_bounds__(THREADS) merge_sums_kernel(const int64_t* first_tile, const double* tiles, double* statistics) {
  __shared__ double shared[WARPS * SUMS];
  double squares[SUMS] = {};
  for (int64_t tile = first_tile[blockIdx.x] + threadIdx.x; tile < first_tile[blockIdx.x + 1]; tile += THREADS)
    for (int s = 0; s < SUMS; ++s) squares[s] += tiles[tile * SUMS + s];
  reduce_block(squares, shared, statistics + blockIdx.x * SUMS);
}

}  // namespace cobra

// Tiles of a site.
COBRA_EXPORT int64_t cobra_cuda_merge_tiles(int64_t rows, int64_t columns) {
  return cobra::ceil_div<int64_t>(rows, cobra::TILE_ROWS) * cobra::ceil_div<int64_t>(columns, cobra::TILE_COLUMNS);
}

// All on the current device. first_tile: (count + 1,). tile_sums (tiles, 3) and statistics (count, 3): memory to write to, or null.
COBRA_EXPORT int cobra_cuda_merge(const void* sites, const int64_t* first_tile, int64_t count, int64_t tiles, double* tile_sums,
                                  double* statistics, void* stream) {
  using namespace cobra;
  int error = 0;
  if (tiles) error = launch(merge_kernel, dim3(unsigned(tiles)), THREADS, 0, stream, static_cast<const Site*>(sites), first_tile, count, tile_sums);
  if (error || !statistics || !count) return error;
  return launch(merge_sums_kernel, dim3(unsigned(count)), THREADS, 0, stream, first_tile, tile_sums, statistics);
}
