// SPDX-License-Identifier: Apache-2.0
// Logits of a linear layer with many outputs, by strips of the layer that a thread owns: what the losses over such a
// layer share.
#pragma once

#include <atomic>

#include "cpu/denormals.h"
#include "cpu/operand.h"

namespace sslkernels {

// A softmax over part of a row, against the largest element so far.
struct Partial {
  double max = kNone<double>, sum = 0;

  // The largest element of what comes next; the factor that what has been summed must be multiplied with
  double raise(double top) {
    if (!(top > max))
      return 1;
    const double factor = max == kNone<double> ? 1 : std::exp(max - top);
    max = top;
    sum *= factor;
    return factor;
  }
};

// f on the parts of [0, n) before and behind `hole`, which may lie outside
template <typename F>
void around(i64 hole, i64 n, const F& f) {
  if (hole < 0 || hole >= n)
    return f(0, n);
  f(0, hole);
  f(hole + 1, n - hole - 1);
}

// out (+)= a b, through `scratch` if it is added
template <typename T>
void accumulate(const View<T>& out, const View<T>& a, const View<T>& b, bool more, T* scratch) {
  const i64 n = out.rows * out.cols;
  multiply<T>({more ? scratch : out.data, out.rows, out.cols, out.cols, 1}, a, b);
  if (more)
    tiles<T>().add(const_cast<T*>(out.data), n, scratch, n, 1, n);
}

struct Strip : Range {
  i64 number;
};

// Even strips of a (width, depth) layer, at most `most` wide, of which each thread owns as many, and for each thread a
// sum of `summed` rows of products with its own.
template <typename T>
class Strips {
 public:
  Strips(i64 width, i64 depth, i64 threads, i64 most, i64 summed)
      : depth(depth),
        threads(threads),
        count(threads * ((width + threads * most - 1) / (threads * most))),
        widest(((width + 15) / 16 + count - 1) / count * 16),
        width_(width),
        summed_(summed),
        columns_(std::clamp<i64>((summed * depth + kProduct - 1) / kProduct, 1, std::max<i64>(1, depth / kColumns))),
        part_(summed * (depth + (depth + 15) / 16 / columns_ * 16 + 16)),
        layers_(threads * widest * depth),
        parts_(threads * part_) {}

  // f(thread, strip), each thread on its own strips in order
  template <typename F>
  void over(const F& f) const {
    run(threads, [&](i64 t) {
      const NoDenormals here;
      for (i64 k = count / threads * t; k < count / threads * (t + 1); ++k) visit(t, k, f);
    });
  }

  // The same, but a thread takes the next strip as it comes: for what is the same whoever does it.
  template <typename F>
  void over_any(const F& f) const {
    std::atomic<i64> next{0};
    run(threads, [&](i64 t) {
      const NoDenormals here;
      for (i64 k = next++; k < count; k = next++) visit(t, k, f);
    });
  }

  // Room for a strip of the layer, which layer() uses where BLAS cannot read the weight as it is.
  T* room(i64 t) const { return layers_ + t * widest * depth; }
  View<T> layer(const Operand<T>& weight, i64 t, Range some) const {
    i64 ld;
    const T* x = weight.fetch(some.begin, some.size(), room(t), &ld);
    return {x, some.size(), depth, ld, 1};
  }

  void forget_sums() { started_.assign(threads, false); }
  bool has_sum(i64 t) const { return started_[t]; }
  T* sum(i64 t) const { return parts_ + t * part_; }

  // adds a times layer to the first a.rows rows of the thread's sum
  void add_product(i64 t, const View<T>& a, const View<T>& layer) {
    T *out = sum(t), *product = out + summed_ * depth;
    for (i64 k = 0; k < columns_; ++k) {
      const Range some = part(0, depth, k, columns_);
      const i64 n = some.size();
      const View<T> own{layer.data + some.begin, layer.rows, n, layer.row_stride, 1};
      if (started_[t]) {
        multiply<T>({product, a.rows, n, n, 1}, a, own);
        tiles<T>().add(out + some.begin, depth, product, n, a.rows, n);
      } else {
        multiply<T>({out + some.begin, a.rows, n, depth, 1}, a, own);
      }
    }
    started_[t] = true;
  }

  const i64 depth, threads, count, widest;

 private:
  static constexpr i64 kProduct = i64(5) << 15;  // elements of a product, which waits in the cache to be added
  static constexpr i64 kColumns = 384;           // that are worth a product of their own

  template <typename F>
  void visit(i64 t, i64 k, const F& f) const {
    const Strip strip{part(0, width_, k, count), k};
    if (strip.size() > 0)
      f(t, strip);
  }

  const i64 width_, summed_, columns_, part_;  // columns_: parts that a product with the layer is made in
  Buffer<T> layers_, parts_;
  std::vector<char> started_;
};

}  // namespace sslkernels
