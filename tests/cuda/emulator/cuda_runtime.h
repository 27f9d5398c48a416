// SPDX-License-Identifier: Apache-2.0
// CUDA as the kernels of csrc/cuda use it, on the CPU: blocks one after another, the threads of a block as fibers that
// change hands at barriers and shuffles, in an order that is drawn anew each time. Slow and exact: what it computes, a
// GPU computes, and what threads of a block leave to chance shows; races between blocks do not.
// Shared memory is poisoned for every block, and a write beside a tensor of an op's own ends the process.
#pragma once

#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local  // so that they lie together, see poison_shared()
#define STD_CUDA_CHECK(call) ((void)(call))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
inline int warpSize = 32;  // no constant for a compiler there either

namespace emulator {

constexpr size_t kStack = 128 << 10;

// makecontext() starts a fiber; from then on it goes by _setjmp, which makes no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf resumed;
  char* stack = nullptr;
  bool alive = false, started = false;
};

// Who waits at a barrier, and how often it has opened.
struct Barrier {
  int waiting = 0;
  unsigned opened = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  std::vector<int> alive;  // threads of each warp that have not returned
  Barrier all;
  int running = 0, current = 0;
  std::vector<uint64_t> exchange;
  std::vector<char> shared;
  std::vector<int> order;   // in which threads run
  std::minstd_rand random;  // of a fixed seed: a failure comes again
  jmp_buf scheduler;
  const std::function<void()>* body = nullptr;
};

inline Block block;

inline void yield() {
  if (_setjmp(block.fibers[block.current].resumed) == 0)
    _longjmp(block.scheduler, 1);
}

inline void resume(Fiber& fiber) {
  if (_setjmp(block.scheduler) != 0)
    return;
  if (fiber.started)
    _longjmp(fiber.resumed, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

// A returned thread no longer counts, as in hardware.
inline void open_if_full(Barrier& barrier, int expected) {
  if (barrier.waiting > 0 && barrier.waiting >= expected) {
    barrier.waiting = 0;
    ++barrier.opened;
  }
}

inline void wait(Barrier& barrier, const int& expected) {
  const unsigned before = barrier.opened;
  ++barrier.waiting;
  open_if_full(barrier, expected);
  while (barrier.opened == before) yield();
}

inline void enter() {
  (*block.body)();
  const int warp = block.current / warpSize;
  block.fibers[block.current].alive = false;
  open_if_full(block.all, --block.running);
  open_if_full(block.warps[warp], --block.alive[warp]);
  yield();
}

inline unsigned progress() {
  unsigned sum = block.all.opened;
  for (const Barrier& warp : block.warps) sum += warp.opened;
  return sum;
}

inline void run_block(int threads) {
  block.running = threads;
  block.all = {};
  block.warps.assign((threads + warpSize - 1) / warpSize, {});
  block.alive.assign(block.warps.size(), warpSize);
  block.alive.back() = threads - (static_cast<int>(block.warps.size()) - 1) * warpSize;
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = block.fibers[t];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    fiber.alive = true;
    fiber.started = false;
  }
  block.order.resize(threads);
  std::iota(block.order.begin(), block.order.end(), 0);
  while (block.running > 0) {
    const unsigned opened = progress();
    const int running = block.running;
    for (int i = threads - 1; i > 0; --i)
      std::swap(block.order[i], block.order[block.random() % static_cast<unsigned>(i + 1)]);
    for (int t : block.order) {
      if (!block.fibers[t].alive)
        continue;
      block.current = t;
      threadIdx = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y));
      resume(block.fibers[t]);
    }
    if (block.running > 0 && block.running == running && progress() == opened) {
      std::fprintf(stderr, "emulator: threads wait at different barriers\n");
      std::abort();
    }
  }
}

// The library's thread-local variables are its static shared memory.
inline thread_local char one_of_them;

inline void poison_shared() {
  static char* begin = nullptr;
  static size_t size = 0;
  one_of_them = 0;
  if (&one_of_them < begin || &one_of_them >= begin + size) {
    const auto find = [](dl_phdr_info* library, size_t, void*) {
      char* memory = static_cast<char*>(library->dlpi_tls_data);
      for (int i = 0; i < library->dlpi_phnum && memory; ++i) {
        const auto& part = library->dlpi_phdr[i];
        if (part.p_type == PT_TLS && memory <= &one_of_them && &one_of_them < memory + part.p_memsz) {
          begin = memory;
          size = part.p_memsz;
        }
      }
      return 0;
    };
    dl_iterate_phdr(find, nullptr);
  }
  std::memset(begin, 0x7f, size);
}

