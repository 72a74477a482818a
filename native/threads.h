// The thread pool: persistent workers that share out numbered pieces of one job.
#pragma once
#include <cstdint>

namespace gemsmith {

// Threads a job may use, the caller's own included; at least 1.
void set_threads(int64_t count);
int64_t threads();

using Piece = void (*)(const void* job, int64_t piece);

// Runs piece(job, i) for i in 0..pieces, on this thread and on workers that are free. Returns when
// all are done. A worker that has not woken is not waited for: the caller does its share. Where the
// pool is in use by another thread, everything runs on the caller.
void parallel(int64_t pieces, Piece piece, const void* job);

// Values of rows that are done by the caller before a worker could have woken.
constexpr int64_t ALONE_VALUES = 1 << 15;

// body(m0, m1) over 0..M by all threads, rows of `width` values each.
template <class Body>
void each_row(int64_t M, int64_t width, const Body& body) {
  if (M * width <= ALONE_VALUES || threads() == 1) return body(0, M);
  struct Job {
    const Body& body;
    int64_t M, size;
  };
  const int64_t size = (M + 4 * threads() - 1) / (4 * threads());
  const Job job{body, M, size};
  parallel(
      (M + size - 1) / size,
      [](const void* data, int64_t piece) {
        const auto& job = *static_cast<const Job*>(data);
        const int64_t end = (piece + 1) * job.size;
        job.body(piece * job.size, end < job.M ? end : job.M);
      },
      &job);
}

}  // namespace gemsmith
