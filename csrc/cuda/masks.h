// SPDX-License-Identifier: Apache-2.0
// A thread block as the team of a mask's samples; see common/masks.h.
#pragma once

#include <type_traits>

#include "common/masks.h"
#include "cuda/launch.h"

namespace sslkernels {

class ThreadBlock {
 public:
  struct Shared {
    int64_t value;
    int64_t sums[32];
    int votes[32];
    unsigned histogram[256];
    unsigned digit, left, size;
  };

  __device__ explicit ThreadBlock(Shared& shared) : shared_(shared) {}

  template <typename F>
  __device__ void each(int64_t n, const F& f) const {
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) f(i);
    __syncthreads();
  }

  template <typename F>
  __device__ void each(int64_t rows, int64_t cols, const F& f) const {
    each(rows * cols, [&](int64_t i) { f(i / cols, i % cols); });
  }

  template <typename F>
  __device__ int64_t sum(int64_t n, const F& f) const {
    int64_t mine = 0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) mine += f(i);
    for (int step = 16; step > 0; step /= 2) mine += __shfl_xor_sync(kAll, mine, step);
    if (threadIdx.x % 32 == 0)
      shared_.sums[threadIdx.x / 32] = mine;
    __syncthreads();
    int64_t total = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += shared_.sums[warp];
    __syncthreads();
    return total;
  }

  template <typename F>
  __device__ int64_t sum(int64_t rows, int64_t cols, const F& f) const {
    return sum(rows * cols, [&](int64_t i) { return f(i / cols, i % cols); });
  }

  template <typename Inside, typename F>
  __device__ int64_t ranked(int64_t n, const Inside& inside, const F& f) const {
    int64_t before = 0;
    for (int64_t first = 0; first < n; first += blockDim.x) {
      const int64_t i = first + threadIdx.x;
      const bool in = i < n && inside(i);
      int all;
      const int earlier = vote(in, &all);
      if (i < n)
        f(i, in, before + earlier);
      before += all;
    }
    __syncthreads();
    return before;
  }

  template <typename Inside>
  __device__ int64_t find(int64_t n, const Inside& inside, int64_t k) const {
    for (int64_t first = 0; first < n; first += blockDim.x) {
      const int64_t i = first + threadIdx.x;
      const bool in = i < n && inside(i);
      int all;
      const int earlier = vote(in, &all);
      if (k < all) {
        if (in && earlier == k)
          shared_.value = i;
        return broadcast();
      }
      k -= all;
    }
    return n;
  }

  template <typename F>
  __device__ auto once(const F& f) const {
    if constexpr (std::is_void_v<decltype(f())>) {
      if (threadIdx.x == 0)
        f();
      __syncthreads();
    } else {
      if (threadIdx.x == 0)
        shared_.value = f();
      return broadcast();
    }
  }

  __device__ void words(const Words& source, uint64_t region, int64_t count, uint32_t* out) const {
    for (int64_t i = threadIdx.x; i < (count + 3) / 4; i += blockDim.x) {
      const Philox block = source.four(region, i);
#pragma unroll
      for (int w = 0; w < 4; ++w) out[4 * i + w] = block.words[w];
    }
    __syncthreads();
  }

  // Byte by byte from the top: how many members have each value of it, and so which value the last of `count` has.
  template <typename Member>
  __device__ uint64_t cut(int64_t n, const uint32_t* keys, const Member& member, int64_t members, int64_t count) const {
    if (count <= 0)
      return 0;
    if (count >= members)
      return ~uint64_t{0};
    uint32_t key = 0, known = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
      for (unsigned i = threadIdx.x; i < 256; i += blockDim.x) shared_.histogram[i] = 0;
      __syncthreads();
      for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
        if (((keys[i] ^ key) & known) == 0 && member(i))
          atomicAdd(&shared_.histogram[keys[i] >> shift & 255], 1u);
      }
      __syncthreads();
      choose_digit(static_cast<unsigned>(count));
      key |= shared_.digit << shift;
      known |= 255u << shift;
      count = shared_.left;
      const bool whole = shared_.left == shared_.size;
      __syncthreads();
      if (whole)  // all that have this digit belong to the smallest
        return code(key | ~known, 0xffffffff);
    }
    return code(key, find(n, [&](int64_t i) { return keys[i] == key && member(i); }, count - 1)) + 1;
  }

  // A bitonic network; what fills up the power of two sorts last.
  __device__ void sort(uint64_t* codes, int64_t n) const {
    const int64_t size = power_of_two(n);
    each(size - n, [&](int64_t i) { codes[n + i] = ~uint64_t{0}; });
    for (int64_t run = 2; run <= size; run *= 2) {
      for (int64_t step = run / 2; step > 0; step /= 2) {
        each(size / 2, [&](int64_t pair) {
          const int64_t low = (pair & ~(step - 1)) * 2 + (pair & (step - 1)), high = low + step;
          const uint64_t a = codes[low], b = codes[high];
          if ((a > b) == ((low & run) == 0)) {
            codes[low] = b;
            codes[high] = a;
          }
        });
      }
    }
  }

 private:
  static constexpr unsigned kAll = 0xffffffff;

  __device__ int64_t broadcast() const {
    __syncthreads();
    const int64_t value = shared_.value;
    __syncthreads();
    return value;
  }

  // How many threads before this one say so, and how many do in all.
  __device__ int vote(bool inside, int* all) const {
    const unsigned votes = __ballot_sync(kAll, inside), lane = threadIdx.x % 32, own = threadIdx.x / 32;
    if (lane == 0)
      shared_.votes[own] = __popc(votes);
    __syncthreads();
    int before = __popc(votes & ((1u << lane) - 1));
    *all = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) {
      const int theirs = shared_.votes[warp];
      before += warp < own ? theirs : 0;
      *all += theirs;
    }
    __syncthreads();
    return before;
  }

  // The first value of the histogram up to which `count` are reached, how many of its own that takes, and how many it
  // has.
  __device__ void choose_digit(unsigned count) const {
    if (threadIdx.x < 32) {
      unsigned sizes[8], mine = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) mine += sizes[i] = shared_.histogram[8 * threadIdx.x + i];
      unsigned until = mine;
      for (int step = 1; step < 32; step *= 2) {
        const unsigned other = __shfl_up_sync(kAll, until, step);
        until += static_cast<int>(threadIdx.x) >= step ? other : 0;
      }
      unsigned before = until - mine;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (before < count && count <= before + sizes[i]) {
          shared_.digit = 8 * threadIdx.x + i;
          shared_.left = count - before;
          shared_.size = sizes[i];
        }
        before += sizes[i];
      }
    }
    __syncthreads();
  }

  Shared& shared_;
};

