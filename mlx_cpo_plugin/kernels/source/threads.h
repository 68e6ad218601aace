// Threads that share the work of one operation after the other.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace cpo {

// Threads that work on one operation at a time, the calling one among them.
class Team {
 public:
  explicit Team(int size) : size_(size) {
    for (int member = 1; member < size; ++member) {
      std::thread([this, member] { work(member); }).detach();
    }
  }

  int size() const {
    return size_;
  }

  void run(const std::function<void(int)>& job) {
    std::lock_guard one_at_a_time(callers_);
    if (size_ == 1) {
      return job(0);
    }
    job_ = &job;
    unfinished_.store(size_ - 1, std::memory_order_relaxed);
    {
      std::lock_guard lock(mutex_);
      round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job(0);
    while (unfinished_.load(std::memory_order_acquire) > 0) {
      std::this_thread::yield();
    }
  }

 private:
  // Rounds that a thread looks for work before it sleeps; a round is 10 to 50 ns. Operations follow within that time.
  static constexpr int kLooks = 4000;

  void work(int member) {
    for (uint64_t seen = 0;;) {
      for (int look = 0; look < kLooks && round_.load(std::memory_order_acquire) == seen; ++look) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
      if (round_.load(std::memory_order_acquire) == seen) {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return round_.load(std::memory_order_relaxed) != seen; });
      }
      seen = round_.load(std::memory_order_acquire);
      (*job_)(member);
      unfinished_.fetch_sub(1, std::memory_order_release);
    }
  }

  const int size_;
  const std::function<void(int)>* job_ = nullptr;
  std::atomic<int> unfinished_{0};
  std::atomic<uint64_t> round_{0};
  std::mutex callers_, mutex_;
  std::condition_variable wake_;
};

inline Team* team = nullptr;

struct Range {
  int64_t begin, end;

  int64_t size() const {
    return end - begin;
  }
};

// The part of [0, total) that is a member's, in whole units.
inline Range part_of(int64_t total, int member, int members, int64_t unit = 1) {
  int64_t units = (total + unit - 1) / unit;
  auto border = [&](int64_t number) { return std::min(total, units * number / members * unit); };
  return {border(member), border(member + 1)};
}

// Runs ``job(range)`` over parts of [0, total), by the calling thread alone where that is little work.
template <typename Job>
void in_parts(int64_t total, int64_t unit, double work, Job job) {
  constexpr double kLeastWork = 1e5;  // operations; less takes no longer than waking another thread
  if (work < kLeastWork) {
    return job(Range{0, total});
  }
  team->run([&](int member) {
    Range range = part_of(total, member, team->size(), unit);
    if (range.size() > 0) {
      job(range);
    }
  });
}

// Memory of a thread that lasts from one use to the next.
inline float* scratch(int number, size_t size) {
  thread_local std::vector<std::vector<float>> buffers(8);
  auto& buffer = buffers[number];
  if (buffer.size() < size) {
    buffer.resize(size);
  }
  return buffer.data();
}

}  // namespace cpo
