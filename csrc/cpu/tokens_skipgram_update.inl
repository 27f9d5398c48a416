// SPDX-License-Identifier: Apache-2.0
// The leaves of tokens_skipgram_update.cpp. Included once for each instruction set by multiversion.inl.

constexpr int kWidest = SSLKERNELS_LEVEL == 2 ? 64 : SSLKERNELS_LEVEL == 1 ? 32 : 16;  // bytes of a vector

constexpr i64 kAhead = 2;  // steps

template <typename T, int W>
struct Lanes {
  typedef T type __attribute__((vector_size(W * sizeof(T))));
};
template <typename T>
struct Lanes<T, 1> {
  typedef T type;
};

template <typename V, typename T>
INLINE V get(const T* p) {
  V x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}

template <typename V, typename T>
INLINE void put(T* p, const V& x) {
  __builtin_memcpy(p, &x, sizeof(x));
}

// s_n = <u, row_n>: wide vectors first; as the sums are folded in half, what is left of the rows joins in.
template <int N, int W, typename T, typename V>
INLINE void dots(const T* u, T* const* row, i64 d, i64 dim, const V* sums, T* s) {
  V sum[N];
  for (int n = 0; n < N; ++n) sum[n] = sums[n];
  for (; d + W <= dim; d += W) {
    const V x = get<V>(u + d);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[n] += x * get<V>(row[n] + d);
  }
  if constexpr (W == 1) {
    for (int n = 0; n < N; ++n) s[n] = sum[n];
  } else {
    using Half = typename Lanes<T, W / 2>::type;
    Half half[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      Half part[2];
      __builtin_memcpy(&part, &sum[n], sizeof(part));
      half[n] = part[0] + part[1];
    }
    dots<N, W / 2, T, Half>(u, row, d, dim, half, s);
  }
}

// step += sum_n g_n row_n (from zero where `first`), row_n += g_n u; where `whole`, u takes the step at once.
template <int N, int W, typename T>
INLINE void move_rows(T* u, T* const* row, i64 d, i64 dim, const T* g, bool first, bool whole, T* step) {
  using V = typename Lanes<T, W>::type;
  for (; d + W <= dim; d += W) {
    const V x = get<V>(u + d);
    V sum = first ? V{} : get<V>(step + d);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const V v = get<V>(row[n] + d);
      sum += g[n] * v;
      put(row[n] + d, v + g[n] * x);
    }
    if (whole)
      put(u + d, x + sum);
    else
      put(step + d, sum);
  }
  if constexpr (W > 1)
    move_rows<N, W / 2, T>(u, row, d, dim, g, first, whole, step);
}

template <int N, typename T>
INLINE void visit(T* u, T* const* row, i64 dim, T lr, const Step& now, T* step) {
  constexpr int W = kWidest / sizeof(T);
  using V = typename Lanes<T, W>::type;
  const V zero[N] = {};
  T s[8] = {}, g[8];
  dots<N, W, T, V>(u, row, 0, dim, zero, s);
#pragma omp simd
  for (int n = 0; n < 8; ++n) {
    const T e = exp_(s[n] > 0 ? -s[n] : s[n]);
    g[n] = -lr * (s[n] > 0 ? T(1) : e) / (1 + e);
  }
  if (now.first) {  // label 1: its own quotient, since 1 - sigmoid would cancel
    const T e = exp_(s[0] > 0 ? -s[0] : s[0]);
    g[0] = lr * (s[0] > 0 ? e : T(1)) / (1 + e);
  }
  move_rows<N, W, T>(u, row, 0, dim, g, now.first, now.first && now.last, step);
}

// Ask for a row that a later step writes: it may lie in another core's cache.
template <typename T>
INLINE void fetch(const T* row, i64 dim) {
  constexpr i64 kLine = 64 / sizeof(T);
  for (i64 d = 0; d < dim; d += kLine) __builtin_prefetch(row + d, 1);
}

// The steps one after the other: each is a context word's row against up to kRows rows, none of them twice.
template <typename T>
LEAF void train(T* input, T* output, i64 dim, const Step* steps, i64 count, T lr, T* step) {
  for (i64 i = 0; i < count; ++i) {
    const Step& now = steps[i];
    if (i + kAhead < count) {
      const Step& then = steps[i + kAhead];
      fetch(input + then.input * dim, dim);
      for (int n = 0; n < then.rows; ++n) fetch(output + then.row[n] * dim, dim);
    }
    T* u = input + now.input * dim;
    T* row[kRows];
    for (int n = 0; n < now.rows; ++n) row[n] = output + now.row[n] * dim;
    switch (now.rows) {
      case 6:
        visit<6>(u, row, dim, lr, now, step);
        break;
      case 5:
        visit<5>(u, row, dim, lr, now, step);
        break;
      case 4:
        visit<4>(u, row, dim, lr, now, step);
        break;
      case 3:
        visit<3>(u, row, dim, lr, now, step);
        break;
      case 2:
        visit<2>(u, row, dim, lr, now, step);
        break;
      default:
        visit<1>(u, row, dim, lr, now, step);
    }
    if (now.last && !now.first) {
#pragma omp simd
      for (i64 d = 0; d < dim; ++d) u[d] += step[d];
    }
  }
}

// out[4 j ..] = block `block[j]` of stream `stream[j]`, as philox.h has them; count is a multiple of 16.
LEAF void words(uint64_t seed, const uint32_t* block, const i64* stream, i64 count, uint32_t* out) {
  constexpr int kLanes = 16;
  for (i64 first = 0; first < count; first += kLanes) {
    uint32_t w[4][kLanes];
    for (int j = 0; j < kLanes; ++j) {
      w[0][j] = block[first + j];
      w[1][j] = 0;
      w[2][j] = static_cast<uint32_t>(stream[first + j]);
      w[3][j] = static_cast<uint32_t>(stream[first + j] >> 32);
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
