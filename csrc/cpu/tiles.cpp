// SPDX-License-Identifier: Apache-2.0
#include "cpu/tiles.h"

#include <limits>

#define SSLKERNELS_LEAVES "cpu/tiles.inl"
#include "cpu/multiversion.inl"

namespace sslkernels {

namespace {

template <typename T>
const Tiles<T>& choose() {
  static constexpr Tiles<T> plain = baseline::table<T>(), wide = v3::table<T>(), widest = v4::table<T>();
  const Level chosen = level();
  return chosen == Level::kV4 ? widest : chosen == Level::kV3 ? wide : plain;
}

}  // namespace

template <>
const Tiles<float>& tiles<float>() {
  return choose<float>();
}

template <>
const Tiles<double>& tiles<double>() {
  return choose<double>();
}

}  // namespace sslkernels
