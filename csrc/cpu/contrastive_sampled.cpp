// SPDX-License-Identifier: Apache-2.0
// Log-sum-exp over each query's own sample of the keys.
#include "cpu/contrastive.h"

namespace sslkernels {

namespace {

// The sample of every query: (N, C) indices, each checked before anything is written, and which of them count.
struct Samples {
  Samples(const Tensor& indices, const Optional& mask, i64 keys)
      : indices_tensor(torch::stable::contiguous(indices)),
        rows(indices.size(0)),
        count(indices.size(1)),
        index(static_cast<const i64*>(indices_tensor.const_data_ptr())) {
    if (mask) {
      mask_tensor = torch::stable::contiguous(*mask);
      counts = static_cast<const uint8_t*>(mask_tensor->const_data_ptr());
    }
    for (i64 i = 0; i < rows * count; ++i) {
      STD_TORCH_CHECK(index[i] >= 0 && index[i] < keys, "sampled_logsumexp: indices must be in [0, ", keys, "), got ",
                      index[i]);
    }
  }
  bool used(i64 at) const { return !counts || counts[at]; }

  Tensor indices_tensor;
  Optional mask_tensor;
  i64 rows, count;
  const i64* index;
  const uint8_t* counts = nullptr;
};

// s (C) of row i: scale <q_i, k_index>, -inf where the mask is False
template <typename T>
void row_scores(const Operand<T>& q, const Operand<T>& k, T scale, const Samples& samples, i64 i, T* query, T* key,
                T* s) {
  q.load(i, 1, query, scale);
  for (i64 c = 0; c < samples.count; ++c) {
    const i64 at = i * samples.count + c;
    i64 ld;
    s[c] = samples.used(at) ? tiles<T>().dot(query, k.fetch(samples.index[at], 1, key, &ld), q.cols) : kNone<T>;
  }
}

template <typename T>
Tensor forward(const Tensor& q_tensor, const Tensor& k_tensor, const Samples& samples, T scale) {
  const Operand<T> q(q_tensor), k(k_tensor);
  Tensor out = empty({q.rows}, kScalar<T>);
  T* lse = data<T>(out);
  over_rows(q.rows, 2.0 * q.rows * samples.count * q.cols, [&](Range rows) {
    Buffer<T> query(q.cols), key(q.cols), s(samples.count);
    for (i64 i = rows.begin; i < rows.end; ++i) {
      row_scores<T>(q, k, scale, samples, i, query, key, s);
      T high, sum = 0;
      tiles<T>().maxima(s, samples.count, 1, samples.count, &high, nullptr);
      tiles<T>().exp_rows(s, samples.count, 1, samples.count, &high, &sum);
      lse[i] = log_sum(high, sum);
    }
  });
  return out;
}

// dk needs, for each key, the samples that drew it: positions sorted by key, in order of the query within a key.
struct ByKey {
  ByKey(const Samples& samples, i64 keys) : first(keys + 1, 0), position(samples.rows * samples.count) {
    for (i64 at = 0; at < samples.rows * samples.count; ++at) ++first[samples.index[at] + 1];
    for (i64 j = 0; j < keys; ++j) first[j + 1] += first[j];
    std::vector<i64> next(first.begin(), first.end() - 1);
    for (i64 at = 0; at < samples.rows * samples.count; ++at) position[next[samples.index[at]]++] = at;
  }
  std::vector<i64> first, position;
};

template <typename T>
Gradients backward(const T* grad, const Tensor& q_tensor, const Tensor& k_tensor, const Samples& samples, T scale,
                   const T* lse, bool want_q, bool want_k, bool want_scale) {
  const Operand<T> q(q_tensor), k(k_tensor);
  const i64 d = q.cols, count = samples.count;
  const bool by_query = want_q || (want_scale && !want_k);
  Gradients out{empty({by_query ? q.rows : 0, d}, kScalar<T>), empty({want_k ? k.rows : 0, d}, kScalar<T>), 0};
  Buffer<T> weights(q.rows * count);
  const double flops = 4.0 * q.rows * count * d;
  over_rows(q.rows, flops, [&](Range rows) {
    Buffer<T> query(d), key(d);
    for (i64 i = rows.begin; i < rows.end; ++i) {
      T* w = weights + i * count;
      row_scores<T>(q, k, scale, samples, i, query, key, w);
      tiles<T>().weights_wide(w, count, w, count, 1, count, T(1), lse + i, grad + i, nullptr, nullptr, false);
      if (!by_query)
        continue;
      T* u = data<T>(out.q) + i * d;
      std::fill_n(u, d, T(0));
      for (i64 c = 0; c < count; ++c) {
        const i64 at = i * count + c;
        i64 ld;
        if (samples.used(at))
          tiles<T>().axpy(u, w[c], k.fetch(samples.index[at], 1, key, &ld), d);
      }
    }
  });
  if (by_query)
    out.scale = finish(q, scale, data<T>(out.q), want_scale);
  if (want_k) {
    const ByKey lists(samples, k.rows);
    over_rows(k.rows, flops, [&](Range keys) {
      Buffer<T> query(d);
      for (i64 j = keys.begin; j < keys.end; ++j) {
        T* u = data<T>(out.k) + j * d;
        std::fill_n(u, d, T(0));
        for (i64 at = lists.first[j]; at < lists.first[j + 1]; ++at) {
          const i64 position = lists.position[at];
          i64 ld;
          if (samples.used(position)) {
            tiles<T>().axpy(u, weights[position], q.fetch(position / count, 1, query, &ld), d);
          }
        }
      }
    });
    const double dot = finish(k, scale, data<T>(out.k), want_scale && !by_query);
    if (!by_query)
      out.scale = dot;
  }
  if (!want_q)
    out.q = empty({0}, kScalar<T>);
  if (!want_k)
    out.k = empty({0}, kScalar<T>);
  return out;
}

Tensor sampled_logsumexp(const Tensor& q, const Tensor& k, const Tensor& indices, const Optional& mask,
                         const Optional& scale_tensor, double scale) {
  const Samples samples(indices, mask, k.size(0));
  return with_type(q, k, [&](auto zero) {
    using T = decltype(zero);
    return forward<T>(q, k, samples, value<T>(scale_tensor, scale));
  });
}

std::tuple<Tensor, Tensor, Tensor> sampled_logsumexp_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                              const Tensor& indices, const Optional& mask,
                                                              const Optional& scale_tensor, double scale,
                                                              const Tensor& lse, std::vector<bool> output_mask) {
  const Samples samples(indices, mask, k.size(0));
  return with_type(q, k, [&](auto zero) {
    using T = decltype(zero);
    const Tensor weights = dense<T>(grad);
    Gradients g = backward<T>(data<T>(weights), q, k, samples, value<T>(scale_tensor, scale), data<T>(lse),
                              output_mask[0], output_mask[1], output_mask[2]);
    return std::make_tuple(cast(g.q, q), cast(g.k, k), scalar<T>(g.scale, output_mask[2]));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, library) {
  library.impl("sampled_logsumexp", TORCH_BOX(&sampled_logsumexp));
  library.impl("sampled_logsumexp_backward", TORCH_BOX(&sampled_logsumexp_backward));
}

}  // namespace sslkernels
