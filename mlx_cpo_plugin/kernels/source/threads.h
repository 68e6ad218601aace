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
      std::thread([this] { work(); }).detach();
    }
  }

  int size() const {
    return size_;
  }

  // Lets each thread do the same job.
  void run(const std::function<void()>& job) {
    std::lock_guard one_at_a_time(callers_);
    if (size_ == 1) {
      return job();
    }
    job_ = &job;
    unfinished_.store(size_ - 1, std::memory_order_relaxed);
    {
      std::lock_guard lock(mutex_);
      round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job();
    while (unfinished_.load(std::memory_order_acquire) > 0) {
      std::this_thread::yield();
    }
  }

 private:
  // Rounds that a thread looks for work before it sleeps; a round is 10 to 50 ns. Operations follow within that time.
  static constexpr int kLooks = 4000;

  void work() {
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
      (*job_)();
      unfinished_.fetch_sub(1, std::memory_order_release);
    }
  }

  const int size_;
  const std::function<void()>* job_ = nullptr;
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

// One of so many parts of [0, total), in whole units.
inline Range part_of(int64_t total, int64_t part, int64_t parts, int64_t unit = 1) {
  int64_t units = (total + unit - 1) / unit;
  auto border = [&](int64_t number) { return std::min(total, units * number / parts * unit); };
  return {border(part), border(part + 1)};
}

// How many parts each thread gets at most, so that nobody waits long for one whose core is slow or busy elsewhere.
constexpr int64_t kPartsEach = 4;

inline int64_t count_parts(int64_t wanted) {
  int64_t size = team->size();
  return size == 1 ? 1 : size * std::clamp<int64_t>(wanted / size, 1, kPartsEach);
}

// Runs ``job(part)`` for each of so many parts. Who is free takes the next one.
template <typename Job>
void in_turn(int64_t parts, Job job) {
  std::atomic<int64_t> next{0};
  team->run([&] {
    for (int64_t part; (part = next.fetch_add(1, std::memory_order_relaxed)) < parts;) {
      job(part);
    }
  });
}

// Runs ``job(range)`` over parts of [0, total), by the calling thread alone where that is little work. There are more
// parts than threads where each is ``least`` long.
template <typename Job>
void in_parts(int64_t total, int64_t unit, double work, Job job, int64_t least = 1) {
  constexpr double kLeastWork = 1e5;  // operations; less takes no longer than waking another thread
  if (work < kLeastWork) {
    return job(Range{0, total});
  }
  int64_t parts = count_parts(std::min(total / std::max(unit, least), int64_t(work / kLeastWork)));
  in_turn(parts, [&](int64_t part) {
    Range range = part_of(total, part, parts, unit);
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
