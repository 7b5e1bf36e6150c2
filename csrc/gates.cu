// Gates of a whole model in one launch, forward and backward, with the arithmetic of csrc/gates.h: the bits of csrc/gates.cpp.
//
// A block has one site, and loops over its gates. Every thread draws the words of its own gate.
#include "cuda_launch.h"
#include "export.h"
#include "gates.h"

namespace cobra {

constexpr int MOST_THREADS = 128;

struct Layout {
  const int64_t* offsets;  // (sites + 1,), or null: then `ranks` of each site, and the last has what is left of `gates`
  int64_t gates, ranks, first_site;
  uint64_t seed, step;
};

template <class Number>
struct Operands {
  const Number *logits, *prior, *noise;  // prior null without a KL; noise null where it is drawn, or not needed
  const float* temperature;              // one number that counts in the place of the call's heat, or null
};

template <class Number>
struct Gradients {
  const Number *z, *kl, *open;  // null where there is none
  int z_stride, kl_stride, open_stride;
};

__device__ inline double draw(const Layout& layout, int64_t rank) {
  const Words4 words = gate_block(layout.seed, layout.step, uint32_t(layout.first_site + blockIdx.x), uint32_t(rank / 4));
  const int lane = int(rank % 4);  // selected, not indexed: words stay in registers
  return logistic_noise(lane < 2 ? (lane == 0 ? words.w[0] : words.w[1]) : (lane == 2 ? words.w[2] : words.w[3]));
}

// work(gate, rank) for the gates of this block's site that are this thread's.
template <class Work>
__device__ inline void for_each_gate(const Layout& layout, const Work& work) {
  const int64_t site = blockIdx.x, begin = layout.offsets ? layout.offsets[site] : site * layout.ranks;
  const int64_t end = layout.offsets ? layout.offsets[site + 1] : min(begin + layout.ranks, layout.gates);
  for (int64_t gate = begin + threadIdx.x; gate < end; gate += blockDim.x) work(gate, gate - begin);
}

// Grid (sites,). z, kl, open: null where not wanted
template <class Number>
__global__ void __launch_bounds__(MOST_THREADS)
    gates_forward_kernel(Operands<Number> in, Layout layout, GateKind kind, Number* z, Number* kl, Number* open) {
  if (in.temperature) kind.temperature = *in.temperature;
  for_each_gate(layout, [&](int64_t gate, int64_t rank) {
    const double logit = in.logits[gate];
    const bool noisy = z || (kl && kind.sampled);
    const double noise = !noisy ? 0.0 : in.noise ? double(in.noise[gate]) : draw(layout, rank);
    if (z) z[gate] = Number(sample_gate(logit, noise, kind));
    if (kl) kl[gate] = Number(kind.sampled ? sampled_kl(logit, in.prior[gate], noise) : bernoulli_kl(logit, in.prior[gate]));
    if (open) open[gate] = Number(open_probability(logit, kind));
  });
}

// Grid (sites,). out: gradient of the logits
template <class Number>
__global__ void __launch_bounds__(MOST_THREADS)
    gates_backward_kernel(Operands<Number> in, Layout layout, GateKind kind, Gradients<Number> from, Number* out) {
  if (in.temperature) kind.temperature = *in.temperature;
  for_each_gate(layout, [&](int64_t gate, int64_t rank) {
    const double logit = in.logits[gate];
    const bool noisy = from.z || (from.kl && kind.sampled);
    const double noise = !noisy ? 0.0 : in.noise ? double(in.noise[gate]) : draw(layout, rank);
    double sum = 0.0;
    if (from.z) sum = add(sum, mul(from.z[gate * from.z_stride], sample_slope(logit, noise, kind)));
    if (from.kl) {
      const double prior = in.prior[gate];
      const double change = kind.sampled ? sampled_kl_slope(logit, prior, noise) : bernoulli_kl_slope(logit, prior);
      sum = add(sum, mul(from.kl[gate * from.kl_stride], change));
    }
    if (from.open) sum = add(sum, mul(from.open[gate * from.open_stride], open_slope(logit, kind)));
    out[gate] = Number(sum);
  });
}

// What the launchers take beside tensors.
struct Call {
  Layout layout;
  GateKind kind;
  unsigned sites;
  int threads;
  void* stream;
};

inline Call call_of(const Layout& layout, int64_t sites, double heat, double low, double width, double log_ratio, int flags,
                    void* stream) {
  const GateKind kind{heat, low, width, log_ratio, bool(flags & SAMPLED)};
  const bool few = layout.ranks && layout.ranks < MOST_THREADS;
  return {layout, kind, unsigned(sites), few ? int(ceil_div<int64_t>(layout.ranks, 32)) * 32 : MOST_THREADS, stream};
}

template <class Number>
const Number* as(const void* pointer) {
  return static_cast<const Number*>(pointer);
}

template <class Number>
int forward(const void* logits, const void* prior, const void* noise, const float* temperature, void* z, void* kl, void* open,
            const Call& call) {
  const Operands<Number> in{as<Number>(logits), as<Number>(prior), as<Number>(noise), temperature};
  return launch(gates_forward_kernel<Number>, dim3(call.sites), call.threads, 0, call.stream, in, call.layout, call.kind,
                static_cast<Number*>(z), static_cast<Number*>(kl), static_cast<Number*>(open));
}

template <class Number>
int backward(const void* logits, const void* prior, const void* noise, const float* temperature, const void* dz,
             int64_t z_stride, const void* dkl, int64_t kl_stride, const void* dopen, int64_t open_stride, void* out,
             const Call& call) {
  const Operands<Number> in{as<Number>(logits), as<Number>(prior), as<Number>(noise), temperature};
  const Gradients<Number> from{as<Number>(dz),  as<Number>(dkl), as<Number>(dopen),
                               int(z_stride), int(kl_stride),  int(open_stride)};
  return launch(gates_backward_kernel<Number>, dim3(call.sites), call.threads, 0, call.stream, in, call.layout, call.kind, from,
                static_cast<Number*>(out));
}

}  // namespace cobra

