// Memory that begins with a line (kernels.h): no load or store of a line of it touches two.
#pragma once
#include <cstdint>
#include <memory>
#include <new>

#include "kernels.h"

namespace gemsmith {

struct FreeRoom {
  void operator()(void* room) const { ::operator delete[](room, std::align_val_t(LINE)); }
};

template <class T>
using Room = std::unique_ptr<T[], FreeRoom>;

// For `count` numbers, of no value yet.
template <class T>
Room<T> room(int64_t count) {
  const auto bytes = static_cast<std::size_t>(count) * sizeof(T);
  return Room<T>(static_cast<T*>(::operator new[](bytes, std::align_val_t(LINE))));
}

}  // namespace gemsmith
