#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace jaxllm {
namespace {

// A helper looks for work this long before it sleeps: longer than the gaps between the calls of a decode step.
constexpr auto kPatience = std::chrono::microseconds(100);

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Subnormal numbers count as zero, as XLA sets it for its own threads: the result must not depend on who computes it.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

class Pool {
 public:
  void run(int64_t pieces, void (*work)(const void*, int64_t), const void* argument) {
    FlushSubnormals flush;
    if (pieces < 2 || count_ < 2 || busy_.test_and_set(std::memory_order_acquire)) {
      for (int64_t i = 0; i < pieces; i++) work(argument, i);
      return;
    }
    // A ticket has room for 65,535 pieces; more are taken several at a time.
    const int64_t each = (pieces + 0xfffe) / 0xffff, shares = (pieces + each - 1) / each;
    work_ = work, argument_ = argument, done_ = 0, each_ = each, pieces_ = pieces;
    const uint64_t job = ((ticket_.load() >> 32) + 1) << 32 | uint64_t(shares);
    ticket_.store(job);
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    help();
    for (int spins = 0; done_.load(std::memory_order_acquire) < shares; spins++) {
      if (spins < 2000) pause(); else std::this_thread::yield();
    }
    busy_.clear(std::memory_order_release);
  }

  int threads() const { return count_; }

  void use_threads(int count) {
    count_ = count;
    while (started_ < count - 1) std::thread(&Pool::live, this, ++started_).detach();
  }

 private:
  // A ticket is the job's number, the next piece and the number of pieces. Whoever advances it has that piece to do, and
  // until it is done the caller waits; so work_ and argument_ are this job's. They may be read only after that.
  bool help() {
    bool any = false;
    for (uint64_t ticket = ticket_.load(std::memory_order_acquire);;) {
      const uint64_t next = ticket >> 16 & 0xffff, pieces = ticket & 0xffff;
      if (next >= pieces) return any;
      if (ticket_.compare_exchange_weak(ticket, ticket + (1 << 16), std::memory_order_acq_rel)) {
        const auto work = work_.load(std::memory_order_relaxed);
        const int64_t each = each_.load(std::memory_order_relaxed), all = pieces_.load(std::memory_order_relaxed);
        for (int64_t i = next * each; i < std::min<int64_t>((next + 1) * each, all); i++) {
          work(argument_.load(std::memory_order_relaxed), i);
        }
        done_.fetch_add(1, std::memory_order_release);
        any = true;
        ticket = ticket_.load(std::memory_order_acquire);
      }
    }
  }

  bool waiting() const {
    const uint64_t ticket = ticket_.load();
    return (ticket >> 16 & 0xffff) < (ticket & 0xffff);
  }

  void live(int number) {
    FlushSubnormals flush;
    for (auto until = std::chrono::steady_clock::now() + kPatience;;) {
      if (number < count_ && help()) {
        until = std::chrono::steady_clock::now() + kPatience;
        continue;
      }
      for (int i = 0; i < 32 && !waiting(); i++) pause();
      if (std::chrono::steady_clock::now() < until) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      sleepers_++;
      wake_.wait(lock, [&] { return number < count_ && waiting(); });
      sleepers_--;
      until = std::chrono::steady_clock::now() + kPatience;
    }
  }

  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  std::atomic<uint64_t> ticket_{0};
  std::atomic<void (*)(const void*, int64_t)> work_{nullptr};
  std::atomic<const void*> argument_{nullptr};
  std::atomic<int64_t> done_{0}, each_{1}, pieces_{0};
  std::atomic<int> sleepers_{0}, count_{1};
  int started_ = 0;
  std::mutex mutex_;
  std::condition_variable wake_;
};

Pool& pool() {
  static Pool* pool = new Pool;  // never destroyed: helpers outlive everything
  return *pool;
}

}  // namespace

void in_parallel(int64_t pieces, void (*work)(const void*, int64_t), const void* argument) {
  pool().run(pieces, work, argument);
}

int threads() { return pool().threads(); }
void use_threads(int count) { pool().use_threads(count); }

}  // namespace jaxllm
