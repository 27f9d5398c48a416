// SPDX-License-Identifier: Apache-2.0
// Passes over the columns of a matrix: what a whole column says is found first, then each of its elements is changed.
//
// A block owns a strip of columns, 128 bytes of a row, and reads the rows of its part; neighbours in a warp read
// neighbouring columns. Where strips alone fill the device, one launch does both and finds the strip in the cache the
// second time; else parts of the rows are measured by a first launch, and merged by every block of a second one.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/scalars.h"

namespace sslkernels {

constexpr int kWarp = 32;
constexpr int kLanes = 16;    // rows that a block works on at once: warps
constexpr int kInFlight = 8;  // rows that a thread reads before it uses them

template <typename T>
constexpr int kCols = sizeof(T) == 2 ? 2 : 1;  // of a thread

// A matrix of any strides; `dense`: kCols neighbours lie together and aligned.
template <typename T>
struct Matrix {
  const T* data;
  int64_t row_stride, col_stride;
  bool dense;

  __device__ void load(int64_t row, int64_t col, int64_t cols, Vector<T, kCols<T>>& out) const {
    const T* at = data + row * row_stride + col * col_stride;
    if (dense && col + kCols<T> <= cols) {
      out = *reinterpret_cast<const Vector<T, kCols<T>>*>(at);
      return;
    }
#pragma unroll
    for (int c = 0; c < kCols<T>; ++c) out.values[c] = col + c < cols ? at[c * col_stride] : narrow<T>(0.0f);
  }
};

template <typename T>
__device__ inline void store(T* out, int64_t row, int64_t col, int64_t cols, const Vector<T, kCols<T>>& x) {
  T* at = out + row * cols + col;
  if (cols % kCols<T> == 0) {
    *reinterpret_cast<Vector<T, kCols<T>>*>(at) = x;
    return;
  }
#pragma unroll
  for (int c = 0; c < kCols<T>; ++c) {
    if (col + c < cols)
      at[c] = x.values[c];
  }
}

// 1 / n for a count: Newton's iteration doubles the digits of the fast one, where a division would call a function.
__device__ inline double reciprocal(double n) {
  double r = __fdividef(1.0f, static_cast<float>(n));
  r *= 2.0 - n * r;
  return r * (2.0 - n * r);
}

// Mean and sum of squared distances from it of `n` elements (Chan, Golub and LeVeque 1979).
struct Spread {
  double n = 0, mean = 0, squares = 0;

  __device__ void merge(const Spread& other) {
    if (n == 0 || other.n == 0) {
      *this = n == 0 ? other : *this;
      return;
    }
    const double total = n + other.n, away = other.mean - mean, part = other.n * reciprocal(total);
    mean += away * part;
    squares += other.squares + away * away * n * part;
    n = total;
  }
};

// Sums over a column.
struct Sums {
  double gradient = 0, product = 0;

  __device__ void merge(const Sums& other) {
    gradient += other.gradient;
    product += other.product;
  }
};

// z = (x - mean) / sqrt(variance + eps), and the mean, what its rounding left, and 1 / sqrt(variance + eps) as moments.
template <typename T>
struct Standardize {
  using Element = T;
  using Real = Wide<T>;
  using Found = Spread;

  Matrix<T> x;
  int64_t rows, cols;
  double eps, degrees;  // of freedom of the variance
  Real* moments;        // (3, cols)
  T* out;

  struct Factors {
    Real mean, rest, inverse;
  };

