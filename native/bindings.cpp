// Python's view of kernels.h. Tensors come as addresses: an integer costs a twentieth of what an
// array argument does. src/gemsmith/ops/cpu.py is the only caller and checks everything; no
// function here holds the GIL while it works.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <chrono>
#include <thread>

#include "kernels.h"
#include "threads.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace nb = nanobind;
using Address = uintptr_t;

namespace {

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

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void matmul(Address lines, Address scales, int64_t N, int64_t K, int bits, int64_t group,
            Address x8, Address sx, int64_t M, Address y) {
  gemsmith::matmul(at<const uint8_t>(lines), at<const float>(scales), N, K, bits, group,
                   at<const int8_t>(x8), at<const float>(sx), M, at<float>(y));
}

void linear(Address lines, Address scales, int64_t N, int64_t K, int bits, int64_t group,
            Address x, int64_t M, Address y) {
  gemsmith::linear(at<const uint8_t>(lines), at<const float>(scales), N, K, bits, group,
                   at<const float>(x), M, at<float>(y));
}

nb::list isas() {
  int count = 0;
  const char* const* names = gemsmith::isas(&count);
  nb::list found;
  for (int i = 0; i < count; i++) found.append(names[i]);
  return found;
}

// Asks the kernel for 2 MiB pages behind the whole pages of a buffer.
bool advise_hugepages([[maybe_unused]] Address data, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  constexpr Address PAGE = 4096;
  const Address first = (data + PAGE - 1) / PAGE * PAGE;
  const Address last = (data + static_cast<Address>(bytes)) / PAGE * PAGE;
  return last > first && madvise(at<void>(first), last - first, MADV_HUGEPAGE) == 0;
#else
  return false;
#endif
}

}  // namespace

NB_MODULE(_native, m) {
  const auto release = nb::call_guard<WithoutGil>();
  m.def("isa", [] { return gemsmith::kernels().name; });
  m.def("isas", isas);
  m.def("force_isa", [](const std::string& name) { return gemsmith::force_isa(name.c_str()); });
  m.def("set_threads", gemsmith::set_threads);
  m.def("threads", gemsmith::threads);
  m.def("pack_lines", [](Address packed, int64_t N, int64_t K, int bits, Address lines) {
    gemsmith::pack_lines(at<const uint8_t>(packed), N, K, bits, at<uint8_t>(lines));
  }, release);
  m.def("quantize_rows", [](Address x, int64_t M, int64_t K, Address x8, Address sx) {
    gemsmith::quantize_rows(at<const float>(x), M, K, at<int8_t>(x8), at<float>(sx));
  }, release);
  // One function under two names: M up to 8 and any M. A matrix unit would part them.
  m.def("gemv", matmul, release);
  m.def("gemm", matmul, release);
  m.def("linear", linear, release);
  m.def("read_memory", [](Address data, int64_t bytes) {
    return gemsmith::read_memory(at<const uint8_t>(data), bytes);
  }, release);
  m.def("advise_hugepages", advise_hugepages, release);
}