template <typename Sample>
__global__ void __launch_bounds__(Sample::kThreads, 1)
    mask_kernel(const __grid_constant__ Sample sample, int64_t batch, char* scratch, int64_t bytes) {
  __shared__ ThreadBlock::Shared shared;
  const ThreadBlock team(shared);
  Arena arena(scratch ? scratch + blockIdx.x * bytes : dynamic_shared<char>());
  const auto room = sample.room(arena);
  for (int64_t b = blockIdx.x; b < batch; b += gridDim.x) sample(team, b, room);
}

// sample(team, b, room) for each of a batch, a block each. A sample too large for shared memory works in memory that as
// many blocks share as kMost allows, one after the other.
template <typename Sample>
void run_samples(const Tensor& seed, int64_t batch, const Sample& sample) {
  constexpr int64_t kShared = 48 << 10, kMost = 256 << 20;
  const Device device(seed);
  Arena measure(nullptr);
  sample.room(measure);
  const int64_t bytes = measure.used();
  const bool fits = bytes <= kShared - static_cast<int64_t>(sizeof(ThreadBlock::Shared));
  const int64_t most = fits ? kMaxGrid : std::clamp<int64_t>(kMost / bytes, 1, 4 * device.multiprocessors());
  const int64_t blocks = std::min(batch, most);
  Optional scratch;
  if (!fits)
    scratch = empty_like(seed, {blocks * bytes}, ScalarType::Byte);
  device.launch(&mask_kernel<Sample>, static_cast<unsigned>(blocks), Sample::kThreads, fits ? bytes : 0, sample, batch,
                fits ? nullptr : static_cast<char*>(scratch->mutable_data_ptr()), bytes);
}

}  // namespace sslkernels
