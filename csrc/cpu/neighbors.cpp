// SPDX-License-Identifier: Apache-2.0
// Nearest neighbours: tiles of scores that stay in the cache, each searched while it is there.
#include "cpu/neighbors.h"

#include <string>

#define SSLKERNELS_LEAVES "cpu/neighbors.inl"
#include "cpu/multiversion.inl"

namespace sslkernels {

namespace {

template <typename T>
struct Candidate {
  T score;
  i64 index;
};

// NaN first, then the larger score, then the smaller index
template <typename T>
bool before(const Candidate<T>& a, const Candidate<T>& b) {
  if (a.score > b.score || a.score < b.score)
    return a.score > b.score;
  const bool a_nan = std::isnan(a.score), b_nan = std::isnan(b.score);
  return a_nan == b_nan ? a.index < b.index : a_nan;
}

// The best of each row so far, none while all are -inf. Keys come in ascending order.
template <typename T>
class Best {
 public:
  Best(i64 rows, i64) : best_(rows) {}

  static i64 bytes_a_row(i64) { return sizeof(Candidate<T>); }

  void reset() { std::fill(best_.begin(), best_.end(), Candidate<T>{kNone<T>, -1}); }

  void scan(i64 row, const T* s, const T* bias, i64 n, i64 first_key) {
    Candidate<T>& best = best_[row];
    if (std::isnan(best.score) || n == 0)
      return;
    const T top = SSLKERNELS_AT_LEVEL(largest(s, bias, n));
    if (!(top <= best.score))
      best = {top, first_key + SSLKERNELS_AT_LEVEL(find(s, bias, n, top))};
  }

  i64 finish(i64 row, Candidate<T>* out) {
    *out = best_[row];
    return best_[row].index >= 0;
  }

 private:
  std::vector<Candidate<T>> best_;
};

// Of each row the k best so far and what came since they were last told apart: more than k of which is below none of
// the k counted then. Keys come in ascending order.
template <typename T>
class KBest {
 public:
  KBest(i64 rows, i64 k) : k_(k), room_(room(k)), count_(rows), threshold_(rows), kept_(rows * room_) {}

  static i64 bytes_a_row(i64 k) { return room(k) * sizeof(Candidate<T>); }

  // Nothing is at most NaN: until there are k, every key is a candidate.
  void reset() {
    std::fill(count_.begin(), count_.end(), 0);
    std::fill(threshold_.begin(), threshold_.end(), std::numeric_limits<T>::quiet_NaN());
  }

  void scan(i64 row, const T* s, const T* bias, i64 n, i64 first_key) {
    Candidate<T>* kept = kept_.data() + row * room_;
    i64& count = count_[row];
    T& threshold = threshold_[row];
    if (threshold == std::numeric_limits<T>::infinity() && std::isnan(kept[k_ - 1].score))
      return;
    for (i64 j = 0;; j += kGroup) {
      j = SSLKERNELS_AT_LEVEL(next_group(s, bias, j, n, threshold));
      if (j >= n)
        return;
      for (i64 c = j; c < std::min(j + kGroup, n); ++c) {  // without a branch, as nobody could foresee it
        const T x = s[c] - bias[c];
        kept[count] = {x, first_key + c};
        count += !(x <= threshold);
      }
      if (count + kGroup > room_) {
        std::nth_element(kept, kept + k_ - 1, kept + count, before<T>);
        count = k_;
        threshold = kept[k_ - 1].score;
        if (std::isnan(threshold)) {  // k NaNs, which no later key beats
          threshold = std::numeric_limits<T>::infinity();
          return;
        }
      }
    }
  }

  i64 finish(i64 row, Candidate<T>* out) {
    Candidate<T>* kept = kept_.data() + row * room_;
    const i64 count = std::min(k_, count_[row]);
    std::partial_sort_copy(kept, kept + count_[row], out, out + count, before<T>);
    return count;
  }

 private:
  static i64 room(i64 k) { return k + std::max(2 * kGroup, k / 2); }

