// SPDX-License-Identifier: Apache-2.0
// The contrastive ops as the dispatcher calls them: arguments in, dtype chosen, results in the dtypes the schema says.
#include "cpu/contrastive.h"

namespace sslkernels {

namespace {

using Index = std::optional<i64>;

template <typename T>
Tensor positives(const Tensor& q, const Tensor& k, T scale, Index offset) {
  return offset ? positive_scores<T>(q, k, scale, *offset) : empty({0}, kScalar<T>);
}

template <typename T>
void add_positives(const Optional& grad, const Tensor& q, const Tensor& k, T scale, Index offset, bool want_scale,
                   bool self, Gradients* g) {
  if (!grad)
    return;
  const Tensor weights = dense<T>(*grad);
  g->scale +=
      add_positive_gradients<T>(q, k, scale, *offset, data<T>(weights), g->q.dim() == 2 ? data<T>(g->q) : nullptr,
                                g->k.dim() == 2 ? data<T>(g->k) : nullptr, self, want_scale);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> similarity_logsumexp(
    const Tensor& q, const Tensor& k, const Optional& scale_tensor, double scale_number, Index diagonal, Index period,
    const Optional& query_groups, const Optional& key_groups, const Optional& key_mask, bool differ,
    std::vector<double> scales, bool columns, bool keep_scores, Index offset) {
  const Exclusion exclusion(diagonal, period, query_groups, key_groups, key_mask, differ, false);
  return with_type(q, k, [&](auto zero) {
    using T = decltype(zero);
    const T scale = value<T>(scale_tensor, scale_number);
    LseResult out = lse_forward<T>(q, k, scale, exclusion, scales, columns,
                                   keep_scores ? Scores::kReturned : Scores::kDropped, false);
    return std::make_tuple(out.row, out.col, positives<T>(q, k, scale, offset), out.top, out.scores);
  });
}

std::tuple<Tensor, Tensor, Tensor> similarity_logsumexp_backward(
    const Optional& grad_row, const Optional& grad_col, const Optional& grad_positive, const Tensor& q, const Tensor& k,
    const Optional& scale_tensor, double scale_number, Index diagonal, Index period, const Optional& query_groups,
    const Optional& key_groups, const Optional& key_mask, bool differ, std::vector<double> scales, Index offset,
    const Tensor& row_lse, const Tensor& col_lse, const Tensor& scores, std::vector<bool> mask) {
  const Exclusion exclusion(diagonal, period, query_groups, key_groups, key_mask, differ, false);
  return with_type(q, k, [&](auto zero) {
    using T = decltype(zero);
    const T scale = value<T>(scale_tensor, scale_number);
    const Optional row = grad_row ? Optional(dense<T>(*grad_row)) : std::nullopt;
    const Optional col = grad_col ? Optional(dense<T>(*grad_col)) : std::nullopt;
    Gradients g =
        lse_backward<T>(q, k, scale, exclusion, scales, row ? Side<T>{data<T>(row_lse), data<T>(*row)} : Side<T>{},
                        col ? Side<T>{data<T>(col_lse), data<T>(*col)} : Side<T>{},
                        scores.dim() == 2 ? data<T>(scores) : nullptr, false, mask[0], mask[1], mask[2]);
    add_positives<T>(grad_positive, q, k, scale, offset, mask[2], false, &g);
    return std::make_tuple(cast(g.q, q), cast(g.k, k), scalar<T>(g.scale, mask[2]));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> self_similarity_logsumexp(const Tensor& z, const Optional& scale_tensor,
                                                                     double scale_number, Index diagonal, Index period,
                                                                     const Optional& groups, const Optional& key_mask,
                                                                     bool differ, std::vector<double> scales,
                                                                     bool keep_scores, Index offset) {
  const Exclusion exclusion(diagonal, period, groups, groups, key_mask, differ, true);
  return with_type(z, z, [&](auto zero) {
    using T = decltype(zero);
    const T scale = value<T>(scale_tensor, scale_number);
    LseResult out =
        lse_forward<T>(z, z, scale, exclusion, scales, false, keep_scores ? Scores::kReturned : Scores::kDropped, true);
    return std::make_tuple(out.row, positives<T>(z, z, scale, offset), out.top, out.scores);
  });
}

std::tuple<Tensor, Tensor> self_similarity_logsumexp_backward(
    const Optional& grad, const Optional& grad_positive, const Tensor& z, const Optional& scale_tensor,
    double scale_number, Index diagonal, Index period, const Optional& groups, const Optional& key_mask, bool differ,
    std::vector<double> scales, Index offset, const Tensor& lse, const Tensor& scores, std::vector<bool> mask) {
  const Exclusion exclusion(diagonal, period, groups, groups, key_mask, differ, true);
  return with_type(z, z, [&](auto zero) {
    using T = decltype(zero);
    const T scale = value<T>(scale_tensor, scale_number);
    const Optional weights = grad ? Optional(dense<T>(*grad)) : std::nullopt;
    const Side<T> side = weights ? Side<T>{data<T>(lse), data<T>(*weights)} : Side<T>{};
    Gradients g = lse_backward<T>(z, z, scale, exclusion, scales, side, side,
                                  scores.dim() == 2 ? data<T>(scores) : nullptr, true, mask[0], false, mask[1]);
    add_positives<T>(grad_positive, z, z, scale, offset, mask[1], true, &g);
    return std::make_tuple(cast(g.q, z), scalar<T>(g.scale, mask[1]));
  });
}

std::tuple<Tensor, Tensor, Tensor> similarity_row_attention(const Tensor& q, const Tensor& k,
                                                            const Optional& scale_tensor, double scale, Index diagonal,
                                                            Index period, const Optional& query_groups,
                                                            const Optional& key_groups, const Optional& key_mask,
                                                            bool differ) {
  const Exclusion exclusion(diagonal, period, query_groups, key_groups, key_mask, differ, false);
  return with_type(q, k, [&](auto zero) {
    using T = decltype(zero);
    AttentionResult out = attention<T>(q, k, value<T>(scale_tensor, scale), exclusion);
    return std::make_tuple(out.lse, out.top, out.context);
  });
}

template <typename T>
struct SoftplusResult {
  Tensor rows;
  Gradients gradients;
  double bias = 0;
};

// Row sums, and with `weight` (N) also the gradients of sum_i weight_i row_i, in one sweep.
template <typename T>
SoftplusResult<T> softplus_sweep(const Tensor& q, const Tensor& k, T scale, T bias, const Exclusion& exclusion,
                                 const T* weight, const std::vector<bool>& mask) {
  Sweep<T> s(q, k, scale, exclusion, false);
  SoftplusResult<T> out{empty({s.n}, kScalar<T>), gradient_tensors(s, mask[0], mask[1], mask[2])};
  T* u_q = out.gradients.q.dim() == 2 ? data<T>(out.gradients.q) : nullptr;
  Products<T> products(s, u_q, mask[1] ? data<T>(out.gradients.k) : nullptr);
  const i64 r = s.panel_rows;
  Buffer<T> sums(s.threads * r), totals(s.threads * r);
  T* rows_out = data<T>(out.rows);
  for (i64 p = 0; p < s.panels(); ++p) {
    const Range rows = s.panel(p);
    s.enter(rows);
    run(s.threads, [&](i64 t) {
      T *sum = sums + t * r, *total = totals + t * r, *tile = s.score_tile(t);
      std::fill_n(sum, r, T(0));
      std::fill_n(total, r, T(0));
      s.for_tiles(
          rows, t,
          [&](Range cols) {
            const View<T> key = s.keys(t, cols);
            s.scores(rows, cols, key, tile, s.tile_cols);
            if (weight) {
              s.tile.softplus_weights(tile, s.tile_cols, rows.size(), cols.size(), bias, weight + rows.begin, sum,
                                      total);
              products.add(t, rows, cols, tile, s.tile_cols, key, s.queries(rows));
            } else {
              s.tile.softplus(tile, s.tile_cols, rows.size(), cols.size(), bias, sum);
            }
          },
          [&](Range cols) { products.skip(rows, cols); });
    });
    for (i64 i = 0; i < rows.size(); ++i) {
      T sum = 0;
      for (i64 t = 0; t < s.threads; ++t) {
        sum += sums[t * r + i];
        out.bias += totals[t * r + i];
      }
      rows_out[rows.begin + i] = sum;
    }
    if (weight)
      products.leave(rows);
  }
  if (weight)
    finish_gradients(s, scale, mask[0], mask[1], mask[2], &out.gradients);
  return out;
}

Tensor similarity_softplus(const Tensor& q, const Tensor& k, const Optional& scale_tensor, double scale,
                           const Optional& bias_tensor, double bias, Index diagonal, Index period,
                           const Optional& query_groups, const Optional& key_groups, const Optional& key_mask,
                           bool differ) {
  const Exclusion exclusion(diagonal, period, query_groups, key_groups, key_mask, differ, false);
  return with_type(q, k, [&](auto zero) {
    using T = decltype(zero);
    return softplus_sweep<T>(q, k, value<T>(scale_tensor, scale), value<T>(bias_tensor, bias), exclusion, nullptr,
                             {false, false, false, false})
        .rows;
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> similarity_softplus_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Optional& scale_tensor, double scale,
    const Optional& bias_tensor, double bias, Index diagonal, Index period, const Optional& query_groups,
    const Optional& key_groups, const Optional& key_mask, bool differ, std::vector<bool> mask) {
  const Exclusion exclusion(diagonal, period, query_groups, key_groups, key_mask, differ, false);
  return with_type(q, k, [&](auto zero) {
    using T = decltype(zero);
    const Tensor weights = dense<T>(grad);
    auto out = softplus_sweep<T>(q, k, value<T>(scale_tensor, scale), value<T>(bias_tensor, bias), exclusion,
                                 data<T>(weights), mask);
    return std::make_tuple(cast(out.gradients.q, q), cast(out.gradients.k, k), scalar<T>(out.gradients.scale, mask[2]),
                           scalar<T>(out.bias, mask[3]));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> similarity_softplus_sum(
    const Tensor& q, const Tensor& k, const Optional& weight, double uniform_weight, const Optional& scale_tensor,
    double scale, const Optional& bias_tensor, double bias, Index diagonal, Index period, const Optional& query_groups,
    const Optional& key_groups, const Optional& key_mask, bool differ, std::vector<bool> mask) {
  const Exclusion exclusion(diagonal, period, query_groups, key_groups, key_mask, differ, false);
  return with_type(q, k, [&](auto zero) {
    using T = decltype(zero);
    const i64 n = q.size(0);
    const Tensor weights = weight ? dense<T>(*weight) : empty({n}, kScalar<T>);
    if (!weight)
      std::fill_n(data<T>(weights), n, static_cast<T>(uniform_weight));
    const bool wanted = mask[0] || mask[1] || mask[2] || mask[3];
    auto out = softplus_sweep<T>(q, k, value<T>(scale_tensor, scale), value<T>(bias_tensor, bias), exclusion,
                                 wanted ? data<T>(weights) : nullptr, mask);
    double loss = 0;
    for (i64 i = 0; i < n; ++i) loss += static_cast<double>(data<T>(weights)[i]) * data<T>(out.rows)[i];
    return std::make_tuple(scalar<T>(loss, true), out.gradients.q, out.gradients.k,
                           scalar<T>(out.gradients.scale, mask[2]), scalar<T>(out.bias, mask[3]));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, library) {
  library.impl("similarity_logsumexp", TORCH_BOX(&similarity_logsumexp));
  library.impl("similarity_logsumexp_backward", TORCH_BOX(&similarity_logsumexp_backward));
  library.impl("self_similarity_logsumexp", TORCH_BOX(&self_similarity_logsumexp));
  library.impl("self_similarity_logsumexp_backward", TORCH_BOX(&self_similarity_logsumexp_backward));
  library.impl("similarity_row_attention", TORCH_BOX(&similarity_row_attention));
  library.impl("similarity_softplus", TORCH_BOX(&similarity_softplus));
  library.impl("similarity_softplus_backward", TORCH_BOX(&similarity_softplus_backward));
  library.impl("similarity_softplus_sum", TORCH_BOX(&similarity_softplus_sum));
}

}  // namespace sslkernels