// All on the current device. What csrc/gates.cpp lets be null may be null; sites > 0 blocks of at most `ranks` gates, or with
// offsets (sites + 1,) as many as these say.
COBRA_EXPORT int cobra_cuda_gates_forward(const void* logits, const void* prior, const void* noise, const int64_t* offsets,
                                          const float* temperature, void* z, void* kl, void* open, int64_t gates, int64_t sites,
                                          int64_t ranks, uint64_t seed, uint64_t step, int64_t first_site, double heat,
                                          double low, double width, double log_ratio, int flags, void* stream) {
  using namespace cobra;
  const Call call = call_of({offsets, gates, ranks, first_site, seed, step}, sites, heat, low, width, log_ratio, flags, stream);
  const auto run = flags & FP64 ? forward<double> : forward<float>;
  return run(logits, prior, noise, temperature, z, kl, open, call);
}

// dz, dkl, dopen: null where there is no gradient; a stride of 0 reads one number for all gates, else it is 1.
COBRA_EXPORT int cobra_cuda_gates_backward(const void* logits, const void* prior, const void* noise, const int64_t* offsets,
                                           const float* temperature, const void* dz, int64_t z_stride, const void* dkl,
                                           int64_t kl_stride, const void* dopen, int64_t open_stride, void* out, int64_t gates,
                                           int64_t sites, int64_t ranks, uint64_t seed, uint64_t step, int64_t first_site,
                                           double heat, double low, double width, double log_ratio, int flags, void* stream) {
  using namespace cobra;
  const Call call = call_of({offsets, gates, ranks, first_site, seed, step}, sites, heat, low, width, log_ratio, flags, stream);
  const auto run = flags & FP64 ? backward<double> : backward<float>;
  return run(logits, prior, noise, temperature, dz, z_stride, dkl, kl_stride, dopen, open_stride, out, call);
}
