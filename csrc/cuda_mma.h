// Tensor cores and what feeds them: instructions of sm_80, and where fragments lie in shared memory.
//
// A fragment is read by ldmatrix: eight rows of eight halves, a piece of 16 bytes each. Lane l gets two adjacent halves, of row l / 4
// and columns 2 (l % 4) and after, or transposed of column l / 4 and rows 2 (l % 4) and after.
#pragma once

#include "cuda_launch.h"

namespace cobra {

constexpr int PIECE = 8;  // halves in 16 bytes

// Where a piece of a row lies, in pieces. PIECES in a row, a power of two; eight rows at the same piece are in different banks.
template <int PIECES>
COBRA_HOST_DEVICE constexpr int place(int row, int piece) {
  constexpr int ROWS = PIECES < 8 ? 8 / PIECES : 1, SPREAD = PIECES < 8 ? PIECES : 8;
  return row * PIECES + (piece ^ (row / ROWS % SPREAD));
}

// Addresses that a lane gives ldmatrix.x4, as row and piece from the corner of a block; its matrices are numbered 0 to 3.

// 16 rows and 2 pieces: an operand A whose rows are stored, in the order of mma's registers
COBRA_HOST_DEVICE constexpr int row_of_16x2(int lane) { return lane % 16; }
COBRA_HOST_DEVICE constexpr int piece_of_16x2(int lane) { return lane / 16; }

// the same, stored with its columns as rows: for the transposed read
COBRA_HOST_DEVICE constexpr int row_of_16x2_transposed(int lane) { return lane % 8 + lane / 16 * 8; }
COBRA_HOST_DEVICE constexpr int piece_of_16x2_transposed(int lane) { return lane / 8 % 2; }

// 16 rows and 2 pieces: two operands B, the second eight rows on, whose columns are stored as rows
COBRA_HOST_DEVICE constexpr int row_of_pair(int lane) { return lane % 8 + lane / 16 * 8; }
COBRA_HOST_DEVICE constexpr int piece_of_pair(int lane) { return lane / 8 % 2; }

// 32 rows and 1 piece: two operands B, the second 16 rows on, for the transposed read
COBRA_HOST_DEVICE constexpr int row_of_32x1(int lane) { return lane; }

// What a lane has of an accumulator of 16 rows and 8 columns
COBRA_HOST_DEVICE constexpr int row_of_sum(int lane, int i) { return lane / 4 + i / 2 * 8; }
COBRA_HOST_DEVICE constexpr int column_of_sum(int lane, int i) { return lane % 4 * 2 + i % 2; }

#if defined(__CUDACC__)

__device__ inline uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// 16 bytes to shared memory, of which `bytes` are read and the rest is 0
__device__ inline void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}

__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// until at most GROUPS of this thread's groups are under way
template <int GROUPS>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// sum (16, 8) += a (16, 16) b (16, 8)
template <class Format>
__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void multiply_add<struct BFloat16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void multiply_add<struct Float16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

}  // namespace cobra
