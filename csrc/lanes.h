// LANES numbers at once. merge_tile.h includes this once for each instruction set, inside the namespace of that set.
// GCC and clang have vector types for it; elsewhere a lane is a plain number and vectorising is left to the compiler.

#if defined(__GNUC__)
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
#define COBRA_CONVERT(To, from) __builtin_convertvector(from, To)
#else
typedef float Floats;
typedef uint32_t Words;
typedef int32_t Integers;
typedef uint16_t Halves;
#define COBRA_CONVERT(To, from) static_cast<To>(from)
#endif

#include "merge_math.h"

template <class Vector>
COBRA_INLINE void store(void* to, Vector vector) {
  std::memcpy(to, &vector, sizeof vector);
}

// Conversions: one instruction each where the compiler would not find it.

#if COBRA_LANES == 16
COBRA_INLINE Words load_halves(const uint16_t* from) { return (Words)_mm512_cvtepu16_epi32(load<__m256i>(from)); }
COBRA_INLINE void store_halves(uint16_t* to, Words half) { store(to, _mm512_cvtepi32_epi16((__m512i)half)); }
COBRA_INLINE Floats widen_float16(Words half) { return (Floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)half)); }
COBRA_INLINE Words narrow_float16(Floats value) { return (Words)_mm512_cvtepu16_epi32(_mm512_cvtps_ph((__m512)value, 0)); }
#elif COBRA_LANES == 8
COBRA_INLINE Words load_halves(const uint16_t* from) { return (Words)_mm256_cvtepu16_epi32(load<__m128i>(from)); }
COBRA_INLINE __m128i low_halves(Words half) {
  const __m256i packed = _mm256_packus_epi32((__m256i)half, (__m256i)half);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x8));
}
COBRA_INLINE void store_halves(uint16_t* to, Words half) { store(to, low_halves(half)); }
COBRA_INLINE Floats widen_float16(Words half) { return (Floats)_mm256_cvtph_ps(low_halves(half)); }
COBRA_INLINE Words narrow_float16(Floats value) { return (Words)_mm256_cvtepu16_epi32(_mm256_cvtps_ph((__m256)value, 0)); }
#else
COBRA_INLINE Words load_halves(const uint16_t* from) { return COBRA_CONVERT(Words, load<Halves>(from)); }
COBRA_INLINE void store_halves(uint16_t* to, Words half) { store(to, COBRA_CONVERT(Halves, half)); }
COBRA_INLINE Floats widen_float16(Words half) { return expand_float16(half); }
COBRA_INLINE Words narrow_float16(Floats value) { return round_float16(value); }
#endif

// sum + x x, explicitly in one instruction: left to the compiler, bits would depend on the code around it
#if COBRA_LANES == 16
COBRA_INLINE Floats add_square(Floats sum, Floats x) { return (Floats)_mm512_fmadd_ps((__m512)x, (__m512)x, (__m512)sum); }
#elif COBRA_LANES == 8
COBRA_INLINE Floats add_square(Floats sum, Floats x) { return (Floats)_mm256_fmadd_ps((__m256)x, (__m256)x, (__m256)sum); }
#else
COBRA_INLINE Floats add_square(Floats sum, Floats x) { return sum + x * x; }
#endif

// Stores past the caches: what is written is not read again here, and its lines need not be read first. Aligned to the register.

#if COBRA_LANES == 16
COBRA_INLINE void stream(float* to, Floats value) { _mm512_stream_ps(to, (__m512)value); }
COBRA_INLINE void stream_halves(uint16_t* to, Words half) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)half));
}
#elif COBRA_LANES == 8
COBRA_INLINE void stream(float* to, Floats value) { _mm256_stream_ps(to, (__m256)value); }
COBRA_INLINE void stream_halves(uint16_t* to, Words half) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), low_halves(half));
}
#else
COBRA_INLINE void stream(float* to, Floats value) { store(to, value); }
COBRA_INLINE void stream_halves(uint16_t* to, Words half) { store_halves(to, half); }
#endif

// Formats of weights: widened exactly, rounded once to nearest, ties to even. Overflow gives Inf, NaN stays NaN.
// `put` returns the numbers that were stored; `lost` is (after - before) - delta, without a rounding error that would matter.

struct Float32 {
  using Number = float;
  COBRA_INLINE Floats get(const float* from) { return load<Floats>(from); }
  template <bool STREAMS>
  COBRA_INLINE Floats put(float* to, Floats value) {
    STREAMS ? stream(to, value) : store(to, value);
    return value;
  }
  COBRA_INLINE Floats lost(Floats before, Floats delta, Floats after) { return lost_by_float32(before, delta, after); }
};

struct Half {
  using Number = uint16_t;
  COBRA_INLINE Floats lost(Floats before, Floats delta, Floats after) { return lost_by_half(before, delta, after); }
};

struct BFloat16 : Half {
  COBRA_INLINE Floats get(const uint16_t* from) { return expand_bfloat16(load_halves(from)); }
  template <bool STREAMS>
  COBRA_INLINE Floats put(uint16_t* to, Floats value) {
    const Words half = round_bfloat16(value);
    STREAMS ? stream_halves(to, half) : store_halves(to, half);
    return expand_bfloat16(half);
  }
};

struct Float16 : Half {
  COBRA_INLINE Floats get(const uint16_t* from) { return widen_float16(load_halves(from)); }
  template <bool STREAMS>
  COBRA_INLINE Floats put(uint16_t* to, Floats value) {
    const Words half = narrow_float16(value);
    STREAMS ? stream_halves(to, half) : store_halves(to, half);
    return widen_float16(half);
  }
};
