// A strip of one example's features. conductance.cpp includes this once for each instruction set, with
//   COBRA_ISA      its namespace
//   COBRA_TARGET   the attribute that lets a function use it
//   COBRA_LANES    floats in a register
//   COBRA_VECTORS  sums that run beside each other

#define COBRA_INLINE static inline COBRA_ALWAYS COBRA_TARGET
#define COBRA_OUTLINE static COBRA_NEVER COBRA_TARGET

namespace COBRA_ISA {

constexpr int LANES = COBRA_LANES, VECTORS = COBRA_VECTORS, GROUP = VECTORS * LANES;
#include "lanes.h"

// 0 beyond the last of `features` numbers
template <class Format>
COBRA_INLINE Floats get_some(const typename Format::Number* from, int64_t features) {
  if (features >= LANES) return Format::get(from);
  typename Format::Number some[LANES] = {};
  if (features > 0) std::memcpy(some, from, size_t(features) * sizeof *from);
  return Format::get(some);
}

COBRA_INLINE float total(Floats sum) {
  float parts[LANES], all = 0;
  store(parts, sum);
  for (int i = 0; i < LANES; ++i) all += parts[i];
  return all;
}

// Σ over features of (Σ_k weight_k h_k) grad; WHOLE where features is a multiple of GROUP
template <class Format, bool WHOLE>
COBRA_INLINE float row_sum(const typename Format::Number* h, int64_t h_point, const Term* terms, int64_t count,
                           const typename Format::Number* grad, int64_t features) {
  Floats sum[VECTORS];
  COBRA_UNROLL
  for (int v = 0; v < VECTORS; ++v) sum[v] = Floats{};
  for (int64_t f = 0; f < features; f += GROUP) {
    Floats delta[VECTORS];
    COBRA_UNROLL
    for (int v = 0; v < VECTORS; ++v) delta[v] = Floats{};
    for (int64_t k = 0; k < count; ++k) {
      const typename Format::Number* from = h + terms[k].point * h_point + f;
      COBRA_UNROLL
      for (int v = 0; v < VECTORS; ++v)
        delta[v] += terms[k].weight *
                    (WHOLE ? Format::get(from + v * LANES) : get_some<Format>(from + v * LANES, features - f - v * LANES));
    }
    COBRA_UNROLL
    for (int v = 0; v < VECTORS; ++v)
      sum[v] += delta[v] * (WHOLE ? Format::get(grad + f + v * LANES)
                                  : get_some<Format>(grad + f + v * LANES, features - f - v * LANES));
  }
  COBRA_UNROLL
  for (int v = 1; v < VECTORS; ++v) sum[0] += sum[v];
  return total(sum[0]);
}

template <class Format>
COBRA_OUTLINE double strip_sum(const Conductance& work, int64_t example, int64_t first, int64_t last) {
  using Number = typename Format::Number;
  const Number* h = static_cast<const Number*>(work.h) + example * work.h_example;
  const Number* grad = static_cast<const Number*>(work.grad) + example * work.grad_example;
  double sum = 0;
  for (int64_t f = first; f < last; f += BLOCK) {
    const int64_t features = std::min(BLOCK, last - f), whole = features / GROUP * GROUP;
    for (int64_t i = 0; i < work.rows; ++i) {
      const Row& row = work.row[i];
      const Term* terms = work.terms + row.first_term;
      const Number *h_f = h + f, *grad_f = grad + row.point * work.grad_point + f;
      float part = row_sum<Format, true>(h_f, work.h_point, terms, row.terms, grad_f, whole);
      if (whole < features)
        part += row_sum<Format, false>(h_f + whole, work.h_point, terms, row.terms, grad_f + whole, features - whole);
      sum += double(row.scale) * double(part);
    }
  }
  return sum;
}

}  // namespace COBRA_ISA

#undef COBRA_INLINE
#undef COBRA_OUTLINE
#undef COBRA_CONVERT
#undef COBRA_ISA
#undef COBRA_TARGET
#undef COBRA_LANES
#undef COBRA_VECTORS
