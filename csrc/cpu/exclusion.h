// SPDX-License-Identifier: Apache-2.0
// Which pairs a sweep leaves out.
#pragma once

#include "cpu/operand.h"

namespace sslkernels {

// The pairs left out, as `Exclude` in sslkernels/reference/contrastive.py says.
class Exclusion {
 public:
  Exclusion(std::optional<i64> diagonal, std::optional<i64> period, const std::optional<Tensor>& row_groups,
            const std::optional<Tensor>& col_groups, const std::optional<Tensor>& keep, bool differ, bool self)
      : diagonal_(diagonal), period_(period.value_or(0)), differ_(differ), self_(self) {
    if (row_groups)
      rank_groups(torch::stable::contiguous(*row_groups), torch::stable::contiguous(*col_groups));
    if (keep) {
      keep_tensor_ = torch::stable::contiguous(*keep);
      keep_ = static_cast<const uint8_t*>(keep_tensor_->const_data_ptr());
    }
  }

  // Whether the groups leave out every pair of the tile, so that it need not be computed.
  bool leaves_nothing(Range rows, Range cols) const {
    if (row_group_.empty())
      return false;
    const auto [row_low, row_high] = bounds(row_group_, rows);
    const auto [col_low, col_high] = bounds(col_group_, cols);
    if (differ_)
      return row_high < col_low || col_high < row_low;
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
        if (j < cols.begin)
          continue;
        for (; j < cols.end; j += step) {
          s[(i - rows.begin) * ld + j - cols.begin] = kNone<T>;
          if (!period_)
            break;
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
        if (!keep_[i])
          std::fill_n(s + (i - rows.begin) * ld, cols.size(), kNone<T>);
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
        (*ranks[side])[i] =
            static_cast<int32_t>(wide ? std::lower_bound(sorted.begin(), sorted.end(), g) - sorted.begin() : g - low);
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

}  // namespace sslkernels
