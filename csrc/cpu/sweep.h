// SPDX-License-Identifier: Apache-2.0
// What every sweep over the pairs of two feature matrices shares: strided operands of any dtype, products through
// torch's own BLAS, threads that own column strips of a row panel, exclusion rules, and gradient accumulation.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/tiles.h"

namespace sslkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
constexpr ScalarType kScalar = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

template <typename T>
constexpr T kNone = -std::numeric_limits<T>::infinity();

inline Tensor empty(std::vector<i64> sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

template <typename T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Scratch memory from torch's allocator.
template <typename T>
class Buffer {
 public:
  explicit Buffer(i64 n) : tensor_(empty({n}, kScalar<T>)), data_(data<T>(tensor_)) {}
  operator T*() const { return data_; }

 private:
  Tensor tensor_;
  T* data_;
};

// Rows of a feature tensor, whatever its dtype and strides.
template <typename T>
class Operand {
 public:
  explicit Operand(const Tensor& x)
      : data_(static_cast<const char*>(x.const_data_ptr())),
        rows(x.size(0)),
        cols(x.size(1)),
        row_stride_(x.stride(0)),
        col_stride_(x.stride(1)),
        bytes_(static_cast<i64>(x.element_size())),
        dtype_(kind(x.scalar_type())),
        direct_(x.scalar_type() == kScalar<T> && (col_stride_ == 1 || cols == 1) && row_stride_ >= cols) {}

  // Rows [first, first + count): where they lie if BLAS can read them there, else converted into `scratch`.
  const T* fetch(i64 first, i64 count, T* scratch, i64* ld) const {
    *ld = direct_ ? row_stride_ : cols;
    if (direct_) return reinterpret_cast<const T*>(data_) + first * row_stride_;
    load(first, count, scratch, T(1));
    return scratch;
  }

  void load(i64 first, i64 count, T* dst, T factor) const {
    tiles<T>().load(data_ + first * row_stride_ * bytes_, dtype_, row_stride_, col_stride_, dst, count, cols, factor);
  }

 private:
  static Dtype kind(ScalarType dtype) {
    switch (dtype) {
      case ScalarType::Float: return Dtype::kFloat;
      case ScalarType::Double: return Dtype::kDouble;
      case ScalarType::BFloat16: return Dtype::kBFloat16;
      case ScalarType::Half: return Dtype::kHalf;
      default: STD_TORCH_CHECK(false, "features must be float32, float64, bfloat16 or float16");
    }
  }

  const char* data_;

 public:
  const i64 rows, cols;

 private:
  i64 row_stride_, col_stride_, bytes_;
  Dtype dtype_;
  bool direct_;
};

// out = a b by torch's BLAS. A view is (pointer, rows, cols, row stride, column stride).
template <typename T>
struct View {
  const T* data;
  i64 rows, cols, row_stride, col_stride;
  View transposed() const { return {data, cols, rows, col_stride, row_stride}; }
};

template <typename T>
Tensor as_tensor(const View<T>& v) {
  const i64 sizes[2] = {v.rows, v.cols}, strides[2] = {v.row_stride, v.col_stride};
  return torch::stable::from_blob(const_cast<T*>(v.data), {sizes, 2}, {strides, 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), kScalar<T>);
}

template <typename T>
void multiply(const View<T>& out, const View<T>& a, const View<T>& b) {
  StableIValue stack[3] = {torch::stable::detail::from(as_tensor(a)), torch::stable::detail::from(as_tensor(b)),
                           torch::stable::detail::from(as_tensor(out))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// f(t) for t in [0, count), one call a thread; inline where count is one or a parallel region is already open.
template <typename F>
void run(i64 count, const F& f) {
  if (count == 1) return f(0);
  torch::stable::parallel_for(0, count, 1, [&](i64 begin, i64 end) {
    for (i64 t = begin; t < end; ++t) f(t);
  });
}

struct Range {
  i64 begin, end;
  i64 size() const { return end - begin; }
};

// Part t of `count` parts of [begin, end), as even as multiples of 16 allow.
inline Range part(i64 begin, i64 end, i64 t, i64 count) {
  const i64 blocks = (end - begin + 15) / 16;
  return {std::min(end, begin + blocks * t / count * 16), std::min(end, begin + blocks * (t + 1) / count * 16)};
}

inline i64 useful_threads(double flops) {
  constexpr double kFlopsWorthAThread = 4e6;
  return std::clamp<i64>(static_cast<i64>(flops / kFlopsWorthAThread), 1, torch::stable::get_num_threads());
}

// The pairs left out, as `Exclude` in sslkernels/reference/contrastive.py says.
class Exclusion {
 public:
  Exclusion(std::optional<i64> diagonal, std::optional<i64> period, const std::optional<Tensor>& row_groups,
            const std::optional<Tensor>& col_groups, const std::optional<Tensor>& keep, bool differ, bool self)
      : diagonal_(diagonal), period_(period.value_or(0)), differ_(differ), self_(self) {
    if (row_groups) rank_groups(torch::stable::contiguous(*row_groups), torch::stable::contiguous(*col_groups));
    if (keep) {
      keep_tensor_ = torch::stable::contiguous(*keep);
      keep_ = static_cast<const uint8_t*>(keep_tensor_->const_data_ptr());
    }
  }

  // Whether the groups leave out every pair of the tile, so that it need not be computed.
  bool leaves_nothing(Range rows, Range cols) const {
    if (row_group_.empty()) return false;
    const auto [row_low, row_high] = bounds(row_group_, rows);
    const auto [col_low, col_high] = bounds(col_group_, cols);
    if (differ_) return row_high < col_low || col_high < row_low;
    return row_low == row_high && col_low == col_high && row_low == col_low;
  }

  bool sparse() const { return differ_ && !row_group_.empty(); }

  template <typename T>
  void apply(T* s, i64 ld, Range rows, Range cols) const {
    if (diagonal_) {
      for (i64 i = rows.begin; i < rows.end; ++i) {
        i64 j = i + *diagonal_;
        i64 step = cols.size();
        if (period_) {
          step = period_;
          j = cols.begin + (((j - cols.begin) % period_) + period_) % period_;
        }
        if (j < cols.begin) continue;
        for (; j < cols.end; j += step) {
          s[(i - rows.begin) * ld + j - cols.begin] = kNone<T>;
          if (!period_) break;
        }
      }
    }
    if (!row_group_.empty()) {
      tiles<T>().exclude_groups(s, ld, rows.size(), cols.size(), row_group_.data() + rows.begin,
                                col_group_.data() + cols.begin, differ_);
    }
    if (keep_) {
      tiles<T>().exclude_columns(s, ld, rows.size(), cols.size(), keep_ + cols.begin);
      for (i64 i = rows.begin; self_ && i < rows.end; ++i) {
        if (!keep_[i]) std::fill_n(s + (i - rows.begin) * ld, cols.size(), kNone<T>);
      }
    }
  }

 private:
  static std::pair<int32_t, int32_t> bounds(const std::vector<int32_t>& groups, Range r) {
    const auto [low, high] = std::minmax_element(groups.begin() + r.begin, groups.begin() + r.end);
    return {*low, *high};
  }

  // Groups are compared as 32-bit numbers, twice as many at a time: offsets from the smallest, or ranks if too wide.
  void rank_groups(const Tensor& rows, const Tensor& cols) {
    const i64* sides[2] = {static_cast<const i64*>(rows.const_data_ptr()),
                           static_cast<const i64*>(cols.const_data_ptr())};
    const i64 sizes[2] = {rows.numel(), cols.numel()};
    std::vector<int32_t>* ranks[2] = {&row_group_, &col_group_};
    i64 low = std::numeric_limits<i64>::max(), high = std::numeric_limits<i64>::min();
    for (int side = 0; side < 2; ++side) {
      for (i64 i = 0; i < sizes[side]; ++i) {
        low = std::min(low, sides[side][i]);
        high = std::max(high, sides[side][i]);
      }
    }
    std::vector<i64> sorted;
    const bool wide = low <= high && static_cast<uint64_t>(high) - static_cast<uint64_t>(low) > 0x7fffffffu;
    if (wide) {
      for (int side = 0; side < 2; ++side) sorted.insert(sorted.end(), sides[side], sides[side] + sizes[side]);
      std::sort(sorted.begin(), sorted.end());
      sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
    }
    for (int side = 0; side < 2; ++side) {
      ranks[side]->resize(sizes[side]);
      for (i64 i = 0; i < sizes[side]; ++i) {
        const i64 g = sides[side][i];
        (*ranks[side])[i] = static_cast<int32_t>(
            wide ? std::lower_bound(sorted.begin(), sorted.end(), g) - sorted.begin() : g - low);
      }
    }
  }

  std::optional<i64> diagonal_;
  i64 period_;
  bool differ_, self_;
  std::vector<int32_t> row_group_, col_group_;
  std::optional<Tensor> keep_tensor_;
  const uint8_t* keep_ = nullptr;
};

// Row panels of q against column strips of k. Threads own columns, so gradients of k need no lock and no copy a thread;
// gradients of q are summed over threads after each panel. Panels depend on the shape alone, never on the threads.
template <typename T>
class Sweep {
 public:
  Sweep(const Tensor& q_tensor, const Tensor& k_tensor, T scale, const Exclusion& exclusion, bool self)
      : q(q_tensor),
        k(k_tensor),
        n(q.rows),
        m(k.rows),
        d(q.cols),
        self(self),
        panel_rows(n >= 1024 ? 256 : n >= 256 ? 128 : 64),
        tile_cols(exclusion.sparse() ? 128 : 512),
        threads(useful_threads(2.0 * std::min(panel_rows, n) * m * d)),
        tile(tiles<T>()),
        exclusion(exclusion),
        scale_(scale),
        scaled_(panel_rows * d),
        raw_(panel_rows * d),
        keys_(threads * tile_cols * d),
        scores_(threads * panel_rows * tile_cols) {}

  i64 panels() const { return (n + panel_rows - 1) / panel_rows; }
  Range panel(i64 p) const { return {p * panel_rows, std::min(n, (p + 1) * panel_rows)}; }

  // Make a panel current: its rows times scale for scores, and as they are for gradients.
  void enter(Range rows) {
    q.load(rows.begin, rows.size(), scaled_, scale_);
    query_ = q.fetch(rows.begin, rows.size(), raw_, &query_ld_);
  }

  View<T> queries(Range rows) const { return {query_, rows.size(), d, query_ld_, 1}; }

  // Calls f(cols) for each tile of thread t's strip that `exclusion` leaves something of, g(cols) for the others.
  // A self-similarity starts at the diagonal, and no tile straddles the panel's diagonal block.
  template <typename F, typename G>
  void for_tiles(Range rows, i64 t, const F& f, const G& g) const {
    const Range strip = part(self ? rows.begin : 0, m, t, threads);
    for (i64 j = strip.begin; j < strip.end;) {
      const i64 stop = self && j < rows.end ? std::min(rows.end, strip.end) : strip.end;
      const Range cols{j, std::min(stop, j + tile_cols)};
      if (exclusion.leaves_nothing(rows, cols)) {
        g(cols);
      } else {
        f(cols);
      }
      j = cols.end;
    }
  }

  View<T> keys(i64 t, Range cols) const {
    i64 ld;
    const T* x = k.fetch(cols.begin, cols.size(), keys_ + t * tile_cols * d, &ld);
    return {x, cols.size(), d, ld, 1};
  }

  // s = scale q k^T of one tile, -inf where a pair is left out.
  void scores(Range rows, Range cols, const View<T>& key, T* s, i64 ld) const {
    multiply<T>({s, rows.size(), cols.size(), ld, 1}, {scaled_, rows.size(), d, d, 1}, key.transposed());
    exclusion.apply(s, ld, rows, cols);
  }

  T* score_tile(i64 t) const { return scores_ + t * panel_rows * tile_cols; }

  const Operand<T> q, k;
  const i64 n, m, d;
  const bool self;
  const i64 panel_rows, tile_cols, threads;
  const Tiles<T>& tile;
  const Exclusion& exclusion;

 private:
  T scale_;
  Buffer<T> scaled_, raw_, keys_, scores_;
  const T* query_ = nullptr;
  i64 query_ld_ = 0;
};

// Accumulates u_q = W k and u_k = W^T q over the tiles of a sweep; a self-similarity has one u for both.
template <typename T>
class Products {
 public:
  // u_q or u_k may be null; in a self-similarity they are the same.
  Products(const Sweep<T>& sweep, T* u_q, T* u_k)
      : s_(sweep),
        u_q_(u_q),
        u_k_(u_k),
        parts_(u_q ? sweep.threads * sweep.panel_rows * sweep.d : 0),
        product_(sweep.threads * std::max(sweep.panel_rows, sweep.tile_cols) * sweep.d),
        started_(sweep.threads, false) {}

  // W of one tile, (rows, cols) with row stride ldw; by thread t
  void add(i64 t, Range rows, Range cols, const T* w, i64 ldw, const View<T>& key, const View<T>& query) {
    const View<T> weights{w, rows.size(), cols.size(), ldw, 1};
    if (u_q_) {
      accumulate(t, parts_ + t * s_.panel_rows * s_.d, rows.size(), started_[t], weights, key);
      started_[t] = true;
    }
    if (u_k_ && !(s_.self && cols.begin < rows.end)) {
      accumulate(t, u_k_ + cols.begin * s_.d, cols.size(), rows.begin > 0, weights.transposed(), query);
    }
  }

  // A tile that adds nothing: the first panel still owes its columns a value.
  void skip(Range rows, Range cols) {
    if (u_k_ && rows.begin == 0 && !(s_.self && cols.begin < rows.end)) {
      std::fill_n(u_k_ + cols.begin * s_.d, cols.size() * s_.d, T(0));
    }
  }

  T* thread_part(i64 t) { return started_[t] ? parts_ + t * s_.panel_rows * s_.d : nullptr; }

  // After all threads have added their tiles of a panel: its rows of u_q, times an optional factor a row and thread.
  void leave(Range rows) {
    if (!u_q_) return;
    const i64 d = s_.d;
    run(s_.threads, [&](i64 t) {
      const Range mine = part(0, rows.size(), t, s_.threads);
      T* out = u_q_ + (rows.begin + mine.begin) * d;
      const i64 count = mine.size() * d;
      if (!s_.self || rows.begin == 0) std::fill_n(out, count, T(0));
      for (i64 other = 0; other < s_.threads; ++other) {
        if (!started_[other]) continue;
        s_.tile.add(out, count, parts_ + (other * s_.panel_rows + mine.begin) * d, count, 1, count);
      }
    });
    std::fill(started_.begin(), started_.end(), false);
  }

 private:
  // BLAS through the dispatcher cannot accumulate, so all but the first product go through scratch.
  void accumulate(i64 t, T* out, i64 rows, bool more, const View<T>& a, const View<T>& b) {
    const i64 d = s_.d;
    T* scratch = product_ + t * std::max(s_.panel_rows, s_.tile_cols) * d;
    multiply<T>({more ? scratch : out, rows, d, d, 1}, a, b);
    if (more) s_.tile.add(out, rows * d, scratch, rows * d, 1, rows * d);
  }

  const Sweep<T>& s_;
  T *u_q_, *u_k_;
  Buffer<T> parts_, product_;
  std::vector<char> started_;
};

// u *= scale, and sum_i <x_i, u_i> before that: with u = W k the gradient of the scale, which is never divided by.
template <typename T>
double finish(const Operand<T>& x, T scale, T* u, bool want_dot) {
  const i64 d = x.cols, threads = useful_threads(64.0 * x.rows * d);
  std::vector<double> sums(threads, 0.0);
  run(threads, [&](i64 t) {
    const Range mine = part(0, x.rows, t, threads);
    Buffer<T> scratch(d);
    for (i64 i = mine.begin; i < mine.end; ++i) {
      if (want_dot) {
        i64 ld;
        const T* row = x.fetch(i, 1, scratch, &ld);
        sums[t] += tiles<T>().dot(row, u + i * d, d);
      }
      tiles<T>().scale_rows(u + i * d, d, u + i * d, d, &scale, 1, d);
    }
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

}  // namespace sslkernels
