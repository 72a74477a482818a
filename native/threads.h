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

}  // namespace gemsmith
