// SPDX-License-Identifier: Apache-2.0
#include "cpu/tiles.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>

// Each instruction set gets a copy of the tile functions; the one that fits is chosen when they are called.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SSLKERNELS_MULTIVERSION 1
#endif

namespace sslkernels {

namespace baseline {
#include "cpu/tiles.inl"
}

#ifdef SSLKERNELS_MULTIVERSION
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace v3 {
#include "cpu/tiles.inl"
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace v4 {
#include "cpu/tiles.inl"
}
#pragma GCC pop_options
#endif

namespace {

Level widest() {
#ifdef SSLKERNELS_MULTIVERSION
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Level::kV4;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    return Level::kV3;
  }
#endif
  return Level::kBaseline;
}

Level first_level() {
  const char* cap = std::getenv("SSLKERNELS_CPU_LEVEL");
  const Level most = cap && !std::strcmp(cap, "baseline") ? Level::kBaseline
                     : cap && !std::strcmp(cap, "v3")     ? Level::kV3
                                                          : Level::kV4;
  const Level here = widest();
  return most < here ? most : here;
}

std::atomic<Level>& current() {
  static std::atomic<Level> chosen{first_level()};
  return chosen;
}

template <typename T>
const Tiles<T>& choose() {
  static constexpr Tiles<T> plain = baseline::table<T>();
#ifdef SSLKERNELS_MULTIVERSION
  static constexpr Tiles<T> wide = v3::table<T>();
  static constexpr Tiles<T> widest = v4::table<T>();
  const Level chosen = level();
  return chosen == Level::kV4 ? widest : chosen == Level::kV3 ? wide : plain;
#else
  return plain;
#endif
}

}  // namespace

Level level() { return current().load(std::memory_order_relaxed); }

void set_level(Level cap) {
  const Level here = widest();
  current().store(cap < here ? cap : here, std::memory_order_relaxed);
}

template <>
const Tiles<float>& tiles<float>() {
  return choose<float>();
}

template <>
const Tiles<double>& tiles<double>() {
  return choose<double>();
}

}  // namespace sslkernels
