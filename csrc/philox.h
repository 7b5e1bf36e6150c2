// Philox4x32-10 for host and device code: the same words as cobra_kernels/philox.py.
// Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define COBRA_HOST_DEVICE __host__ __device__
#else
#define COBRA_HOST_DEVICE
#endif

namespace cobra {

struct Words4 {
  uint32_t w[4];
};

COBRA_HOST_DEVICE inline Words4 philox4x32_10(Words4 c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c.w[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c.w[2];
    c = {{uint32_t(p1 >> 32) ^ c.w[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.w[3] ^ k1, uint32_t(p0)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// The four words of gates 4*block .. 4*block+3 of a site at a step.
COBRA_HOST_DEVICE inline Words4 gate_block(uint64_t seed, uint64_t step, uint32_t site, uint32_t block) {
  return philox4x32_10({{block, site, uint32_t(step), uint32_t(step >> 32)}}, uint32_t(seed), uint32_t(seed >> 32));
}

}  // namespace cobra
