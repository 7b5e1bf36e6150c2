// CUDA on the CPU, for tests: what csrc/*.cu need, so that a C++ compiler takes them and their kernels run without a GPU.
//
// The threads of a block are fibers of one thread: each runs until it waits for others, at a barrier or in an operation of a warp.
// A warp runs as far as it can before the next one, and every second block begins with its last. Copies to shared memory happen when
// they are waited for, as late as they may on a device, and dynamic shared memory begins as NaN. Fragments of ldmatrix and mma are
// laid out as in the PTX manual.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define COBRA_DYNAMIC_SHARED(name) unsigned char* const name = cuda_host::block->shared.data()

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {

constexpr int WARP = 32, SLOT = 64;
constexpr size_t STACK = 1 << 17;

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Barrier {
  int arrived = 0, generation = 0;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool done = false;
  std::vector<Copy> open;                   // copies that no group has yet
  std::vector<std::vector<Copy>> groups;    // in order
};

struct Block {
  std::vector<Thread> threads;
  std::vector<unsigned char> shared;
  std::vector<Barrier> warps;
  std::vector<unsigned char> slots;  // (threads, SLOT): what lanes show each other
  Barrier barrier;
  ucontext_t scheduler;
  std::function<void()> body;
  int current = 0, arrivals = 0;
};

inline Block* block = nullptr;

inline void yield() {
  Thread& thread = block->threads[size_t(block->current)];
  swapcontext(&thread.context, &block->scheduler);
}

inline void wait_for(Barrier& barrier, int count) {
  const int generation = barrier.generation;
  ++block->arrivals;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}

inline int lane() { return block->current % WARP; }

// What each lane of the warp shows; good until the next exchange
template <class Value>
const unsigned char* exchange(const Value& value) {
  static_assert(sizeof(Value) <= SLOT, "larger than a slot");
  Barrier& warp = block->warps[size_t(block->current / WARP)];
  wait_for(warp, WARP);  // all have read what was shown before
  std::memcpy(&block->slots[size_t(block->current * SLOT)], &value, sizeof value);
  wait_for(warp, WARP);
  return &block->slots[size_t(block->current / WARP * WARP * SLOT)];
}

template <class Value>
Value shown(const unsigned char* slots, int lane) {
  Value value;
  std::memcpy(&value, slots + lane * SLOT, sizeof value);
  return value;
}

inline void enter() {
  block->body();
  block->threads[size_t(block->current)].done = true;
  swapcontext(&block->threads[size_t(block->current)].context, &block->scheduler);
}

// Runs a thread until it waits, and says whether it has come to its end
inline bool resume(int index) {
  Thread& thread = block->threads[size_t(index)];
  if (thread.done) return false;
  block->current = index;
  threadIdx = dim3(unsigned(index));
  swapcontext(&block->scheduler, &thread.context);
  return thread.done;
}

inline void run_block(int threads, size_t shared, const std::function<void()>& body) {
  Block here;
  block = &here;
  here.body = body;
  here.threads.resize(size_t(threads));
  here.shared.assign(shared, 0xFF);  // NaN in every format
  here.warps.resize(size_t((threads + WARP - 1) / WARP));
  here.slots.resize(size_t(threads * SLOT));
  for (Thread& thread : here.threads) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = STACK;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  const bool backwards = blockIdx.x % 2;
  for (int left = threads; left;) {
    const int before = here.arrivals, running = left;
    for (int first = 0; first < threads; first += WARP)
      for (int arrived = -1, remaining = left; arrived != here.arrivals || remaining != left;) {
        arrived = here.arrivals, remaining = left;
        for (int i = first; i < min(first + WARP, threads); ++i) left -= resume(backwards ? threads - 1 - i : i);
      }
    if (left == running && before == here.arrivals) {
      std::fprintf(stderr, "threads of a block wait for others that never come\n");
      std::abort();
    }
  }
}

}  // namespace cuda_host

inline void __syncthreads() { cuda_host::wait_for(cuda_host::block->barrier, int(blockDim.x)); }

template <class Value>
Value __shfl_down_sync(unsigned, Value value, int step) {
  const unsigned char* slots = cuda_host::exchange(value);
  const int from = cuda_host::lane() + step;
  return from < cuda_host::WARP ? cuda_host::shown<Value>(slots, from) : value;
}

namespace cuda_host {

inline void finish_copies(size_t left) {
  std::vector<std::vector<Copy>>& groups = block->threads[size_t(block->current)].groups;
  while (groups.size() > left) {
    for (const Copy& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, size_t(copy.bytes));
    }
    groups.erase(groups.begin());
  }
}

// half of matrix i, at (row, column), of the addresses that the lanes gave
inline uint16_t element(const unsigned char* slots, int matrix, int row, int column) {
  return shown<const uint16_t*>(slots, matrix * 8 + row)[column];
}

inline uint32_t pair(uint16_t low, uint16_t high) { return low | uint32_t(high) << 16; }

struct Operands {
  uint32_t a[4], b[2];
};

inline uint16_t half_of(uint32_t word, int index) { return uint16_t(word >> 16 * index); }

}  // namespace cuda_host

namespace cobra {

struct BFloat16;
struct Float16;

inline void copy_async(void* to, const void* from, int bytes) {
  if (uintptr_t(to) % 16 || uintptr_t(from) % 16) std::abort();
  cuda_host::block->threads[size_t(cuda_host::block->current)].open.push_back({to, from, bytes});
}

inline void copy_commit() {
  cuda_host::Thread& thread = cuda_host::block->threads[size_t(cuda_host::block->current)];
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

template <int GROUPS>
void copy_wait() {
  cuda_host::finish_copies(GROUPS);
}

inline void load_matrices(uint32_t (&to)[4], const void* row) {
  const unsigned char* slots = cuda_host::exchange(row);
  const int lane = cuda_host::lane(), r = lane / 4, c = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) to[i] = cuda_host::pair(cuda_host::element(slots, i, r, c), cuda_host::element(slots, i, r, c + 1));
}

inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  const unsigned char* slots = cuda_host::exchange(row);
  const int lane = cuda_host::lane(), r = lane % 4 * 2, c = lane / 4;
  for (int i = 0; i < 4; ++i) to[i] = cuda_host::pair(cuda_host::element(slots, i, r, c), cuda_host::element(slots, i, r + 1, c));
}

template <class Format>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using namespace cuda_host;
  const unsigned char* slots = exchange(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  for (int i = 0; i < 4; ++i) {
    const int m = lane() / 4 + i / 2 * 8, n = lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = shown<Operands>(slots, m % 8 * 4 + k % 8 / 2).a[m / 8 + k / 8 * 2];
      const uint32_t right = shown<Operands>(slots, n * 4 + k % 8 / 2).b[k / 8];
      sum[i] += Format::get(half_of(left, k % 2)) * Format::get(half_of(right, k % 2));
    }
  }
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, void*, Arguments... arguments) {
  gridDim = grid, blockDim = dim3(unsigned(threads));
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        cuda_host::run_block(threads, shared, [&] { kernel(arguments...); });
      }
  return 0;
}

}  // namespace cobra