  using Kept = std::vector<Candidate<T>>;
  i64 k_, room_;
  std::vector<i64> count_;
  std::vector<T> threshold_;
  Kept kept_;
};

// How the pairs are cut: threads own query rows or, where these are few, ranges of keys as well.
struct Cut {
  Cut(i64 n, i64 m, i64 d, i64 state_bytes, i64 number_bytes) {
    constexpr i64 kRowsWorthAThread = 64, kPanel = 256;
    // what a thread goes back to: the tile of scores, the rows of a block, and what is known of each of these
    constexpr i64 kTileBytes = i64(512) << 10, kBlockBytes = i64(4) << 20, kStateBytes = i64(512) << 10;
    const i64 threads = useful_threads(2.0 * n * m * std::max<i64>(d, 16));
    by_rows = std::clamp<i64>(n / kRowsWorthAThread, 1, threads);
    by_keys = std::clamp<i64>(threads / by_rows, 1, std::max<i64>(1, m / 512));
    const i64 row_bytes = std::max<i64>(1, d * number_bytes);
    block = std::min(std::max<i64>(16, kBlockBytes / row_bytes), std::clamp<i64>(kStateBytes / state_bytes, 32, 2048));
    block = std::min(block > kPanel ? block / kPanel * kPanel : block, std::max<i64>(n, 1));
    panel = std::min(block, kPanel);
    tile = std::clamp<i64>(kTileBytes / (panel * number_bytes), 16, std::max<i64>(16, kBlockBytes / row_bytes));
  }
  i64 by_rows, by_keys;    // threads
  i64 block, panel, tile;  // rows prepared at a time, rows and keys of a product
};

// Candidates of each (range of keys, query): `width` places, and how many of them are taken.
template <typename T>
struct Found {
  Found(i64 ranges, i64 rows, i64 width)
      : rows(rows), width(width), candidates(ranges * rows * width), count(ranges * rows) {}
  i64 rows, width;
  std::vector<Candidate<T>> candidates;
  std::vector<i64> count;
};

template <typename T, typename State>
Found<T> search(const Side<T>& queries, const Side<T>& keys, i64 width, bool exclude_self) {
  const i64 n = queries.rows.rows, m = keys.rows.rows, d = keys.rows.cols;
  const Cut cut(n, m, d, State::bytes_a_row(width), sizeof(T));
  Found<T> found(cut.by_keys, n, width);
  run(cut.by_rows * cut.by_keys, [&](i64 thread) {
    const i64 range = thread % cut.by_keys;
    const Range mine = part(0, n, thread / cut.by_keys, cut.by_rows), own = part(0, m, range, cut.by_keys);
    Buffer<T> query(cut.block * d), key(cut.tile * d), bias(std::max(cut.block, cut.tile)),
        scores(cut.panel * cut.tile);
    State state(cut.block, width);
    for (i64 first = mine.begin; first < mine.end; first += cut.block) {
      const i64 count = std::min(cut.block, mine.end - first);
      i64 query_ld, key_ld;
      const T* q = queries.fetch(first, count, query, &query_ld, bias);
      state.reset();
      for (i64 j = own.begin; j < own.end; j += cut.tile) {
        const i64 cols = std::min(cut.tile, own.end - j);
        const T* k = keys.fetch(j, cols, key, &key_ld, bias);
        for (i64 i = 0; i < count; i += cut.panel) {
          const i64 rows = std::min(cut.panel, count - i);
          multiply<T>({scores, rows, cols, cut.tile, 1}, {q + i * query_ld, rows, d, query_ld, 1},
                      View<T>{k, cols, d, key_ld, 1}.transposed());
          for (i64 r = 0; r < rows; ++r) {
            const T* s = scores + r * cut.tile;
            const i64 self = exclude_self ? first + i + r - j : -1;
            if (self < 0 || self >= cols) {
              state.scan(i + r, s, bias, cols, j);
            } else {
              state.scan(i + r, s, bias, self, j);
              state.scan(i + r, s + self + 1, bias + self + 1, cols - self - 1, j + self + 1);
            }
          }
        }
      }
      for (i64 r = 0; r < count; ++r) {
        const i64 at = range * n + first + r;
        found.count[at] = state.finish(r, found.candidates.data() + at * width);
      }
    }
  });
  return found;
}

// Every pair of rows once: tiles on and above the diagonal serve their rows and their columns. A thread's tiles come in
// ascending order, so its keys do for each query.
template <typename T>
Found<T> search_self(const Side<T>& side, bool exclude_self) {
  constexpr i64 kTile = 256;
  const i64 n = side.rows.rows, d = side.rows.cols, blocks = (n + kTile - 1) / kTile;
  const i64 tiles_in_all = blocks * (blocks + 1) / 2, threads = std::min(tiles_in_all, useful_threads(1.0 * n * n * d));
  Buffer<T> dense(side.in_place() ? 0 : n * d), bias(n), best(threads * n);
  std::vector<int32_t> index(threads * n, -1);
  i64 ld = 0;
  const T* x = side.in_place() ? side.fetch(0, n, dense, &ld, bias) : dense;
  if (!side.in_place()) {
    ld = d;
    over_rows(n, kFlopsAnElement * n * d, [&](Range rows) {
      i64 own_ld;
      side.fetch(rows.begin, rows.size(), dense + rows.begin * d, &own_ld, bias + rows.begin);
    });
  }
  std::fill_n(static_cast<T*>(best), threads * n, kNone<T>);
  run(threads, [&](i64 t) {
    Buffer<T> scores(kTile * kTile);
    T* mine = best + t * n;
    int32_t* at = index.data() + t * n;
    i64 tile = 0;
    for (i64 p = 0; p < blocks; ++p) {
      for (i64 c = p; c < blocks; ++c, ++tile) {
        if (tile < tiles_in_all * t / threads || tile >= tiles_in_all * (t + 1) / threads)
          continue;
        const Range r{p * kTile, std::min(n, (p + 1) * kTile)}, k{c * kTile, std::min(n, (c + 1) * kTile)};
        multiply<T>({scores, r.size(), k.size(), kTile, 1}, {x + r.begin * ld, r.size(), d, ld, 1},
                    View<T>{x + k.begin * ld, k.size(), d, ld, 1}.transposed());
        for (i64 i = r.begin; i < r.end; ++i) {
          const T* s = scores + (i - r.begin) * kTile;
          const i64 middle = exclude_self && c == p ? i : k.end;
          for (const Range part : {Range{k.begin, middle}, Range{middle + 1, k.end}}) {
            if (part.begin >= part.end || std::isnan(mine[i]))
              continue;
            const T* from = s + part.begin - k.begin;
            const T top = SSLKERNELS_AT_LEVEL(largest(from, bias + part.begin, part.size()));
            if (top <= mine[i])
              continue;
            mine[i] = top;
            at[i] =
                static_cast<int32_t>(part.begin + SSLKERNELS_AT_LEVEL(find(from, bias + part.begin, part.size(), top)));
          }
        }
        if (c > p) {
          SSLKERNELS_AT_LEVEL(best_of_columns<T>(scores, kTile, r.size(), k.size(), bias + r.begin,
                                                 static_cast<int32_t>(r.begin), mine + k.begin, at + k.begin));
        }
      }
    }
  });
  Found<T> found(threads, n, 1);
  for (i64 j = 0; j < threads * n; ++j) {
    found.candidates[j] = {best[j], index[j]};
    found.count[j] = index[j] >= 0;
  }
  return found;
}

// The `width` best of all ranges, best first, with the values that people see; of keys that are all at -inf, the first.
template <typename T>
std::tuple<Tensor, Tensor> finish(const Found<T>& found, const Tensor& query_tensor, const Tensor& key_tensor,
                                  Metric metric, bool exclude_self, std::vector<i64> shape) {
  const i64 n = found.rows, width = found.width, ranges = static_cast<i64>(found.count.size()) / std::max<i64>(n, 1);
  const Operand<T> queries(query_tensor), keys(key_tensor);
  const i64 d = queries.cols;
  Tensor values = empty(shape, kScalar<T>), indices = empty(shape, ScalarType::Long);
  over_rows(n, kFlopsAnElement * n * (width * (metric == Metric::kL2 ? d : 1) + d), [&](Range mine) {
    Buffer<T> query(d), key(d);
    std::vector<Candidate<T>> all(std::max<i64>(ranges * width, 1));
    for (i64 i = mine.begin; i < mine.end; ++i) {
      i64 count = 0, ld;
      for (i64 range = 0; range < ranges; ++range) {
        const i64 at = range * n + i;
        std::copy_n(found.candidates.data() + at * width, found.count[at], all.data() + count);
        count += found.count[at];
      }
      if (count == 0)
        all[count++] = {kNone<T>, exclude_self && i == 0};
      if (ranges > 1)
        std::partial_sort(all.begin(), all.begin() + std::min(width, count), all.begin() + count, before<T>);
      if (metric != Metric::kDot) {
        const T* q = queries.fetch(i, 1, query, &ld);
        const T norm = metric == Metric::kCosine ? std::max(length(q, d), static_cast<T>(kCosineEps)) : T(1);
        for (i64 c = 0; c < width; ++c) {
          T& score = all[c].score;
          score = metric == Metric::kCosine
                      ? score / norm
                      : -SSLKERNELS_AT_LEVEL(squared_distance(q, keys.fetch(all[c].index, 1, key, &ld), d));
        }
        if (metric == Metric::kL2)
          std::sort(all.begin(), all.begin() + width, before<T>);
      }
      for (i64 c = 0; c < width; ++c) {
        data<T>(values)[i * width + c] = metric == Metric::kL2 ? -all[c].score : all[c].score;
        data<i64>(indices)[i * width + c] = all[c].index;
      }
    }
  });
  return std::make_tuple(values, indices);
}

// The queries as keys, where there are no others.
const Tensor& keys_of(const Tensor& queries, const Optional& keys) { return keys ? *keys : queries; }

template <typename T>
std::vector<T> centre_for(const Tensor& keys, Metric metric) {
  return metric == Metric::kL2 && keys.size(0) > 0 ? centre_of(Operand<T>(keys)) : std::vector<T>();
}

std::tuple<Tensor, Tensor> nearest(const Tensor& queries, const Optional& keys, std::string name, bool exclude_self) {
  const Tensor& k = keys_of(queries, keys);
  return with_type(queries, k, [&](auto zero) {
    using T = decltype(zero);
    const Metric metric = metric_of(name);
    const std::vector<T> centre = centre_for<T>(k, metric);
    const Side<T> key_side(k, metric, centre.data(), true);
    const bool self = !keys && k.size(0) < std::numeric_limits<int32_t>::max();
    const Found<T> found =
        self ? search_self(key_side, exclude_self)
             : search<T, Best<T>>(Side<T>(queries, metric, centre.data(), false), key_side, 1, exclude_self);
    return finish(found, queries, k, self && metric == Metric::kCosine ? Metric::kDot : metric, exclude_self,
                  {queries.size(0)});
  });
}

std::tuple<Tensor, Tensor> topk_similarity(const Tensor& queries, const Optional& keys, i64 width, std::string name,
                                           bool exclude_self) {
  const Tensor& k = keys_of(queries, keys);
  return with_type(queries, k, [&](auto zero) {
    using T = decltype(zero);
    const Metric metric = metric_of(name);
    const std::vector<T> centre = centre_for<T>(k, metric);
    const Side<T> query_side(queries, metric, centre.data(), false), key_side(k, metric, centre.data(), true);
    return finish(search<T, KBest<T>>(query_side, key_side, width, exclude_self), queries, k, metric, exclude_self,
                  {queries.size(0), width});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sslkernels, CPU, library) {
  library.impl("nearest", TORCH_BOX(&nearest));
  library.impl("topk_similarity", TORCH_BOX(&topk_similarity));
}

}  // namespace sslkernels
