"""The stand-in for a device: kernels that wait for one another give what a GPU gives, and those that forget to do not."""

import ctypes

import numpy as np
import pytest
from cuda_host import compile_for_host

KERNELS = """
#include "cuda_formats.h"
#include "cuda_launch.h"
#include "cuda_mma.h"
#include "export.h"

namespace cobra {

template <bool WAITS>
__global__ void reverse_kernel(const int* in, int* out) {
  __shared__ int shared[64];
  shared[threadIdx.x] = in[threadIdx.x];
  if (WAITS) __syncthreads();
  out[threadIdx.x] = shared[63 - threadIdx.x];
}

template <bool WAITS>
__global__ void copy_kernel(const int* in, int* out) {
  COBRA_DYNAMIC_SHARED(bytes);
  int* shared = reinterpret_cast<int*>(bytes);
  if (threadIdx.x < 16) copy_async(shared + 4 * threadIdx.x, in + 4 * threadIdx.x, threadIdx.x < 15 ? 16 : 4);
  copy_commit();
  if (WAITS) copy_wait<0>();
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

// c (16, 8) = a (16, 16) b (16, 8), both with their rows stored
__global__ void multiply_kernel(const uint16_t* a, const uint16_t* b, float* c) {
  uint32_t left[4], right[4];
  const int lane = threadIdx.x;
  load_matrices(left, a + row_of_16x2(lane) * 16 + piece_of_16x2(lane) * PIECE);
  load_matrices_transposed(right, b + row_of_32x1(lane) % 16 * 8);
  float sum[4] = {};
  multiply_add<Float16>(sum, left, right[0], right[1]);
  for (int i = 0; i < 4; ++i) c[row_of_sum(lane, i) * 8 + column_of_sum(lane, i)] = sum[i];
}

}  // namespace cobra

using namespace cobra;
COBRA_EXPORT void reverse(int waits, const int* in, int* out) {
  launch(waits ? reverse_kernel<true> : reverse_kernel<false>, dim3(1), 64, 0, nullptr, in, out);
}
COBRA_EXPORT void copy(int waits, const int* in, int* out) {
  launch(waits ? copy_kernel<true> : copy_kernel<false>, dim3(1), 64, 256, nullptr, in, out);
}
COBRA_EXPORT void multiply(const uint16_t* a, const uint16_t* b, float* c) {
  launch(multiply_kernel, dim3(1), 32, 0, nullptr, a, b, c);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    (folder / "kernels.cu").write_text(KERNELS)
    return compile_for_host(folder / "kernels.cu", folder)


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def test_a_forgotten_barrier_is_seen(library):
    numbers, out = np.arange(1, 65, dtype=np.int32), np.zeros(64, dtype=np.int32)
    library.reverse(0, pointer(numbers), pointer(out))
    assert not np.array_equal(out, numbers[::-1])
    library.reverse(1, pointer(numbers), pointer(out))
    assert np.array_equal(out, numbers[::-1])


def test_a_copy_that_nobody_waits_for_is_not_there(library):
    """Shared memory is NaN until then; what a copy does not read is 0."""
    numbers, out = np.arange(1, 65, dtype=np.int32), np.zeros(64, dtype=np.int32)
    library.copy(0, pointer(numbers), pointer(out))
    assert np.isnan(out.view(np.float32)).all()
    library.copy(1, pointer(numbers), pointer(out))
    assert np.array_equal(out, np.where(numbers > 61, 0, numbers))


def test_fragments_multiply(library):
    """ldmatrix, transposed and not, and mma, in the layout of their operands and of the sum."""
    generator = np.random.default_rng(0)
    a, b = (generator.integers(-8, 9, shape).astype(np.float16) for shape in ((16, 16), (16, 8)))
    c = np.zeros((16, 8), dtype=np.float32)
    library.multiply(pointer(a), pointer(b), pointer(c))
    assert np.array_equal(c, a.astype(np.float32) @ b.astype(np.float32))