  // What rows [first, first + count) of a column and its neighbour say, count <= kInFlight.
  __device__ void measure(int64_t first, int count, int64_t col, Found (&found)[kCols<T>]) const {
    Vector<T, kCols<T>> block[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) x.load(first + (i < count ? i : 0), col, cols, block[i]);
#pragma unroll
    for (int c = 0; c < kCols<T>; ++c) {
      // distances from one of them are exact where they are small
      const Real origin = widen(block[0].values[c]);
      Real sum = 0, squares = 0;
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) sum += i < count ? widen(block[i].values[c]) - origin : Real(0);
      const Real mean = sum * static_cast<Real>(reciprocal(count));
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const Real away = i < count ? widen(block[i].values[c]) - origin - mean : Real(0);
        squares += away * away;
      }
      found[c].merge({static_cast<double>(count), static_cast<double>(origin) + mean, squares});
    }
  }

  __device__ Factors factors(int64_t col, const Found& found, bool write) const {
    const Real mean = static_cast<Real>(found.mean), rest = static_cast<Real>(found.mean - mean);
    const Real inverse = Real(1) / sqrt(static_cast<Real>(found.squares * reciprocal(degrees) + eps));
    if (write && col < cols) {
      moments[col] = mean;
      moments[cols + col] = rest;
      moments[2 * cols + col] = inverse;
    }
    return {mean, rest, inverse};
  }

  __device__ void change(int64_t first, int count, int64_t col, const Factors (&factors)[kCols<T>]) const {
    Vector<T, kCols<T>> block[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) x.load(first + (i < count ? i : 0), col, cols, block[i]);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
#pragma unroll
      for (int c = 0; c < kCols<T>; ++c) {
        const Factors& f = factors[c];
        block[i].values[c] = narrow<T>((widen(block[i].values[c]) - f.mean - f.rest) * f.inverse);
      }
      if (i < count)
        store(out, first + i, col, cols, block[i]);
    }
  }
};

// dx = (g - mean(g) - z sum(g z) / degrees) / sqrt(variance + eps), for the gradient g of z.
template <typename T>
struct StandardizeBackward {
  using Element = T;
  using Real = Wide<T>;
  using Found = Sums;

  Matrix<T> grad, x;
  int64_t rows, cols;
  double degrees;
  const Real* moments;
  T* out;

  struct Factors {
    Real mean, rest, inverse, gradient, along;
  };

  __device__ Factors unit(int64_t col) const {
    if (col >= cols)
      return {};
    return {moments[col], moments[cols + col], moments[2 * cols + col], Real(0), Real(0)};
  }

  __device__ void load(int64_t first, int count, int64_t col, Vector<T, kCols<T>> (&g)[kInFlight],
                       Vector<T, kCols<T>> (&v)[kInFlight]) const {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      grad.load(first + (i < count ? i : 0), col, cols, g[i]);
      x.load(first + (i < count ? i : 0), col, cols, v[i]);
    }
  }

  __device__ void measure(int64_t first, int count, int64_t col, Found (&found)[kCols<T>]) const {
    Vector<T, kCols<T>> g[kInFlight], v[kInFlight];
    load(first, count, col, g, v);
#pragma unroll
    for (int c = 0; c < kCols<T>; ++c) {
      const Factors f = unit(col + c);
      Real sum = 0, product = 0;
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const Real gradient = i < count ? widen(g[i].values[c]) : Real(0);
        sum += gradient;
        product += i < count ? gradient * ((widen(v[i].values[c]) - f.mean - f.rest) * f.inverse) : Real(0);
      }
      found[c].merge({static_cast<double>(sum), static_cast<double>(product)});
    }
  }

  __device__ Factors factors(int64_t col, const Found& found, bool) const {
    Factors f = unit(col);
    f.gradient = static_cast<Real>(found.gradient * reciprocal(rows));
    f.along = static_cast<Real>(found.product * reciprocal(degrees));
    return f;
  }

  __device__ void change(int64_t first, int count, int64_t col, const Factors (&factors)[kCols<T>]) const {
    Vector<T, kCols<T>> g[kInFlight], v[kInFlight];
    load(first, count, col, g, v);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
#pragma unroll
      for (int c = 0; c < kCols<T>; ++c) {
        const Factors& f = factors[c];
        const Real z = (widen(v[i].values[c]) - f.mean - f.rest) * f.inverse;
        v[i].values[c] = narrow<T>((widen(g[i].values[c]) - f.gradient - z * f.along) * f.inverse);
      }
      if (i < count)
        store(out, first + i, col, cols, v[i]);
    }
  }
};

template <typename Pass>
constexpr int kStrip = kWarp * kCols<typename Pass::Element>;

