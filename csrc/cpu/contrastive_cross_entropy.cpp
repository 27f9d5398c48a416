// SPDX-License-Identifier: Apache-2.0
// Softmax losses whose row weights are known in the forward, so that it can emit every gradient.
#include "cpu/contrastive.h"

namespace sslkernels {

namespace {

using Index = std::optional<i64>;

// loss = sum_i weight_i softplus(lse_i - positive_i), or without the softplus where decoupled
template <typename T>
class RowLosses {
 public:
  RowLosses(const Tensor& positive, const Optional& weight, double uniform_weight, bool decoupled)
      : positive_(dense<T>(positive)),
        weight_(weight ? Optional(dense<T>(*weight)) : std::nullopt),
        uniform_(static_cast<T>(uniform_weight)),
        decoupled_(decoupled) {}

  // d loss / d lse_i
  T slope(i64 i, T lse) const {
    const T margin = lse - data<T>(positive_)[i];
    if (decoupled_)
      return weight(i);
    const T e = std::exp(-std::abs(margin));
    return weight(i) * (margin > 0 ? 1 / (1 + e) : margin <= 0 ? e / (1 + e) : margin);
  }

  Tensor slopes(const Tensor& lse, T sign) const {
    Tensor out = empty({lse.numel()}, kScalar<T>);
    for (i64 i = 0; i < lse.numel(); ++i) data<T>(out)[i] = sign * slope(i, data<T>(lse)[i]);
    return out;
  }

  double sum(const Tensor& lse) const {
    double total = 0;
    for (i64 i = 0; i < lse.numel(); ++i) {
      const T margin = data<T>(lse)[i] - data<T>(positive_)[i];
      const T row = std::max(margin, T(0)) + std::log1p(std::exp(-std::abs(margin)));
      total += static_cast<double>(weight(i)) * (decoupled_ || std::isnan(margin) ? margin : row);
    }
    return total;
  }

 private:
  T weight(i64 i) const { return weight_ ? data<T>(*weight_)[i] : uniform_; }

  Tensor positive_;
  Optional weight_;
  T uniform_;
  bool decoupled_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> similarity_cross_entropy(
    const Tensor& q, const Tensor& k, const Tensor& positive, const Optional& weight, double uniform_weight,
    const Optional& scale_tensor, double scale_number, Index diagonal, Index period, const Optional& query_groups,
    const Optional& key_groups, const Optional& key_mask, bool differ, bool decoupled, std::vector<bool> mask) {
  const Exclusion exclusion(diagonal, period, query_groups, key_groups, key_mask, differ, false);
  return with_type(q, k, [&](auto zero) {
    using T = decltype(zero);
    const i64 n = q.size(0), d = q.size(1);
    const bool want_q = mask[0], want_k = mask[1], want_scale = mask[3];
    const T scale = value<T>(scale_tensor, scale_number);
    const RowLosses<T> losses(positive, weight, uniform_weight, decoupled);
    Tensor lse, top;
    Gradients g{empty({0}, kScalar<T>), empty({0}, kScalar<T>), 0};
    const auto sweep_rows = [&] {
      LseResult out = lse_forward<T>(q, k, scale, exclusion, {1.0}, false, Scores::kDropped, false);
      lse = torch::stable::reshape(out.row, {n}), top = out.top;
    };
    if (!want_q && !want_k && !want_scale) {
      sweep_rows();
    } else if (!want_k) {
      AttentionResult out = attention<T>(q, k, scale, exclusion);
      lse = out.lse, top = out.top;
      const Tensor slopes = losses.slopes(lse, T(1));
      tiles<T>().scale_rows(data<T>(out.context), d, data<T>(out.context), d, data<T>(slopes), n, d);
      g.scale = finish(Operand<T>(q), scale, data<T>(out.context), want_scale);
      if (want_q)
        g.q = out.context;
    } else if (fits_one_sweep<T>(n, k.size(0))) {
      const auto slope = [&](i64 i, T row) { return losses.slope(i, row); };
      OneSweepResult out = one_sweep<T>(q, k, scale, exclusion, want_q, want_k, want_scale, slope);
      lse = out.lse, top = out.top, g = out.gradients;
    } else {
      sweep_rows();
      const Tensor slopes = losses.slopes(lse, T(1));
      g = lse_backward<T>(q, k, scale, exclusion, {1.0}, {data<T>(lse), data<T>(slopes)}, {}, nullptr, false, want_q,
                          want_k, want_scale);
    }
    return std::make_tuple(scalar<T>(losses.sum(lse), true), lse, top, g.q, g.k,
                           mask[2] ? losses.slopes(lse, T(-1)) : empty({0}, kScalar<T>),
                           scalar<T>(g.scale, want_scale));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> two_view_cross_entropy(
    const Tensor& out0, const Tensor& out1, const Optional& weight, double uniform_weight, const Optional& scale_tensor,
    double scale_number, bool decoupled, std::vector<bool> mask) {
  constexpr double kEps = 1e-12;
  constexpr i64 kKeptBytes = i64(4) << 20;
  return with_type(out0, out0, [&](auto zero) {
    using T = decltype(zero);
    const T scale = value<T>(scale_tensor, scale_number);
    const i64 n = out0.size(0);
    const bool want_x = mask[0] || mask[1], want_scale = mask[2];
    const bool keep = (want_x || want_scale) && 4 * n * n * i64(sizeof(T)) <= kKeptBytes;
    const Exclusion exclusion(0, n, std::nullopt, std::nullopt, std::nullopt, false, true);
    const UnitRows unit = normalize_rows<T>({out0, out1}, kEps);
    const Tensor& z = unit.z;
    LseResult out = lse_forward<T>(z, z, scale, exclusion, {1.0}, false, keep ? Scores::kKept : Scores::kDropped, true);
    const Tensor lse = torch::stable::reshape(out.row, {2 * n});
    const Tensor positive = positive_scores<T>(z, z, scale, n);
    const RowLosses<T> losses(positive, weight, uniform_weight, decoupled);
    Tensor dx[2] = {empty({0}, kScalar<T>), empty({0}, kScalar<T>)};
    double dscale = 0;
    if (want_x || want_scale) {
      const Tensor up = losses.slopes(lse, T(1)), down = empty({2 * n}, kScalar<T>);
      for (i64 i = 0; i < 2 * n; ++i) data<T>(down)[i] = -data<T>(up)[i];
      const Side<T> side{data<T>(lse), data<T>(up)};
      const Gradients g = lse_backward<T>(z, z, scale, exclusion, {1.0}, side, side,
                                          keep ? data<T>(out.scores) : nullptr, true, want_x, false, want_scale);
      dscale = g.scale + add_positive_gradients<T>(z, z, scale, n, data<T>(down), want_x ? data<T>(g.q) : nullptr,
                                                   nullptr, true, want_scale);
      for (i64 view = 0; view < 2; ++view) {
        if (mask[view])
          dx[view] = normalize_rows_backward<T>(g.q, z, unit.norm, kEps, {view * n, (view + 1) * n});
      }
    }
    return std::make_tuple(scalar<T>(losses.sum(lse), true), lse, positive, out.top, dx[0], dx[1],
                           scalar<T>(dscale, want_scale));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, library) {
  library.impl("similarity_cross_entropy", TORCH_BOX(&similarity_cross_entropy));
  library.impl("two_view_cross_entropy", TORCH_BOX(&two_view_cross_entropy));
}

}  // namespace sslkernels
