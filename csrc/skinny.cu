// Products of many tokens with at most 64 ranks, on tensor cores: bf16 or fp16 operands, fp32 sums.
//
//   shrink   h (T, r) = x (T, D) matrixᵀ, matrix (r, D)
//   reduce   S (D, r) = xᵀ h, h (T, r), and with a matrix (D, r) also g (T, r) = x matrix, of the same reading of x
//
// Sums that blocks share are left in planes, and added in the order of the planes: the same inputs give the same bits. Operands
// have dense rows of any length at any address; what is aligned to 16 bytes is copied past the registers.
#include "cuda_formats.h"
#include "cuda_launch.h"
#include "cuda_mma.h"
#include "export.h"

namespace cobra {

// Rows of halves, of which some exist: others are 0
struct Rows {
  const uint16_t* first;
  int64_t stride, rows, columns;
};

__device__ inline bool is_aligned(const Rows& rows) { return ((uintptr_t(rows.first) | uintptr_t(rows.stride * 2)) & 15) == 0; }

// PIECES from (row, column) on to each of COUNT rows in shared memory, by THREADS threads
template <int THREADS, int COUNT, int PIECES>
__device__ inline void stage(uint16_t* shared, const Rows& from, int64_t row, int64_t column, bool aligned) {
#pragma unroll
  for (int start = 0; start < COUNT * PIECES; start += THREADS) {
    const int i = start + int(threadIdx.x), m = i / PIECES, piece = i % PIECES;
    if (COUNT * PIECES % THREADS && i >= COUNT * PIECES) break;
    uint16_t* to = shared + place<PIECES>(m, piece) * PIECE;
    const int64_t at = column + piece * PIECE, left = row + m < from.rows ? from.columns - at : 0;
    const int count = int(max(min(left, int64_t(PIECE)), int64_t(0)));
    const uint16_t* source = count ? from.first + (row + m) * from.stride + at : from.first;
    if (aligned) {
      copy_async(to, source, 2 * count);
    } else {
      for (int j = 0; j < PIECE; ++j) to[j] = j < count ? source[j] : uint16_t(0);
    }
  }
}

constexpr int SHRINK_THREADS = 128, SHRINK_TOKENS = 64, SHRINK_FEATURES = 64, SHRINK_STAGES = 4;
constexpr int SHRINK_PIECES = SHRINK_FEATURES / PIECE;

template <int RANKS>
constexpr size_t shrink_shared() {
  return SHRINK_STAGES * (SHRINK_TOKENS + RANKS) * SHRINK_FEATURES * sizeof(uint16_t);
}

// sum (16 tokens of the warp, RANKS) += x matrixᵀ over the features in shared memory
template <class Format, int RANKS>
__device__ inline void shrink_stage(const uint16_t* x, const uint16_t* matrix, float (&sum)[RANKS / 8][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int k = 0; k < SHRINK_PIECES; k += 2) {
    uint32_t a[4];
    load_matrices(a, x + place<SHRINK_PIECES>(warp * 16 + row_of_16x2(lane), k + piece_of_16x2(lane)) * PIECE);
#pragma unroll
    for (int n = 0; n < RANKS / 8; n += 2) {
      uint32_t b[4];
      load_matrices(b, matrix + place<SHRINK_PIECES>(n * 8 + row_of_pair(lane), k + piece_of_pair(lane)) * PIECE);
      multiply_add<Format>(sum[n], a, b[0], b[1]);
      multiply_add<Format>(sum[n + 1], a, b[2], b[3]);
    }
  }
}

// Grid (token tiles, planes): planes (planes, T, r) of the sums over plane_size features each, a multiple of SHRINK_FEATURES
template <class Format, int RANKS>
__global__ void __launch_bounds__(SHRINK_THREADS, 3) shrink_kernel(Rows x, Rows matrix, int64_t plane_size, float* planes) {
  COBRA_DYNAMIC_SHARED(shared);
  constexpr int STAGE = (SHRINK_TOKENS + RANKS) * SHRINK_FEATURES;
  uint16_t* stages = reinterpret_cast<uint16_t*>(shared);
  const int64_t first = blockIdx.x * int64_t(SHRINK_TOKENS), start = blockIdx.y * plane_size;
  const int64_t features = min(x.columns - start, plane_size);
  const int tiles = int(ceil_div<int64_t>(features, SHRINK_FEATURES));
  const bool x_aligned = is_aligned(x), matrix_aligned = is_aligned(matrix);
  const auto fill = [&](int tile) {
    if (tile < tiles) {
      uint16_t* to = stages + tile % SHRINK_STAGES * STAGE;
      const int64_t column = start + tile * int64_t(SHRINK_FEATURES);
      stage<SHRINK_THREADS, SHRINK_TOKENS, SHRINK_PIECES>(to, x, first, column, x_aligned);
      stage<SHRINK_THREADS, RANKS, SHRINK_PIECES>(to + SHRINK_TOKENS * SHRINK_FEATURES, matrix, 0, column, matrix_aligned);
    }
    copy_commit();  // an empty group too: groups are counted
  };
  float sum[RANKS / 8][4] = {};
  for (int tile = 0; tile < SHRINK_STAGES - 1; ++tile) fill(tile);
  for (int tile = 0; tile < tiles; ++tile) {
    copy_wait<SHRINK_STAGES - 2>();
    __syncthreads();  // all copies of this tile are there, and the tile before it is used up
    fill(tile + SHRINK_STAGES - 1);
    const uint16_t* here = stages + tile % SHRINK_STAGES * STAGE;
    shrink_stage<Format, RANKS>(here, here + SHRINK_TOKENS * SHRINK_FEATURES, sum);
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* plane = planes + blockIdx.y * x.rows * matrix.rows;
#pragma unroll
  for (int n = 0; n < RANKS / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t token = first + warp * 16 + row_of_sum(lane, i), k = n * 8 + column_of_sum(lane, i);
      if (token < x.rows && k < matrix.rows) plane[token * matrix.rows + k] = sum[n][i];
    }
}

constexpr int REDUCE_THREADS = 256, REDUCE_TOKENS = 64, REDUCE_FEATURES = 256, REDUCE_STAGES = 2;
constexpr int REDUCE_PIECES = REDUCE_FEATURES / PIECE;
constexpr int REDUCE_WARPS = REDUCE_THREADS / 32, REDUCE_TILES = REDUCE_FEATURES / 16 / REDUCE_WARPS;  // of 16 features a warp

template <int RANKS>
constexpr size_t reduce_shared() {
  return (REDUCE_STAGES * REDUCE_TOKENS * (REDUCE_FEATURES + RANKS) + REDUCE_FEATURES * RANKS) * sizeof(uint16_t);
}

// a block of an A100 has 163 KB, and two blocks of an H100 share 228 KB; docs/kernels.md has these numbers
static_assert(shrink_shared<16>() == 40960 && shrink_shared<32>() == 49152 && shrink_shared<64>() == 65536, "as documented");
static_assert(reduce_shared<16>() == 77824 && reduce_shared<32>() == 90112 && reduce_shared<64>() == 114688, "as documented");

// g of 16 tokens and RANKS / 2 ranks of the warp: x matrix over the features in shared memory
template <class Format, int RANKS>
__device__ inline void multiply_rows(const uint16_t* x, const uint16_t* matrix, float (&sum)[RANKS / 16][4]) {
  const int lane = threadIdx.x % 32, tokens = threadIdx.x / 32 % 4 * 16, ranks = threadIdx.x / 128 * (RANKS / 16);
#pragma unroll 2
  for (int k = 0; k < REDUCE_FEATURES; k += 32) {
    uint32_t a[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int piece = k / PIECE + half * 2 + piece_of_16x2(lane);
      load_matrices(a[half], x + place<REDUCE_PIECES>(tokens + row_of_16x2(lane), piece) * PIECE);
    }
#pragma unroll
    for (int n = 0; n < RANKS / 16; ++n) {
      uint32_t b[4];
      load_matrices_transposed(b, matrix + place<RANKS / PIECE>(k + row_of_32x1(lane), ranks + n) * PIECE);
      multiply_add<Format>(sum[n], a[0], b[0], b[1]);
      multiply_add<Format>(sum[n], a[1], b[2], b[3]);
    }
  }
}

// sum (REDUCE_TILES of 16 features of the warp, RANKS) += xᵀ h over the tokens in shared memory
template <class Format, int RANKS>
__device__ inline void multiply_columns(const uint16_t* x, const uint16_t* h, float (&sum)[REDUCE_TILES][RANKS / 8][4]) {
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * REDUCE_TILES * 2;
#pragma unroll
  for (int t = 0; t < REDUCE_TOKENS; t += 32) {
    uint32_t a[REDUCE_TILES][2][4];
#pragma unroll
    for (int m = 0; m < REDUCE_TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = t + half * 16 + row_of_16x2_transposed(lane), piece = first + m * 2 + piece_of_16x2_transposed(lane);
        load_matrices_transposed(a[m][half], x + place<REDUCE_PIECES>(row, piece) * PIECE);
      }
#pragma unroll
    for (int n = 0; n < RANKS / 8; ++n) {
      uint32_t b[4];
      load_matrices_transposed(b, h + place<RANKS / PIECE>(t + row_of_32x1(lane), n) * PIECE);
#pragma unroll
      for (int m = 0; m < REDUCE_TILES; ++m) {
        multiply_add<Format>(sum[m][n], a[m][0], b[0], b[1]);
        multiply_add<Format>(sum[m][n], a[m][1], b[2], b[3]);
      }
    }
  }
}

// Grid (feature tiles, planes): planes (planes, D, r) of S over plane_size tokens each, a multiple of REDUCE_TOKENS; with a matrix
// also row_planes (feature tiles, T, r) of g
template <class Format, int RANKS>
__global__ void __launch_bounds__(REDUCE_THREADS)
    reduce_kernel(Rows x, Rows h, Rows matrix, int64_t plane_size, float* planes, float* row_planes) {
  COBRA_DYNAMIC_SHARED(shared);
  constexpr int X = REDUCE_TOKENS * REDUCE_FEATURES, STAGE = X + REDUCE_TOKENS * RANKS, PIECES = RANKS / PIECE;
  uint16_t* stages = reinterpret_cast<uint16_t*>(shared);
  uint16_t* columns = stages + REDUCE_STAGES * STAGE;
  const int64_t first = blockIdx.x * int64_t(REDUCE_FEATURES), start = blockIdx.y * plane_size, r = h.columns;
  const int tiles = int(ceil_div<int64_t>(min(x.rows - start, plane_size), REDUCE_TOKENS));
  const bool x_aligned = is_aligned(x), h_aligned = is_aligned(h);
  const auto fill = [&](int tile) {
    if (tile < tiles) {
      uint16_t* to = stages + tile % REDUCE_STAGES * STAGE;
      const int64_t row = start + tile * int64_t(REDUCE_TOKENS);
      stage<REDUCE_THREADS, REDUCE_TOKENS, REDUCE_PIECES>(to, x, row, first, x_aligned);
      stage<REDUCE_THREADS, REDUCE_TOKENS, PIECES>(to + X, h, row, 0, h_aligned);
    }
    copy_commit();  // an empty group too: groups are counted
  };
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sum[REDUCE_TILES][RANKS / 8][4] = {};
  if (row_planes) stage<REDUCE_THREADS, REDUCE_FEATURES, PIECES>(columns, matrix, first, 0, is_aligned(matrix));
  for (int tile = 0; tile < REDUCE_STAGES - 1; ++tile) fill(tile);
  for (int tile = 0; tile < tiles; ++tile) {
    copy_wait<REDUCE_STAGES - 2>();
    __syncthreads();  // all copies of this tile are there, and the tile before it is used up
    fill(tile + REDUCE_STAGES - 1);
    const uint16_t* here = stages + tile % REDUCE_STAGES * STAGE;
    multiply_columns<Format, RANKS>(here, here + X, sum);
    if (!row_planes) continue;
    float rows[RANKS / 16][4] = {};
    multiply_rows<Format, RANKS>(here, columns, rows);
    const int64_t row = start + tile * int64_t(REDUCE_TOKENS) + warp % 4 * 16;
#pragma unroll
    for (int n = 0; n < RANKS / 16; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t token = row + row_of_sum(lane, i), k = (warp / 4 * (RANKS / 16) + n) * 8 + column_of_sum(lane, i);
        if (token < x.rows && k < r) row_planes[(blockIdx.x * x.rows + token) * r + k] = rows[n][i];
      }
  }
#pragma unroll
  for (int m = 0; m < REDUCE_TILES; ++m)
#pragma unroll
    for (int n = 0; n < RANKS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t feature = first + (warp * REDUCE_TILES + m) * 16 + row_of_sum(lane, i), k = n * 8 + column_of_sum(lane, i);
        if (feature < x.columns && k < r) planes[(blockIdx.y * x.columns + feature) * r + k] = sum[m][n][i];
      }
}

constexpr int SUM_THREADS = 256;

// Grid (pieces of out,): out = round(Σ planes), planes (planes, size)
template <class Format>
__global__ void __launch_bounds__(SUM_THREADS)
    sum_planes_kernel(const float* planes, int64_t count, int64_t size, typename Format::Number* out) {
  const int64_t i = blockIdx.x * int64_t(SUM_THREADS) + threadIdx.x;
  if (i >= size) return;
  float sum = planes[i];
  for (int64_t plane = 1; plane < count; ++plane) sum += planes[plane * size + i];
  out[i] = Format::put(sum);
}

template <class Format, int RANKS>
int shrink(const Rows& x, const Rows& matrix, int64_t planes, int64_t plane_size, float* sums, void* stream) {
  const dim3 grid(unsigned(ceil_div<int64_t>(x.rows, SHRINK_TOKENS)), unsigned(planes));
  return launch(shrink_kernel<Format, RANKS>, grid, SHRINK_THREADS, shrink_shared<RANKS>(), stream, x, matrix, plane_size, sums);
}

template <class Format, int RANKS>
int reduce(const Rows& x, const Rows& h, const Rows& matrix, int64_t planes, int64_t plane_size, float* sums, float* row_sums,
           void* stream) {
  const dim3 grid(unsigned(ceil_div<int64_t>(x.columns, REDUCE_FEATURES)), unsigned(planes));
  return launch(reduce_kernel<Format, RANKS>, grid, REDUCE_THREADS, reduce_shared<RANKS>(), stream, x, h, matrix, plane_size, sums,
                row_sums);
}

template <class Format>
int shrink_format(const Rows& x, const Rows& matrix, int64_t planes, int64_t plane_size, float* sums, void* stream) {
  const auto run = matrix.rows <= 16 ? shrink<Format, 16> : matrix.rows <= 32 ? shrink<Format, 32> : shrink<Format, 64>;
  return run(x, matrix, planes, plane_size, sums, stream);
}

template <class Format>
int reduce_format(const Rows& x, const Rows& h, const Rows& matrix, int64_t planes, int64_t plane_size, float* sums, float* row_sums,
                  void* stream) {
  const auto run = h.columns <= 16 ? reduce<Format, 16> : h.columns <= 32 ? reduce<Format, 32> : reduce<Format, 64>;
  return run(x, h, matrix, planes, plane_size, sums, row_sums, stream);
}

template <class Format>
int sum_format(const float* planes, int64_t count, int64_t size, void* out, void* stream) {
  const dim3 grid(unsigned(ceil_div<int64_t>(size, SUM_THREADS)));
  return launch(sum_planes_kernel<Format>, grid, SUM_THREADS, 0, stream, planes, count, size,
                static_cast<typename Format::Number*>(out));
}

}  // namespace cobra

// dtype: 1 bf16, 2 fp16. Strides count elements. All on the current device; sizes are greater than 0, and rank is at most 64.

// planes: (count, tokens, rank) to write to, each over plane_size features, a multiple of 64
COBRA_EXPORT int cobra_cuda_shrink(int64_t dtype, const uint16_t* x, int64_t x_stride, const uint16_t* matrix, int64_t matrix_stride,
                                   int64_t tokens, int64_t features, int64_t rank, int64_t count, int64_t plane_size, float* planes,
                                   void* stream) {
  using namespace cobra;
  const auto run = dtype == 1 ? shrink_format<BFloat16> : shrink_format<Float16>;
  return run({x, x_stride, tokens, features}, {matrix, matrix_stride, rank, features}, count, plane_size, planes, stream);
}

// planes: (count, features, rank) to write to, each over plane_size tokens, a multiple of 64. matrix and row_planes
// (feature tiles of 256, tokens, rank): both, or null
COBRA_EXPORT int cobra_cuda_reduce(int64_t dtype, const uint16_t* x, int64_t x_stride, const uint16_t* h, int64_t h_stride,
                                   const uint16_t* matrix, int64_t matrix_stride, int64_t tokens, int64_t features, int64_t rank,
                                   int64_t count, int64_t plane_size, float* planes, float* row_planes, void* stream) {
  using namespace cobra;
  const auto run = dtype == 1 ? reduce_format<BFloat16> : reduce_format<Float16>;
  return run({x, x_stride, tokens, features}, {h, h_stride, tokens, rank}, {matrix, matrix_stride, features, rank}, count, plane_size,
             planes, row_planes, stream);
}

// out (size,) in dtype, 0 for fp32: the sum of planes (count, size) in their order
COBRA_EXPORT int cobra_cuda_sum_planes(int64_t dtype, const float* planes, int64_t count, int64_t size, void* out, void* stream) {
  using namespace cobra;
  const auto run = dtype == 0 ? sum_format<Float32> : dtype == 1 ? sum_format<BFloat16> : sum_format<Float16>;
  return run(planes, count, size, out, stream);
}
