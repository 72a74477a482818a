// Work without the GIL, for bindings*.cpp alone.
#pragma once
#include <nanobind/nanobind.h>

#include <chrono>
#include <thread>

// Works without the GIL. A daemon thread that asks for it back while the interpreter ends is ended
// by CPython before 3.14, by an unwinding that C++ frames turn into an abort of the process; such a
// thread is held here instead, for the little that is left, as CPython 3.14 does.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};
