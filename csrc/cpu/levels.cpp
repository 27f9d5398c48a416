// SPDX-License-Identifier: Apache-2.0
#include "cpu/levels.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace sslkernels {

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

}  // namespace

Level level() { return current().load(std::memory_order_relaxed); }

void set_level(Level cap) {
  const Level here = widest();
  current().store(cap < here ? cap : here, std::memory_order_relaxed);
}

}  // namespace sslkernels
