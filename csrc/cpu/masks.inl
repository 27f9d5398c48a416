// SPDX-License-Identifier: Apache-2.0
// Leaf functions of the masks, compiled once for each instruction set: no include, no namespace (see multiversion.inl).

// Philox of csrc/common/philox.h, sixteen blocks at a time.
LEAF void words(uint64_t seed, uint64_t stream, uint32_t region, i64 blocks, uint32_t* out) {
  constexpr int kLanes = 16;
  for (i64 first = 0; first < blocks; first += kLanes) {
    uint32_t w[4][kLanes];
    for (int j = 0; j < kLanes; ++j) {
      w[0][j] = static_cast<uint32_t>(first) + j;
      w[1][j] = region;
      w[2][j] = static_cast<uint32_t>(stream);
      w[3][j] = static_cast<uint32_t>(stream >> 32);
    }
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9, key1 += 0xBB67AE85) {
#pragma omp simd
      for (int j = 0; j < kLanes; ++j) {
        const uint64_t even = uint64_t{0xD2511F53} * w[0][j], odd = uint64_t{0xCD9E8D57} * w[2][j];
        w[0][j] = static_cast<uint32_t>(odd >> 32) ^ w[1][j] ^ key0;
        w[1][j] = static_cast<uint32_t>(odd);
        w[2][j] = static_cast<uint32_t>(even >> 32) ^ w[3][j] ^ key1;
        w[3][j] = static_cast<uint32_t>(even);
      }
    }
    for (int j = 0; j < kLanes; ++j)
      for (int i = 0; i < 4; ++i) out[4 * (first + j) + i] = w[i][j];
  }
}
