// What CUDA's launchers share. Where the compiler is no nvcc, tests/cuda_host.h stands in for the device.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#define COBRA_HOST_DEVICE __host__ __device__
#define COBRA_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace cobra {

// Queues one launch on the stream, and says whether it was accepted.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, void* stream, Arguments... arguments) {
  if (shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace cobra
#else
#define COBRA_HOST_DEVICE
#endif

namespace cobra {

template <class Integer>
COBRA_HOST_DEVICE constexpr Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

}  // namespace cobra
