// SPDX-License-Identifier: Apache-2.0
// Element-wise work on one tile of scores (rows x cols, row stride ld), compiled once for each instruction set.
// An excluded pair is a score of -inf; whatever reads a tile gives it weight zero.
#pragma once

#include "cpu/levels.h"

namespace sslkernels {

template <typename T>
struct Tiles {
  // s = -inf where (row_group == col_group) != differ
  void (*exclude_groups)(T* s, i64 ld, i64 rows, i64 cols, const int32_t* row_group, const int32_t* col_group,
                         bool differ);
  // s = -inf in the columns where keep is 0
  void (*exclude_columns)(T* s, i64 ld, i64 rows, i64 cols, const uint8_t* keep);
  // row_max and col_max of the tile; col_max may be null. NaN is passed over here and shows in the sums.
  void (*maxima)(const T* s, i64 ld, i64 rows, i64 cols, T* row_max, T* col_max);
  // row_sum_i = sum_j exp(beta (s - ref)) and col_sum_j likewise, one reference for the whole tile
  void (*sum_exp)(const T* s, i64 ld, i64 rows, i64 cols, T beta, T ref, T* row_sum, T* col_sum);
  // row_sum_i = sum_j exp(beta (s - ref_i))
  void (*sum_exp_rows)(const T* s, i64 ld, i64 rows, i64 cols, T beta, const T* ref, T* row_sum);
  // col_sum_j = sum_i exp(beta (s - ref_j))
  void (*sum_exp_cols)(const T* s, i64 ld, i64 rows, i64 cols, T beta, const T* ref, T* col_sum);
  // s = exp(s - ref_i) in place, row_sum_i += its sum
  void (*exp_rows)(T* s, i64 ld, i64 rows, i64 cols, const T* ref, T* row_sum);
  // sum *= exp(ref - own): what was summed against ref is now a sum against own; where own is -inf it stays
  void (*rebase)(i64 n, T ref, const T* own, T* sum);
  // sum exp(max) += tile_sum exp(tile_max), element by element
  void (*merge)(i64 n, T* max, T* sum, const T* tile_max, const T* tile_sum);
  // out = weight exp(ref - lse), zero where lse is -inf
  void (*factors)(i64 n, T ref, const T* lse, const T* weight, T weight_scale, T* out);
  // w (+)= (row_i + col_j) exp(beta s - ref)
  void (*weights)(const T* s, i64 ld, T* w, i64 ldw, i64 rows, i64 cols, T beta, T ref, const T* row, const T* col,
                  bool add);
  // w (+)= row_i exp(beta s - row_ref_i) + col_j exp(beta s - col_ref_j); either pair may be null
  void (*weights_wide)(const T* s, i64 ld, T* w, i64 ldw, i64 rows, i64 cols, T beta, const T* row_ref, const T* row,
                       const T* col_ref, const T* col, bool add);
  // row_sum_i += sum_j softplus(s + bias)
  void (*softplus)(const T* s, i64 ld, i64 rows, i64 cols, T bias, T* row_sum);
  // the same, and s = weight_i sigmoid(s + bias) in place, weight_sum_i += its sum
  void (*softplus_weights)(T* s, i64 ld, i64 rows, i64 cols, T bias, const T* weight, T* row_sum, T* weight_sum);
  // dst += src
  void (*add)(T* dst, i64 ldd, const T* src, i64 lds, i64 rows, i64 cols);
  // dst = factor_i src
  void (*scale_rows)(T* dst, i64 ldd, const T* src, i64 lds, const T* factor, i64 rows, i64 cols);
  // x /= divisor; a product with its inverse would round twice
  void (*divide)(T* x, T divisor, i64 n);
  // sum_j a_j b_j
  T (*dot)(const T* a, const T* b, i64 n);
  // y += a x
  void (*axpy)(T* y, T a, const T* x, i64 n);
  // dst = factor * src, from any dtype and strides (in elements) to dense rows
  void (*load)(const void* src, Dtype dtype, i64 row_stride, i64 col_stride, T* dst, i64 rows, i64 cols, T factor);
  // dst = src, dense rows rounded to any floating dtype, rows row_stride elements apart
  void (*store)(const T* src, void* dst, Dtype dtype, i64 row_stride, i64 rows, i64 cols);
  // exp of n numbers, for tests: out = exp(x), zero below the flush limit
  void (*exp)(const T* x, T* out, i64 n);
};

template <typename T>
const Tiles<T>& tiles();

}  // namespace sslkernels
