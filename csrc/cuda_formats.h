// Formats of weights and activations on a device, one number at a time, with the rounding of merge_math.h.
#pragma once

#include <cstring>

#include "cuda_launch.h"

namespace cobra {

#define COBRA_INLINE __device__ inline
#define COBRA_CONVERT(To, from) static_cast<To>(from)
typedef float Floats;
typedef uint32_t Words;
typedef int32_t Integers;
#include "merge_math.h"

struct Float32 {
  using Number = float;
  COBRA_INLINE static Floats get(Number number) { return number; }
  COBRA_INLINE static Number put(Floats value) { return value; }
  COBRA_INLINE static Floats lost(Floats before, Floats delta, Floats after) { return lost_by_float32(before, delta, after); }
};

struct Half {
  using Number = uint16_t;
  COBRA_INLINE static Floats lost(Floats before, Floats delta, Floats after) { return lost_by_half(before, delta, after); }
};

struct BFloat16 : Half {
  COBRA_INLINE static Floats get(Number number) { return expand_bfloat16(number); }
  COBRA_INLINE static Number put(Floats value) { return Number(round_bfloat16(value)); }
};

struct Float16 : Half {
  COBRA_INLINE static Floats get(Number number) { return expand_float16(number); }
  COBRA_INLINE static Number put(Floats value) { return Number(round_float16(value)); }
};

}  // namespace cobra
