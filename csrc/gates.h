// Gates of one element, for host and device code: noise, concrete and hard-concrete sample, KL, and their derivatives.
//
// Every step is one IEEE operation in fp64, rounded to nearest and never contracted to a fused multiply-add, in the order that
// cobra_kernels/gates_triton.py has too: the same bits from all compilers and on all devices.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "philox.h"

#if defined(__clang__) && !defined(__CUDACC__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC optimize("fp-contract=off", "no-trapping-math")
#endif

#if defined(__CUDACC__)
#define COBRA_UNROLLED _Pragma("unroll")
#elif defined(__GNUC__)
#define COBRA_UNROLLED _Pragma("GCC unroll 32")
#else
#define COBRA_UNROLLED
#endif

namespace cobra {

COBRA_HOST_DEVICE inline double add(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

COBRA_HOST_DEVICE inline double mul(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

template <class To, class From>
COBRA_HOST_DEVICE inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits of one size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// 2 atanh(x) for |x| <= 1/3, by its series: the 17 terms reach 2^-53.
COBRA_HOST_DEVICE inline double twice_atanh(double x) {
  const double square = mul(x, x);
  double sum = 1.0 / 33;
  COBRA_UNROLLED
  for (int k = 31; k > 0; k -= 2) sum = add(mul(sum, square), 1.0 / k);
  return mul(add(x, x), sum);
}

// exp(x) for x <= 0; below -700 that of -700.
COBRA_HOST_DEVICE inline double exp_of_negative(double x) {
  x = x < -700.0 ? -700.0 : x;
  const double shifted = add(mul(x, 0x1.71547652b82fep+0), 0x1.8p+52);  // its last bits are the integer nearest to x / log 2
  const double n = add(shifted, -0x1.8p+52);
  const double r = add(add(x, mul(n, -0x1.62e42feep-1)), mul(n, -0x1.a39ef35793c76p-33));
  double sum = 1.0;
  COBRA_UNROLLED
  for (int k = 13; k > 0; --k) sum = add(mul(sum, mul(r, 1.0 / k)), 1.0);
  return mul(sum, bits_as<double>((bits_as<uint64_t>(shifted) + 1023) << 52));
}

COBRA_HOST_DEVICE inline double magnitude(double x) { return fabs(x); }

// e = exp(-|x|), which sigmoid, its slope and softplus share
COBRA_HOST_DEVICE inline double sigmoid(double x, double e) { return (x < 0.0 ? e : 1.0) / add(1.0, e); }
COBRA_HOST_DEVICE inline double slope(double e) { return e / mul(add(1.0, e), add(1.0, e)); }
COBRA_HOST_DEVICE inline double log1p_of(double e) { return twice_atanh(e / add(2.0, e)); }
COBRA_HOST_DEVICE inline double softplus(double x, double e) { return add(x < 0.0 ? 0.0 : x, log1p_of(e)); }

// log(u / (1 - u)) of u = (n + 1/2) / 2^24, n the top 24 bits of a random word: the nearest fp32 number for each of all n.
COBRA_HOST_DEVICE inline float logistic_noise(uint32_t word) {
  const double p = double(int32_t(2 * (word >> 8) + 1)), q = add(0x1p+25, -p);
  // p / q = 2^n times a ratio between sqrt(1/2) and sqrt(2)
  const uint64_t biased = (bits_as<uint64_t>(p / q) + 0x00095F619980C433) >> 52;
  const double scaled = mul(q, bits_as<double>(biased << 52));
  const double n = add(bits_as<double>(biased | uint64_t{0x433} << 52), -(0x1p+52 + 1023));
  const double rest = twice_atanh(add(p, -scaled) / add(p, scaled));
  return float(add(mul(n, 0x1.62e42feep-1), add(mul(n, 0x1.a39ef35793c76p-33), rest)));
}

// What the arithmetic of all gates of a call depends on, as flags.
enum GateFlags : int32_t { FP64 = 1, SAMPLED = 2 };

// What all gates of a call share.
struct GateKind {
  double temperature;
  double low, width;  // z is low + width times the sample, cut to [0, 1]; with 0 and 1 the sample, bit for bit
  double log_ratio;   // log(-low / high), the score above which a hard gate is open; 0 for gates that are not hard
  bool sampled;       // the KL is that of two concrete densities at the draw, else of two Bernoullis
};

COBRA_HOST_DEVICE inline double score_of(double logit, double noise, double temperature) {
  return add(logit, noise) / temperature;
}

COBRA_HOST_DEVICE inline double sample_gate(double logit, double noise, const GateKind& kind) {
  const double score = score_of(logit, noise, kind.temperature);
  const double stretched = add(kind.low, mul(kind.width, sigmoid(score, exp_of_negative(-magnitude(score)))));
  return stretched < 0.0 ? 0.0 : stretched > 1.0 ? 1.0 : stretched;
}

COBRA_HOST_DEVICE inline double sample_slope(double logit, double noise, const GateKind& kind) {
  const double score = score_of(logit, noise, kind.temperature);
  const double e = exp_of_negative(-magnitude(score));
  const double change = mul(slope(e) / kind.temperature, kind.width);
  const double stretched = add(kind.low, mul(kind.width, sigmoid(score, e)));
  return stretched < 0.0 || stretched > 1.0 ? 0.0 : change;
}

COBRA_HOST_DEVICE inline double open_probability(double logit, const GateKind& kind) {
  const double x = add(logit, -mul(kind.temperature, kind.log_ratio));
  return sigmoid(x, exp_of_negative(-magnitude(x)));
}

COBRA_HOST_DEVICE inline double open_slope(double logit, const GateKind& kind) {
  return slope(exp_of_negative(-magnitude(add(logit, -mul(kind.temperature, kind.log_ratio)))));
}

// alpha (a - p) - softplus(a) + softplus(p): 0 where a = p
COBRA_HOST_DEVICE inline double bernoulli_kl(double logit, double prior) {
  const double e = exp_of_negative(-magnitude(logit)), e_prior = exp_of_negative(-magnitude(prior));
  const double moved = mul(sigmoid(logit, e), add(logit, -prior));
  return add(add(moved, -softplus(logit, e)), softplus(prior, e_prior));
}

COBRA_HOST_DEVICE inline double bernoulli_kl_slope(double logit, double prior) {
  return mul(slope(exp_of_negative(-magnitude(logit))), add(logit, -prior));
}

// -log of the logistic density: |v| + 2 log(1 + exp(-|v|))
COBRA_HOST_DEVICE inline double surprise(double v) {
  const double size = magnitude(v), tail = log1p_of(exp_of_negative(-size));
  return add(size, add(tail, tail));
}

COBRA_HOST_DEVICE inline double sampled_kl(double logit, double prior, double noise) {
  return add(surprise(add(noise, add(logit, -prior))), -surprise(noise));
}

// tanh(v / 2)
COBRA_HOST_DEVICE inline double sampled_kl_slope(double logit, double prior, double noise) {
  const double v = add(noise, add(logit, -prior)), e = exp_of_negative(-magnitude(v));
  return add(v < 0.0 ? e : 1.0, v < 0.0 ? -1.0 : -e) / add(1.0, e);
}

}  // namespace cobra
