// How it works: `ticket` holds the job's number and how many of its pieces are not yet taken.
// Whoever decrements the count owns one piece, and only then reads what the job is: the job cannot
// end, nor its fields change, while a piece is owned and not done. Pieces done are counted; the
// caller returns at the last. No thread ever waits for another to arrive, so a worker that lost its
// core costs the pieces it owns and nothing more.
//
// Which piece it is: each thread has a range of its own, a part of memory that it streams from
// beginning to end, and when that is done takes from the ends of others. Pieces may thus be small,
// so that threads end together.
//
// Waiting spins for SPIN and then sleeps on a condition variable: spinning saves the wake-up within
// a decoding step, where jobs follow each other closely; sleeping gives the core back to whoever
// shares it, which may be the very thread that is waited for.
#include "threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>

#ifndef _WIN32
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace gemsmith {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::microseconds SPIN{50};
constexpr int64_t MAX_WORKERS = 255;

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
  asm volatile("yield");
#else
  std::this_thread::yield();
#endif
}

// True as soon as `done()`; false after SPIN.
template <class Done>
bool spin(Done done) {
  const auto end = Clock::now() + SPIN;
  do {
    for (int i = 0; i < 32; i++) {
      if (done()) return true;
      pause();
    }
  } while (Clock::now() < end);
  return done();
}

struct Pool {
  std::atomic<uint64_t> ticket{0};  // number of the job << 32 | pieces not yet taken
  std::atomic<int64_t> limit{0};    // workers below this index take part
  // The job: written while `ticket` counts 0 pieces, read by owners of a piece.
  Piece piece = nullptr;
  const void* job = nullptr;
  int64_t pieces = 0, parts = 0;
  std::atomic<int64_t> done{0};
  // Pieces of each thread that nobody has: the first << 32 | one after the last.
  struct alignas(64) Range {
    std::atomic<uint64_t> pieces{0};
  };
  Range ranges[MAX_WORKERS + 1];

  std::mutex mutex;
  std::condition_variable work, finished;
  std::atomic<int> sleepers{0};
  std::atomic<bool> caller_sleeps{false};
  int64_t workers = 0;  // started

  // thread: the caller is 0.
  bool take(int64_t thread) {
    uint64_t seen = ticket.load(std::memory_order_acquire);
    while (seen & 0xffffffffu)
      if (ticket.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel)) {
        run(find(thread));
        return true;
      }
    return false;
  }

  // There is one for each decrement of the ticket, and ranges only shrink: one look at each is enough.
  int64_t find(int64_t thread) {
    for (int64_t i = 0; i < parts; i++) {
      std::atomic<uint64_t>& range = ranges[(thread + i) % parts].pieces;
      uint64_t seen = range.load();
      for (;;) {
        const uint64_t first = seen >> 32, end = seen & 0xffffffffu;
        if (first == end) break;
        const bool own = i == 0;
        if (range.compare_exchange_weak(seen, own ? seen + (uint64_t{1} << 32) : seen - 1))
          return static_cast<int64_t>(own ? first : end - 1);
      }
    }
    std::abort();
  }

  void run(int64_t which) {
    const int64_t total = pieces;  // after the last piece is counted the job may change
    piece(job, which);
    if (done.fetch_add(1) + 1 == total && caller_sleeps.load()) {
      { std::lock_guard<std::mutex> lock(mutex); }
      finished.notify_one();
    }
  }

  bool waiting() const { return (ticket.load() & 0xffffffffu) == 0; }

  void work_for_ever(int64_t index) {
    const auto ready = [&] { return !waiting() && index < limit.load(); };
    for (;;) {
      if (ready() || spin(ready)) {
        take(index + 1);
        continue;
      }
      std::unique_lock<std::mutex> lock(mutex);
      sleepers.fetch_add(1);
      work.wait(lock, ready);
      sleepers.fetch_sub(1);
    }
  }

  // Starts workers until there are `count`; fewer where the system grants no more threads.
  void grow(int64_t count) {
    try {
      for (; workers < count; workers++)
        std::thread(&Pool::work_for_ever, this, workers).detach();
    } catch (const std::system_error&) {
    }
  }

  void share(int64_t count, Piece what, const void* which, int64_t helpers) {
    grow(helpers);
    piece = what;
    job = which;
    pieces = count;
    parts = helpers + 1;
    for (int64_t i = 0; i < parts; i++) {
      const auto first = static_cast<uint64_t>(i * count / parts);
      ranges[i].pieces.store(first << 32 | static_cast<uint64_t>((i + 1) * count / parts));
    }
    done.store(0);
    limit.store(helpers);
    const uint64_t number = (ticket.load() >> 32) + 1;
    ticket.store(number << 32 | static_cast<uint64_t>(count));
    if (sleepers.load() > 0) {
      { std::lock_guard<std::mutex> lock(mutex); }
      work.notify_all();
    }
    while (take(0)) {
    }
    const auto all = [&] { return done.load() == count; };
    if (spin(all)) return;
    std::unique_lock<std::mutex> lock(mutex);
    caller_sleeps.store(true);
    finished.wait(lock, all);
    caller_sleeps.store(false);
  }
};

// Never destroyed: workers may still look at it while the process ends.
std::atomic<Pool*> pool{nullptr};
std::atomic<bool> busy{false};
std::atomic<int64_t> allowed{1};

#ifndef _WIN32
// A child has this thread alone: the workers are gone, a lock may be held for ever. Start anew.
void in_child() {
  pool.store(nullptr);
  busy.store(false);
}
#endif

Pool* the_pool() {
  Pool* found = pool.load();
  if (found) return found;
#ifndef _WIN32
  static const int registered = pthread_atfork(nullptr, nullptr, in_child);
  (void)registered;
#endif
  found = new Pool;
  pool.store(found);
  return found;
}

}  // namespace

void set_threads(int64_t count) {
  allowed.store(count < 1 ? 1 : count > MAX_WORKERS + 1 ? MAX_WORKERS + 1 : count);
}

int64_t threads() { return allowed.load(); }

void parallel(int64_t pieces, Piece piece, const void* job) {
  const int64_t helpers = (pieces < allowed.load() ? pieces : allowed.load()) - 1;
  if (helpers > 0 && !busy.exchange(true)) {
    the_pool()->share(pieces, piece, job, helpers);
    busy.store(false);
    return;
  }
  for (int64_t i = 0; i < pieces; i++) piece(job, i);
}

}  // namespace gemsmith
