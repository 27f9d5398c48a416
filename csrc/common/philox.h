// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 (Salmon et al. 2011), the generator behind every mask and every stochastic rounding: word n of stream s
// under a seed is the same on the CPU, on CUDA and in sslkernels/reference/_philox.py, whoever asks first.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace sslkernels {

struct Philox {
  uint32_t words[4];
};

// Words 4 * block to 4 * block + 3 of `stream`.
SSLKERNELS_HOST_DEVICE inline Philox philox(uint64_t seed, uint64_t stream, uint64_t block) {
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  uint32_t c[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), static_cast<uint32_t>(stream),
                   static_cast<uint32_t>(stream >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = uint64_t{0xD2511F53} * c[0], odd = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(odd >> 32) ^ c[1] ^ key[0], static_cast<uint32_t>(odd),
                              static_cast<uint32_t>(even >> 32) ^ c[3] ^ key[1], static_cast<uint32_t>(even)};
    for (int i = 0; i < 4; ++i) c[i] = next[i];
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return {{c[0], c[1], c[2], c[3]}};
}

// Uniform in [0, n), n <= 2^32: a value is off its probability by less than n / 2^32.
SSLKERNELS_HOST_DEVICE inline uint32_t below(uint32_t word, uint64_t n) {
  return static_cast<uint32_t>((word * n) >> 32);
}

// Uniform in [0, 1), a multiple of 2^-24.
SSLKERNELS_HOST_DEVICE inline float uniform(uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }

// The words of one stream, one after the other.
class Stream {
 public:
  SSLKERNELS_HOST_DEVICE Stream(uint64_t seed, uint64_t stream) : seed_(seed), stream_(stream) {}

  SSLKERNELS_HOST_DEVICE uint32_t next() {
    if (count_ % 4 == 0)
      words_ = philox(seed_, stream_, count_ / 4);
    return words_.words[count_++ % 4];
  }
  SSLKERNELS_HOST_DEVICE uint32_t below(uint64_t n) { return sslkernels::below(next(), n); }
  SSLKERNELS_HOST_DEVICE float uniform() { return sslkernels::uniform(next()); }

 private:
  uint64_t seed_, stream_, count_ = 0;
  Philox words_{};
};

}  // namespace sslkernels
