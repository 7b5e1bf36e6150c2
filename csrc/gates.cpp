// Random words of all gates of a model at one step. Memory belongs to the caller.
#include "philox.h"

#if defined(_WIN32)
#define COBRA_EXPORT extern "C" __declspec(dllexport)
#else
#define COBRA_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// out: (sites, ranks) int64, row-major; each word in [0, 2^32)
COBRA_EXPORT void cobra_gate_words(int64_t* out, int64_t sites, int64_t ranks, uint64_t seed, uint64_t step,
                                   int64_t first_site) {
  for (int64_t site = 0; site < sites; ++site) {
    for (int64_t k = 0; k < ranks; k += 4) {
      const cobra::Words4 words = cobra::gate_block(seed, step, uint32_t(first_site + site), uint32_t(k / 4));
      for (int64_t lane = 0; lane < 4 && k + lane < ranks; ++lane) out[site * ranks + k + lane] = words.w[lane];
    }
  }
}
