// Rounding of a merge, for CPU and GPU: Floats, Words and Integers are a register of numbers in lanes.h, and one number in merge.cu.
// Included inside a namespace that has those types, COBRA_CONVERT, and COBRA_INLINE for its functions.

template <class Vector>
COBRA_INLINE Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

COBRA_INLINE Words words(Floats floats) { return load<Words>(&floats); }
COBRA_INLINE Floats floats(Words words) { return load<Floats>(&words); }

// Halves stand in the low 16 bits of a word. Expanding is exact; rounding is to nearest, ties to even.

COBRA_INLINE Floats expand_bfloat16(Words half) { return floats(half << 16); }
COBRA_INLINE Words round_bfloat16(Floats value) {
  const Words bits = words(value), quiet = bits | 0x400000u;
  const Words rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  return (value == value ? rounded : quiet) >> 16;
}

COBRA_INLINE Floats expand_float16(Words half) {
  const Words magnitude = half & 0x7FFFu, sign = (half & 0x8000u) << 16;
  const Words subnormal = words(COBRA_CONVERT(Floats, load<Integers>(&magnitude)) * 0x1p-24f);
  const Words normal = (magnitude << 13) + (112u << 23), special = (magnitude << 13) + (224u << 23);
  const Words finite = magnitude < 0x400u ? subnormal : normal;
  return floats(sign | (magnitude < 0x7C00u ? finite : special));
}
COBRA_INLINE Words round_float16(Floats value) {
  const Words bits = words(value), magnitude = bits & 0x7FFFFFFFu, sign = (bits >> 16) & 0x8000u;
  // the last bit of 1/2 is the smallest half: adding it rounds a smaller number to a multiple of that
  const Words subnormal = words(floats(magnitude) + 0.5f) - 0x3F000000u;
  const Words normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const Words finite = magnitude < 0x38800000u ? subnormal : normal;
  const Words infinity = magnitude * 0u + 0x7C00u;
  const Words special = magnitude > 0x7F800000u ? infinity | 0x200u : infinity;
  return sign | (magnitude < 0x47800000u ? finite : special);
}

// (after - before) - delta, without a rounding error that would matter

// Knuth's two-sum: exact
COBRA_INLINE Floats lost_by_float32(Floats before, Floats delta, Floats after) {
  const Floats added = after - before;
  return (after - added - before) + (added - delta);
}

// after - before is exact where they are near each other, and far from what is lost where they are not
COBRA_INLINE Floats lost_by_half(Floats before, Floats delta, Floats after) { return (after - before) - delta; }
