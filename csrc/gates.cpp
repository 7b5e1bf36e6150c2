// Random words, and the gates of a whole model in one call. Memory belongs to the caller, and may be null where it says so.
//
// Gates lie site by site, `ranks` of each, or from offsets[i] to offsets[i + 1] of site i.
#include "gates.h"

#include <algorithm>
#include <cstdint>

#include "export.h"
#include "isa.h"

namespace cobra {
namespace {

constexpr int64_t BLOCK = 64;  // gates at once, a multiple of the four words of a Philox block

#if defined(__GNUC__) && defined(__x86_64__)
template <class Work>
__attribute__((target("avx2"))) void each_wide(int64_t count, const Work& work) {
  for (int64_t k = 0; k < count; ++k) work(k);
}
#else
template <class Work>
void each_wide(int64_t count, const Work& work) {
  for (int64_t k = 0; k < count; ++k) work(k);
}
#endif

// work(k) for k < count: independent arithmetic, which the compiler makes vectors of, four numbers where the machine has AVX2.
template <class Work>
void each(bool wide, int64_t count, const Work& work) {
  if (wide) return each_wide(count, work);
  for (int64_t k = 0; k < count; ++k) work(k);
}

struct Layout {
  const int64_t* offsets;  // (sites + 1,), or null
  int64_t sites, ranks, first_site;
  uint64_t seed, step;
  bool wide;  // AVX2
};

// work(first, count, site, rank) for runs of at most BLOCK gates of one site, `first` of all gates and `rank` of the site's.
template <class Work>
void for_each_run(const Layout& layout, const Work& work) {
  for (int64_t site = 0; site < layout.sites; ++site) {
    const int64_t begin = layout.offsets ? layout.offsets[site] : site * layout.ranks;
    const int64_t end = layout.offsets ? layout.offsets[site + 1] : begin + layout.ranks;
    for (int64_t first = begin; first < end; first += BLOCK) {
      work(first, std::min(BLOCK, end - first), uint32_t(layout.first_site + site), first - begin);
    }
  }
}

// Words of gates rank .. rank + count - 1 of a site; rank is a multiple of 4, and so many words are written.
void draw_words(uint32_t* out, int64_t count, uint32_t site, int64_t rank, const Layout& layout) {
  for (int64_t k = 0; k < count; k += 4) {
    const Words4 words = gate_block(layout.seed, layout.step, site, uint32_t((rank + k) / 4));
    std::copy(words.w, words.w + 4, out + k);
  }
}

template <class Number>
void draw_noise(Number* out, int64_t count, uint32_t site, int64_t rank, const Layout& layout) {
  uint32_t words[BLOCK];
  draw_words(words, count, site, rank, layout);
  each(layout.wide, count, [&](int64_t k) { out[k] = logistic_noise(words[k]); });
}

template <class Number>
struct Gates {
  const Number *logits, *prior, *noise;  // prior null without a KL; noise null where it is drawn, or not needed
  Layout layout;
  GateKind kind;

  // The noise of a run: given, or drawn into `room`.
  const Number* noise_of(Number* room, int64_t first, int64_t count, uint32_t site, int64_t rank) const {
    if (noise) return noise + first;
    draw_noise(room, count, site, rank, layout);
    return room;
  }

  void forward(Number* z, Number* kl, Number* open) const {
    const bool noisy = z || (kl && kind.sampled);
    for_each_run(layout, [&](int64_t first, int64_t count, uint32_t site, int64_t rank) {
      const auto run = [&](const auto& work) { each(layout.wide, count, work); };
      Number room[BLOCK];
      const Number* a = logits + first;
      const Number* p = prior ? prior + first : nullptr;
      const Number* v = noisy ? noise_of(room, first, count, site, rank) : nullptr;
      if (z) {
        run([&](int64_t k) { z[first + k] = Number(sample_gate(a[k], v[k], kind)); });
      }
      if (kl && kind.sampled) {
        run([&](int64_t k) { kl[first + k] = Number(sampled_kl(a[k], p[k], v[k])); });
      } else if (kl) {
        run([&](int64_t k) { kl[first + k] = Number(bernoulli_kl(a[k], p[k])); });
      }
      if (open) {
        run([&](int64_t k) { open[first + k] = Number(open_probability(a[k], kind)); });
      }
    });
  }

  void backward(const Number* dz, const Number* dkl, const Number* dopen, Number* out) const {
    const bool noisy = dz || (dkl && kind.sampled);
    for_each_run(layout, [&](int64_t first, int64_t count, uint32_t site, int64_t rank) {
      const auto run = [&](const auto& work) { each(layout.wide, count, work); };
      Number room[BLOCK];
      double sum[BLOCK] = {};
      const Number* a = logits + first;
      const Number* p = prior ? prior + first : nullptr;
      const Number* v = noisy ? noise_of(room, first, count, site, rank) : nullptr;
      if (dz) {
        run([&](int64_t k) { sum[k] = add(sum[k], mul(dz[first + k], sample_slope(a[k], v[k], kind))); });
      }
      if (dkl && kind.sampled) {
        run([&](int64_t k) { sum[k] = add(sum[k], mul(dkl[first + k], sampled_kl_slope(a[k], p[k], v[k]))); });
      } else if (dkl) {
        run([&](int64_t k) { sum[k] = add(sum[k], mul(dkl[first + k], bernoulli_kl_slope(a[k], p[k]))); });
      }
      if (dopen) {
        run([&](int64_t k) { sum[k] = add(sum[k], mul(dopen[first + k], open_slope(a[k], kind))); });
      }
      run([&](int64_t k) { out[first + k] = Number(sum[k]); });
    });
  }
};

template <class Number>
Gates<Number> gates_of(const void* logits, const void* prior, const void* noise, const Layout& layout, const GateKind& kind) {
  const auto as = [](const void* pointer) { return static_cast<const Number*>(pointer); };
  return {as(logits), as(prior), as(noise), layout, kind};
}

GateKind kind_of(double temperature, double low, double width, double log_ratio, int32_t flags) {
  return {temperature, low, width, log_ratio, bool(flags & SAMPLED)};
}

}  // namespace
}  // namespace cobra