// Memory of an op's own, between canaries and before a page that cannot be touched. What nobody writes is NaN, or -1.
struct Allocation {
  unsigned char *base, *data, *end;  // of the canary before it, of itself, and of the canary behind it
  size_t bytes;
};

constexpr size_t kPage = 4096;
constexpr unsigned char kCanary = 0x5c;
inline std::vector<Allocation> allocations;

inline void check_canaries(const Allocation& x) {
  for (const unsigned char* at = x.base; at < x.end; ++at) {
    if ((at < x.data || at >= x.data + x.bytes) && *at != kCanary) {
      std::fprintf(stderr, "emulator: a write beside a tensor of %zu bytes, at byte %td\n", x.bytes, at - x.data);
      std::abort();
    }
  }
}

inline void* allocate(size_t bytes) {
  const size_t room = (bytes + 15) / 16 * 16, size = (room + 64 + kPage - 1) / kPage * kPage;
  void* memory = mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  auto* base = static_cast<unsigned char*>(memory);
  mprotect(base + size, kPage, PROT_NONE);
  std::memset(base, kCanary, size);
  std::memset(base + size - room, 0xff, bytes);
  allocations.push_back({base, base + size - room, base + size, bytes});
  return allocations.back().data;
}

inline void release(void* data) {
  for (size_t i = 0; i < allocations.size(); ++i) {
    const Allocation found = allocations[i];
    if (found.data == data) {
      check_canaries(found);
      allocations.erase(allocations.begin() + i);
      munmap(found.base, found.end - found.base + kPage);
      return;
    }
  }
}

inline void run(dim3 blocks, int threads, size_t shared, const std::function<void()>& body) {
  while (static_cast<int>(block.fibers.size()) < threads) {
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    block.fibers.emplace_back().stack = static_cast<char*>(stack);
  }
  block.exchange.resize(threads);
  block.body = &body;
  gridDim = blocks;
  blockDim = dim3(threads);
  for (unsigned z = 0; z < blocks.z; ++z)
    for (unsigned y = 0; y < blocks.y; ++y)
      for (unsigned x = 0; x < blocks.x; ++x) {
        blockIdx = dim3(x, y, z);
        poison_shared();
        block.shared.assign(shared, static_cast<char>(0x7f));  // what nobody wrote shows
        run_block(threads);
      }
  for (const Allocation& x : allocations) check_canaries(x);
}

// What `lane`(mine) of this warp holds; a lane outside the warp or not running gives one's own value, as CUDA does.
template <typename T, typename F>
T shuffle(T value, const F& lane) {
  static_assert(sizeof(T) <= 8);
  const int me = block.current, warp = me / warpSize, mine = me % warpSize, other = lane(mine);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  block.exchange[me] = bits;
  wait(block.warps[warp], block.alive[warp]);
  const size_t from = static_cast<size_t>(warp) * warpSize + other;
  const bool there = other >= 0 && other < warpSize && from < block.exchange.size() && block.fibers[from].alive;
  const uint64_t theirs = there ? block.exchange[from] : bits;
  wait(block.warps[warp], block.alive[warp]);
  std::memcpy(&value, &theirs, sizeof(T));
  return value;
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::block.all, emulator::block.running); }

inline void __syncwarp(unsigned = 0xffffffffu) {
  const int warp = emulator::block.current / warpSize;
  emulator::wait(emulator::block.warps[warp], emulator::block.alive[warp]);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::shuffle(value, [=](int lane) { return lane ^ mask; });
}
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned delta) {
  return emulator::shuffle(value, [=](int lane) { return lane + static_cast<int>(delta); });
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned delta) {
  return emulator::shuffle(value, [=](int lane) { return lane - static_cast<int>(delta); });
}

inline unsigned __ballot_sync(unsigned, int predicate) {
  using emulator::block;
  const int me = block.current, warp = me / warpSize;
  block.exchange[me] = predicate != 0;
  emulator::wait(block.warps[warp], block.alive[warp]);
  unsigned bits = 0;
  for (int lane = 0; lane < warpSize; ++lane) {
    const size_t from = static_cast<size_t>(warp) * warpSize + lane;
    if (from < block.exchange.size() && block.fibers[from].alive && block.exchange[from])
      bits |= 1u << lane;
  }
  emulator::wait(block.warps[warp], block.alive[warp]);
  return bits;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <typename T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
