// What is merged, for CPU and GPU.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define COBRA_HOST_DEVICE __host__ __device__
#else
#define COBRA_HOST_DEVICE
#endif

namespace cobra {

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

constexpr int64_t RANK_BLOCK = 256;  // ranks that are summed in a row
constexpr int64_t SUMS = 3;          // of squares: L R, W, (W' - W) - L R

// The site that a tile is of. first_tile: (count + 1,), rising; sites without a tile are never found.
COBRA_HOST_DEVICE inline int64_t find_site(const int64_t* first_tile, int64_t count, int64_t tile) {
  int64_t first = 0, last = count - 1;
  while (first < last) {
    const int64_t middle = (first + last) / 2;
    if (first_tile[middle + 1] <= tile) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  return first;
}

}  // namespace cobra