// out: (sites, ranks) int64, row-major; each word in [0, 2^32)
COBRA_EXPORT void cobra_gate_words(int64_t* out, int64_t sites, int64_t ranks, uint64_t seed, uint64_t step,
                                   int64_t first_site) {
  const cobra::Layout layout{nullptr, sites, ranks, first_site, seed, step, false};
  cobra::for_each_run(layout, [&](int64_t first, int64_t count, uint32_t site, int64_t rank) {
    uint32_t words[cobra::BLOCK];
    cobra::draw_words(words, count, site, rank, layout);
    std::copy(words, words + count, out + first);
  });
}

// out: (sites, ranks) fp32
COBRA_EXPORT void cobra_gate_noise(float* out, int64_t sites, int64_t ranks, uint64_t seed, uint64_t step, int64_t first_site,
                                   int64_t level) {
  const cobra::Layout layout{nullptr, sites, ranks, first_site, seed, step, cobra::supported_level(level) > 0};
  cobra::for_each_run(layout, [&](int64_t first, int64_t count, uint32_t site, int64_t rank) {
    cobra::draw_noise(out + first, count, site, rank, layout);
  });
}

// out[i] is the noise of words[i], of which the top 24 bits count
COBRA_EXPORT void cobra_noise_of_words(const int64_t* words, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = cobra::logistic_noise(uint32_t(words[i]));
}

// z, kl, open: null where not wanted. All numbers are fp32, or fp64 by the flag.
COBRA_EXPORT void cobra_gates_forward(const void* logits, const void* prior, const void* noise, const int64_t* offsets, void* z,
                                      void* kl, void* open, int64_t sites, int64_t ranks, uint64_t seed, uint64_t step,
                                      int64_t first_site, double temperature, double low, double width, double log_ratio,
                                      int32_t flags, int64_t level) {
  const cobra::Layout layout{offsets, sites, ranks, first_site, seed, step, cobra::supported_level(level) > 0};
  const cobra::GateKind kind = cobra::kind_of(temperature, low, width, log_ratio, flags);
  const auto run = [&](auto number) {
    using Number = decltype(number);
    const auto gates = cobra::gates_of<Number>(logits, prior, noise, layout, kind);
    gates.forward(static_cast<Number*>(z), static_cast<Number*>(kl), static_cast<Number*>(open));
  };
  flags & cobra::FP64 ? run(double()) : run(float());
}

// dz, dkl, dopen: null where there is no gradient. out: that of the logits.
COBRA_EXPORT void cobra_gates_backward(const void* logits, const void* prior, const void* noise, const int64_t* offsets,
                                       const void* dz, const void* dkl, const void* dopen, void* out, int64_t sites,
                                       int64_t ranks, uint64_t seed, uint64_t step, int64_t first_site, double temperature,
                                       double low, double width, double log_ratio, int32_t flags, int64_t level) {
  const cobra::Layout layout{offsets, sites, ranks, first_site, seed, step, cobra::supported_level(level) > 0};
  const cobra::GateKind kind = cobra::kind_of(temperature, low, width, log_ratio, flags);
  const auto run = [&](auto number) {
    using Number = decltype(number);
    const auto gates = cobra::gates_of<Number>(logits, prior, noise, layout, kind);
    gates.backward(static_cast<const Number*>(dz), static_cast<const Number*>(dkl), static_cast<const Number*>(dopen),
                   static_cast<Number*>(out));
  };
  flags & cobra::FP64 ? run(double()) : run(float());
}

// z of given noise, or with a dz the gradient of the logits: out (gates,). Fewer arguments, for a call a layer.
COBRA_EXPORT void cobra_concrete(const void* logits, const void* noise, const void* dz, void* out, int64_t gates,
                                 double temperature, double low, double width, int32_t flags, int64_t level) {
  const cobra::Layout layout{nullptr, 1, gates, 0, 0, 0, cobra::supported_level(level) > 0};
  const cobra::GateKind kind = cobra::kind_of(temperature, low, width, 0.0, flags);
  const auto run = [&](auto number) {
    using Number = decltype(number);
    const auto all = cobra::gates_of<Number>(logits, nullptr, noise, layout, kind);
    if (!dz) return all.forward(static_cast<Number*>(out), nullptr, nullptr);
    all.backward(static_cast<const Number*>(dz), nullptr, nullptr, static_cast<Number*>(out));
  };
  flags & cobra::FP64 ? run(double()) : run(float());
}
