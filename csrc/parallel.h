// Numbered tasks on a few threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace cobra {

// Entry of GNU's OpenMP runtime, or null where the process has none.
using OpenMP = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

inline OpenMP find_openmp() {
#if defined(__linux__)
  return reinterpret_cast<OpenMP>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

// Calls work(task, worker) once for each task in [0, tasks), in no fixed order; worker is in [0, threads). What a task does
// must not depend on its worker, and must not throw.
//
// Runs on torch's threads where they are OpenMP's: after torch's last operation those spin for milliseconds, and threads of
// our own would have to share their cores.
template <class Work>
void parallel_for(int64_t tasks, int64_t threads, const Work& work) {
  const int64_t workers = std::min(threads, tasks);
  std::atomic<int64_t> next_task{0}, next_worker{0};
  auto drain = [&] {
    const int64_t worker = next_worker.fetch_add(1);
    for (int64_t task; (task = next_task.fetch_add(1, std::memory_order_relaxed)) < tasks;) work(task, worker);
  };
  if (workers <= 1) return drain();
  static const OpenMP openmp = find_openmp();
  if (openmp) {
    return openmp([](void* data) { (*static_cast<decltype(drain)*>(data))(); }, &drain, unsigned(workers), 0);
  }
  std::vector<std::thread> helpers;
  helpers.reserve(size_t(workers - 1));
  try {
    while (int64_t(helpers.size()) < workers - 1) helpers.emplace_back(drain);
  } catch (const std::exception&) {
    // no more threads to be had: those that run, and this one, do all of it
  }
  drain();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace cobra
