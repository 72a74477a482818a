// Which instruction set's kernels run. One row per isa_*.cpp, slowest first.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace gemsmith {

namespace {

const Kernels* const ALL[] = {
    &GENERIC,
#ifdef GEMSMITH_ISA_AMX_EMULATED
    &AMX_EMULATED,
#endif
#ifdef GEMSMITH_ISA_AVX2
    &AVX2,
#endif
#ifdef GEMSMITH_ISA_AVX512VNNI
    &AVX512VNNI,
#endif
#ifdef GEMSMITH_ISA_AMX
    &AMX,
#endif
#ifdef GEMSMITH_ISA_NEON
    &NEON,
#endif
};
constexpr int COUNT = sizeof(ALL) / sizeof(ALL[0]);

std::atomic<const Kernels*> chosen{nullptr};

const Kernels* fastest() {
  const Kernels* found = &GENERIC;
  for (const Kernels* each : ALL)
    if (each->runs_here()) found = each;
  return found;
}

}  // namespace

const Kernels& kernels() {
  const Kernels* found = chosen.load(std::memory_order_relaxed);
  if (!found) chosen.store(found = fastest(), std::memory_order_relaxed);
  return *found;
}

const char* const* isas(int* count) {
  static const char* names[COUNT];
  static const int found = [] {
    int n = 0;
    for (const Kernels* each : ALL)
      if (each->runs_here()) names[n++] = each->name;
    return n;
  }();
  *count = found;
  return names;
}

bool force_isa(const char* name) {
  if (!*name) {
    chosen.store(fastest());
    return true;
  }
  for (const Kernels* each : ALL)
    if (std::strcmp(each->name, name) == 0 && each->runs_here()) {
      chosen.store(each);
      return true;
    }
  return false;
}

}  // namespace gemsmith
