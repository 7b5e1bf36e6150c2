// Path attribution of one layer, per example: Σ_i scale_i ⟨grad_i, Σ_k weight_ik h_k⟩. Memory belongs to the caller.
//
//   h (points, examples, features)   grad (points, examples, features)   out (examples,)
//
// Each number is read from memory once: a few hundred features of all points stay in the first cache. Differences come before
// products. Strips of features are summed in fp32 and added in fp64, in one order whatever the number of threads.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <vector>

#include "export.h"
#include "isa.h"
#include "parallel.h"

namespace cobra {
namespace {

struct Term {
  int64_t point;
  float weight;
};

struct Row {
  int64_t point, first_term, terms;
  float scale;
};

struct Conductance {
  const void *h, *grad;
  const Row* row;
  const Term* terms;
  int64_t rows, examples, features, h_point, h_example, grad_point, grad_example;
};

constexpr int64_t BLOCK = 512, STRIP = 8192;  // features

#define COBRA_ISA portable
#define COBRA_TARGET
#if defined(__GNUC__)
#define COBRA_LANES 4
#else
#define COBRA_LANES 1
#endif
#define COBRA_VECTORS 4
#include "conductance_tile.h"

#if defined(__GNUC__) && defined(__x86_64__)
#define COBRA_ISA avx2
#define COBRA_TARGET COBRA_AVX2
#define COBRA_LANES 8
#define COBRA_VECTORS 4
#include "conductance_tile.h"

#define COBRA_ISA avx512
#define COBRA_TARGET COBRA_AVX512
#define COBRA_LANES 16
#define COBRA_VECTORS 4
#include "conductance_tile.h"
#endif

using Strip = double (*)(const Conductance&, int64_t, int64_t, int64_t);

#define COBRA_STRIPS(isa) {isa::strip_sum<isa::Float32>, isa::strip_sum<isa::BFloat16>, isa::strip_sum<isa::Float16>}

Strip strip_of(int64_t format, int64_t level) {
#if defined(__GNUC__) && defined(__x86_64__)
  static constexpr Strip strips[3][3] = {COBRA_STRIPS(portable), COBRA_STRIPS(avx2), COBRA_STRIPS(avx512)};
#else
  static constexpr Strip strips[1][3] = {COBRA_STRIPS(portable)};
#endif
  return strips[level][format];
}

std::vector<Row> rows_of(const double* q, int64_t rows, int64_t columns, std::vector<Term>& terms) {
  std::vector<Row> found;
  for (int64_t i = 0; i < rows; ++i) {
    const double* row = q + i * columns;
    double largest = 0;
    for (int64_t j = 0; j < columns; ++j) largest = std::max(largest, row[j] < 0 ? -row[j] : row[j]);
    if (largest == 0) continue;
    const int64_t first = int64_t(terms.size());
    for (int64_t j = 0; j < columns; ++j)
      if (row[j] != 0) terms.push_back({j, float(row[j] / largest)});
    found.push_back({i, first, int64_t(terms.size()) - first, float(largest)});
  }
  return found;
}

}  // namespace
}  // namespace cobra

// q (rows, columns), contiguous; format 0 float32, 1 bfloat16, 2 float16. Returns 0, or 1 where there was no memory to work in.
COBRA_EXPORT int32_t cobra_conductance(const void* h, const void* grad, const double* q, float* out, int64_t rows,
                                       int64_t columns, int64_t examples, int64_t features, int64_t h_point, int64_t h_example,
                                       int64_t grad_point, int64_t grad_example, int64_t format, int64_t threads, int64_t level) {
  using namespace cobra;
  try {
    std::vector<Term> terms;
    const std::vector<Row> row = rows_of(q, rows, columns, terms);
    const Conductance work{h,        grad,     row.data(), terms.data(), int64_t(row.size()), examples,
                           features, h_point, h_example,  grad_point,   grad_example};
    const Strip strip = strip_of(format, supported_level(level));
    const int64_t strips = (features + STRIP - 1) / STRIP;
    std::vector<double> sums(size_t(examples * strips));
    parallel_for(examples * strips, threads, [&](int64_t task, int64_t) {
      const int64_t first = task % strips * STRIP;
      sums[size_t(task)] = strip(work, task / strips, first, std::min(first + STRIP, features));
    });
    for (int64_t b = 0; b < examples; ++b) {
      double sum = 0;
      for (int64_t s = 0; s < strips; ++s) sum += sums[size_t(b * strips + s)];
      out[b] = float(sum);
    }
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}
