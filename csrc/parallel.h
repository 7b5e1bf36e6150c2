// Numbered tasks on a few threads that live as long as the call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace cobra {

// Calls work(task, worker) once for each task in [0, tasks), in no fixed order; worker is in [0, threads). What a task does
// must not depend on its worker, and must not throw.
template <class Work>
void parallel_for(int64_t tasks, int64_t threads, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto drain = [&](int64_t worker) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) work(task, worker);
  };
  const int64_t workers = std::min(threads, tasks);
  std::vector<std::thread> helpers;
  helpers.reserve(size_t(std::max<int64_t>(workers - 1, 0)));
  try {
    for (int64_t worker = 1; worker < workers; ++worker) helpers.emplace_back(drain, worker);
  } catch (const std::exception&) {
    // no more threads to be had: those that run, and this one, do all of it
  }
  drain(0);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace cobra
