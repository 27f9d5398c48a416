// SPDX-License-Identifier: Apache-2.0
// How a list of tensors becomes the thread blocks of a few kernel launches. Host arithmetic, free of CUDA and torch.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/grid.h"
#include "common/host_device.h"

namespace sslkernels {

constexpr int64_t kChunk = 4096;  // elements of one tensor that one block updates

inline int64_t blocks_for(int64_t numel) { return numel / kChunk + (numel % kChunk != 0); }

// Tensors [begin, end) of the list share a launch of `blocks` blocks.
struct Launch {
  size_t begin;
  size_t end;
  int64_t blocks;
};

// As few launches as hold at most `capacity` tensors and kMaxGrid blocks each. An empty tensor has no block.
inline std::vector<Launch> plan_launches(const std::vector<int64_t>& numels, size_t capacity) {
  std::vector<Launch> launches;
  for (size_t i = 0; i < numels.size(); ++i) {
    const int64_t blocks = blocks_for(numels[i]);
    if (blocks > kMaxGrid) {
      throw std::length_error("a tensor needs more thread blocks than one launch has");
    }
    const bool full =
        launches.empty() || i - launches.back().begin == capacity || launches.back().blocks + blocks > kMaxGrid;
    if (full) {
      launches.push_back({i, i, 0});
    }
    launches.back().end = i + 1;
    launches.back().blocks += blocks;
  }
  return launches;
}

// The tensor that `block` works on: the last i < count with first_block[i] <= block (first_block ascends from 0; an
// empty tensor starts where the next one does).
SSLKERNELS_HOST_DEVICE inline int find_tensor(const uint32_t* first_block, int count, uint32_t block) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Whether the elements fill one gapless stretch of memory, each in a place of its own, in whatever order of dimensions.
inline bool is_dense(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // (stride, size)
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) {
      return true;
    }
    if (sizes[d] != 1) {
      dimensions.emplace_back(strides[d], sizes[d]);
    }
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dimensions) {
    if (stride != expected) {
      return false;
    }
    expected *= size;
  }
  return true;
}

}  // namespace sslkernels
