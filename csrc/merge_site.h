// What is merged, for CPU and GPU.
#pragma once

#include <cstdint>

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

}  // namespace cobra
