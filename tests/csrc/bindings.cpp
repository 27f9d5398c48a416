// SPDX-License-Identifier: Apache-2.0
// The functions of csrc/cpu/tiles.h for the unit tests, arrays in place of pointers and None in place of null, and the
// arithmetic of csrc/common that plans launches on a GPU.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/chunks.h"
#include "common/grid.h"
#include "common/philox.h"
#include "cpu/tiles.h"

namespace py = pybind11;
using sslkernels::Dtype;
using sslkernels::i64;
using sslkernels::Level;
using sslkernels::tiles;

namespace {

template <typename T>
using Array = py::array_t<T, 0>;  // no flag: an argument is never converted or copied

// A matrix whose rows may lie apart, or a vector.
template <typename T>
T* data(Array<T>& x) {
  const py::ssize_t last = x.ndim() - 1;
  if (x.shape(last) > 1 && x.strides(last) != static_cast<py::ssize_t>(sizeof(T))) {
    throw py::value_error("the last dimension must be contiguous");
  }
  return x.mutable_data();
}

template <typename T>
T* data(std::optional<Array<T>>& x) {
  return x ? data(*x) : nullptr;
}

template <typename T>
i64 ld(const Array<T>& x) {
  return x.strides(0) / static_cast<i64>(sizeof(T));
}

Dtype kind(const std::string& dtype) {
  return dtype == "float32"    ? Dtype::kFloat
         : dtype == "float64"  ? Dtype::kDouble
         : dtype == "bfloat16" ? Dtype::kBFloat16
         : dtype == "float16"  ? Dtype::kHalf
                               : Dtype::kByte;
}

template <typename T>
void bind(py::module_ m) {
  using A = Array<T>;
  using Maybe = std::optional<A>;
  const auto def = [&](const char* name, auto f) { m.def(name, f); };
  def("exclude_groups", [](A s, Array<int32_t> row, Array<int32_t> col, bool differ) {
    tiles<T>().exclude_groups(data(s), ld(s), s.shape(0), s.shape(1), data(row), data(col), differ);
  });
  def("exclude_columns",
      [](A s, Array<uint8_t> keep) { tiles<T>().exclude_columns(data(s), ld(s), s.shape(0), s.shape(1), data(keep)); });
  def("maxima",
      [](A s, A row, Maybe col) { tiles<T>().maxima(data(s), ld(s), s.shape(0), s.shape(1), data(row), data(col)); });
  def("sum_exp", [](A s, T beta, T ref, A row, A col) {
    tiles<T>().sum_exp(data(s), ld(s), s.shape(0), s.shape(1), beta, ref, data(row), data(col));
  });
  def("sum_exp_rows", [](A s, T beta, A ref, A sum) {
    tiles<T>().sum_exp_rows(data(s), ld(s), s.shape(0), s.shape(1), beta, data(ref), data(sum));
  });
  def("sum_exp_cols", [](A s, T beta, A ref, A sum) {
    tiles<T>().sum_exp_cols(data(s), ld(s), s.shape(0), s.shape(1), beta, data(ref), data(sum));
  });
  def("exp_rows",
      [](A s, A ref, A sum) { tiles<T>().exp_rows(data(s), ld(s), s.shape(0), s.shape(1), data(ref), data(sum)); });
  def("rebase", [](T ref, A own, A sum) { tiles<T>().rebase(own.size(), ref, data(own), data(sum)); });
  def("merge", [](A max, A sum, A tile_max, A tile_sum) {
    tiles<T>().merge(max.size(), data(max), data(sum), data(tile_max), data(tile_sum));
  });
  def("factors", [](T ref, A lse, A weight, T weight_scale, A out) {
    tiles<T>().factors(lse.size(), ref, data(lse), data(weight), weight_scale, data(out));
  });
  def("weights", [](A s, A w, T beta, T ref, A row, A col, bool add) {
    tiles<T>().weights(data(s), ld(s), data(w), ld(w), s.shape(0), s.shape(1), beta, ref, data(row), data(col), add);
  });
  def("weights_wide", [](A s, A w, T beta, Maybe row_ref, Maybe row, Maybe col_ref, Maybe col, bool add) {
    tiles<T>().weights_wide(data(s), ld(s), data(w), ld(w), s.shape(0), s.shape(1), beta, data(row_ref), data(row),
                            data(col_ref), data(col), add);
  });
  def("softplus",
      [](A s, T bias, A sum) { tiles<T>().softplus(data(s), ld(s), s.shape(0), s.shape(1), bias, data(sum)); });
  def("softplus_weights", [](A s, T bias, A weight, A sum, A weight_sum) {
    tiles<T>().softplus_weights(data(s), ld(s), s.shape(0), s.shape(1), bias, data(weight), data(sum),
                                data(weight_sum));
  });
  def("add", [](A dst, A src) { tiles<T>().add(data(dst), ld(dst), data(src), ld(src), src.shape(0), src.shape(1)); });
  def("scale_rows", [](A dst, A src, A factor) {
    tiles<T>().scale_rows(data(dst), ld(dst), data(src), ld(src), data(factor), src.shape(0), src.shape(1));
  });
  def("divide", [](A x, T divisor) { tiles<T>().divide(data(x), divisor, x.size()); });
  def("dot", [](A a, A b) { return tiles<T>().dot(data(a), data(b), a.size()); });
  def("axpy", [](A y, T a, A x) { tiles<T>().axpy(data(y), a, data(x), x.size()); });
  def("exp", [](A x, A out) { tiles<T>().exp(data(x), data(out), x.size()); });
  // 16-bit numbers come as their bits, bfloat16 told by name: NumPy has no such type
  def("load", [](py::array src, const std::string& dtype, A dst, T factor) {
    tiles<T>().load(src.data(), kind(dtype), src.strides(0) / src.itemsize(), src.strides(1) / src.itemsize(),
                    data(dst), src.shape(0), src.shape(1), factor);
  });
  def("store", [](A src, const std::string& dtype, py::array dst) {
    tiles<T>().store(data(src), dst.mutable_data(), kind(dtype), dst.strides(0) / dst.itemsize(), src.shape(0),
                     src.shape(1));
  });
}

}  // namespace

