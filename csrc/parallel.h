// Numbered tasks on a few threads that live as long as the call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace cobra {

// Calls work(first task), ... once each, in no fixed order; a task must not depend on which thread runs it, nor throw.
template <class Work>
void parallel_for(int64_t tasks, int64_t threads, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto drain = [&] {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) work(task);
  };
  std::vector<std::thread> helpers;
  try {
    helpers.reserve(size_t(std::max<int64_t>(0, std::min(threads, tasks) - 1)));
    while (helpers.size() < helpers.capacity()) helpers.emplace_back(drain);
  } catch (const std::system_error&) {
    // no more threads to be had: those that run, and this one, do all of it
  }
  drain();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace cobra