// f(first row, how many) for this warp's share of rows [begin, end)
template <typename F>
__device__ inline void over_rows(int64_t begin, int64_t end, const F& f) {
  for (int64_t row = begin + (threadIdx.x / kWarp) * kInFlight; row < end; row += kLanes * kInFlight) {
    f(row, static_cast<int>(end - row < kInFlight ? end - row : kInFlight));
  }
}

template <typename Pass>
__device__ inline void measure_rows(const Pass& pass, int64_t begin, int64_t end, int64_t col,
                                    typename Pass::Found (&found)[kCols<typename Pass::Element>]) {
  if (col < pass.cols)
    over_rows(begin, end, [&](int64_t row, int count) { pass.measure(row, count, col, found); });
}

// What the warps of a block found, merged in their order: in every thread, of its columns.
template <typename Pass>
__device__ inline void merge_warps(typename Pass::Found (&found)[kCols<typename Pass::Element>]) {
  using Found = typename Pass::Found;
  constexpr int kOwn = kCols<typename Pass::Element>;
  __shared__ double memory[kLanes * kStrip<Pass> * sizeof(Found) / sizeof(double)];
  auto* all = reinterpret_cast<Found(*)[kStrip<Pass>]>(memory);
  const int mine = threadIdx.x % kWarp * kOwn;
#pragma unroll
  for (int c = 0; c < kOwn; ++c) all[threadIdx.x / kWarp][mine + c] = found[c];
  __syncthreads();
  for (int col = threadIdx.x; col < kStrip<Pass>; col += kLanes * kWarp) {
    Found merged = all[0][col];
    for (int lane = 1; lane < kLanes; ++lane) merged.merge(all[lane][col]);
    all[0][col] = merged;
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kOwn; ++c) found[c] = all[0][mine + c];
}

// What part blockIdx.y of the rows says, into row blockIdx.y of `parts`, (gridDim.y, cols).
template <typename Pass>
__global__ void __launch_bounds__(kLanes* kWarp, 1)
    measure_kernel(const __grid_constant__ Pass pass, int64_t rows_of_part, typename Pass::Found* parts) {
  constexpr int kOwn = kCols<typename Pass::Element>;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kStrip<Pass> + threadIdx.x % kWarp * kOwn;
  const int64_t begin = blockIdx.y * rows_of_part, end = begin + rows_of_part;
  typename Pass::Found found[kOwn];
  measure_rows(pass, begin, end < pass.rows ? end : pass.rows, col, found);
  merge_warps<Pass>(found);
  for (int c = 0; threadIdx.x < kWarp && c < kOwn && col + c < pass.cols; ++c) {
    parts[blockIdx.y * pass.cols + col + c] = found[c];
  }
}

// Changes the rows of part blockIdx.y; without `parts` there is one, which is measured here.
template <typename Pass>
__global__ void __launch_bounds__(kLanes* kWarp, 1)
    change_kernel(const __grid_constant__ Pass pass, int64_t rows_of_part, const typename Pass::Found* parts) {
  constexpr int kOwn = kCols<typename Pass::Element>;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kStrip<Pass> + threadIdx.x % kWarp * kOwn;
  const int64_t begin = blockIdx.y * rows_of_part, end = begin + rows_of_part;
  const int64_t last = end < pass.rows ? end : pass.rows;
  typename Pass::Found found[kOwn];
  if (parts) {
    for (int64_t part = threadIdx.x / kWarp; part < gridDim.y; part += kLanes) {
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        if (col + c < pass.cols)
          found[c].merge(parts[part * pass.cols + col + c]);
      }
    }
  } else {
    measure_rows(pass, begin, last, col, found);
  }
  merge_warps<Pass>(found);
  if (col >= pass.cols)
    return;
  typename Pass::Factors factors[kOwn];
#pragma unroll
  for (int c = 0; c < kOwn; ++c) factors[c] = pass.factors(col + c, found[c], blockIdx.y == 0 && threadIdx.x < kWarp);
  over_rows(begin, last, [&](int64_t row, int count) { pass.change(row, count, col, factors); });
}

}  // namespace sslkernels