PYBIND11_MODULE(sslkernels_tiles, m) {
  bind<float>(m.def_submodule("float32"));
  bind<double>(m.def_submodule("float64"));
  m.def("philox", [](uint64_t seed, uint64_t stream, uint64_t block) {
    const sslkernels::Philox random = sslkernels::philox(seed, stream, block);
    return std::vector<uint32_t>(random.words, random.words + 4);
  });
  m.def("blocks_of", &sslkernels::blocks_of);
  m.def("plan_parts", [](i64 rows, i64 cols, i64 strip, i64 multiprocessors) {
    const sslkernels::Parts parts = sslkernels::plan_parts(rows, cols, strip, multiprocessors);
    return std::make_tuple(parts.strips, parts.count, parts.rows);
  });
  m.def("plan_launches", [](const std::vector<i64>& numels, size_t capacity) {
    std::vector<std::tuple<size_t, size_t, i64>> launches;
    for (const sslkernels::Launch& part : sslkernels::plan_launches(numels, capacity))
      launches.emplace_back(part.begin, part.end, part.blocks);
    return launches;
  });
  m.def("find_tensor", [](const std::vector<uint32_t>& first_block, uint32_t block) {
    return sslkernels::find_tensor(first_block.data(), static_cast<int>(first_block.size()), block);
  });
  m.def("is_dense", &sslkernels::is_dense);
  m.def("level", [] { return static_cast<int>(sslkernels::level()); });
  m.def("set_level", [](int cap) { sslkernels::set_level(static_cast<Level>(cap)); });
}
