# SPDX-License-Identifier: Apache-2.0
"""What the contrastive ops refuse: by the argument's name, with what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sslkernels
from sslkernels import _checks, ops
from sslkernels.ops import Exclude

N, M, D = 6, 8, 4


def arguments() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Each public function with arguments that it takes."""
    q, k = torch.randn(N, D), torch.randn(M, D)
    pair = {"q": q, "k": k, "scale": 1.0}
    return {
        "similarity_logsumexp": (ops.similarity_logsumexp, pair),
        "self_similarity_logsumexp": (ops.self_similarity_logsumexp, {"z": q, "scale": 1.0}),
        "similarity_cross_entropy": (ops.similarity_cross_entropy, {**pair, "positive": torch.randn(N), "weight": 1.0}),
        "similarity_softplus": (ops.similarity_softplus, {**pair, "bias": 0.0}),
        "similarity_softplus_sum": (ops.similarity_softplus_sum, {**pair, "bias": 0.0, "weight": 1.0}),
        "sampled_logsumexp": (ops.sampled_logsumexp, {**pair, "indices": torch.randint(M, (N, 3))}),
    }


FUNCTIONS = list(arguments())


def refuse(name: str, error: type[Exception], message: str, **changed: Any) -> None:
    function, kept = arguments()[name]
    with pytest.raises(error, match=message):
        function(**{**kept, **changed})


def with_argument(*wanted: str) -> list[tuple[str, str]]:
    return [(name, key) for name in FUNCTIONS for key in arguments()[name][1] if key in wanted]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_these_arguments_are_taken(name: str) -> None:
    function, kept = arguments()[name]
    function(**kept)


features = pytest.mark.parametrize(("name", "key"), with_argument("q", "k", "z"))
scalars = pytest.mark.parametrize(("name", "key"), with_argument("scale", "bias", "weight"))


class TestFeatures:
    @features
    @pytest.mark.parametrize("shape", [(), (D,), (N, 1, D)], ids=str)
    def test_rank(self, name: str, key: str, shape: tuple[int, ...]) -> None:
        message = rf"^{key} must be 2-D \(rows, features\), got shape \({', '.join(map(str, shape))},?\)$"
        refuse(name, ValueError, message, **{key: torch.randn(shape)})

    @pytest.mark.parametrize("name", [name for name in FUNCTIONS if "k" in arguments()[name][1]])
    def test_width(self, name: str) -> None:
        refuse(name, ValueError, r"k must have as many features as q \(4\), got shape \(8, 5\)", k=torch.randn(M, 5))

    @features
    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8], ids=str)
    def test_non_floating(self, name: str, key: str, dtype: torch.dtype) -> None:
        refuse(name, TypeError, f"{key} must have a floating dtype, got {dtype}", **{key: torch.ones(N, D).to(dtype)})

    @features
    def test_a_float_of_8_bits(self, name: str, key: str) -> None:
        message = f"{key} must be float32, float64, bfloat16 or float16, got torch.float8_e4m3fn"
        refuse(name, TypeError, message, **{key: torch.ones(N, D).to(torch.float8_e4m3fn)})

    @pytest.mark.parametrize("name", [name for name in FUNCTIONS if "k" in arguments()[name][1]])
    def test_device(self, name: str) -> None:
        refuse(name, ValueError, r"k must be on the device of q \(cpu\), got meta", k=torch.randn(M, D, device="meta"))

    @features
    @pytest.mark.parametrize("value", [None, 1.0, [[1.0]]], ids=str)
    def test_no_tensor(self, name: str, key: str, value: Any) -> None:
        refuse(name, TypeError, f"{key} must be a torch.Tensor, got {type(value).__name__}", **{key: value})

    @features
    def test_dtensor(self, name: str, key: str) -> None:
        class DTensor(torch.Tensor):
            pass

        x = torch.randn(N, D).as_subclass(DTensor)
        refuse(name, TypeError, rf"{key} is a DTensor.*pass {key}\.to_local\(\)", **{key: x})


def test_a_real_dtensor(tmp_path: Any) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x = distribute_tensor(torch.randn(N, D), init_device_mesh("cpu", (1,)))
        refuse("similarity_logsumexp", TypeError, r"q is a DTensor.*pass q\.to_local\(\)", q=x)
    finally:
        torch.distributed.destroy_process_group()


class TestNumbers:
    @scalars
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
    def test_not_finite(self, name: str, key: str, value: float) -> None:
        refuse(name, ValueError, f"{key} must be finite, got {value}", **{key: value})

    @scalars
    @pytest.mark.parametrize("value", [None, "1", True, [1.0]], ids=str)
    def test_no_number(self, name: str, key: str, value: Any) -> None:
        message = f"{key} must be a number or a tensor of one element, got {type(value).__name__}"
        refuse(name, TypeError, message, **{key: value})

    @pytest.mark.parametrize(("name", "key"), with_argument("scale", "bias"))
    @pytest.mark.parametrize("value", [torch.ones(2), torch.ones(0), torch.tensor(1)], ids=["two", "none", "integer"])
    def test_tensor(self, name: str, key: str, value: Tensor) -> None:
        message = rf"{key} must be a floating tensor of one element, got {value.dtype} \("
        refuse(name, ValueError, message, **{key: value})

    @scalars
    def test_tensor_elsewhere(self, name: str, key: str) -> None:
        refuse(name, ValueError, f"{key} must be on cpu, got meta", **{key: torch.ones((), device="meta")})


class TestRows:
    """positive and weight: one number a query."""

    rows = pytest.mark.parametrize(("name", "key"), with_argument("positive", "weight"))

    @rows
    @pytest.mark.parametrize("shape", [(N + 1,), (1,), (N, 1)], ids=str)
    def test_shape(self, name: str, key: str, shape: tuple[int, ...]) -> None:
        message = rf"{key} must have shape \({N},\), got \({', '.join(map(str, shape))},?\)"
        refuse(name, ValueError, message, **{key: torch.ones(shape)})

    @rows
    @pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16], ids=str)
    def test_dtype(self, name: str, key: str, dtype: torch.dtype) -> None:
        message = f"{key} must be one of torch.float32, torch.float64, got {dtype}"
        refuse(name, TypeError, message, **{key: torch.ones(N, dtype=dtype)})

    @rows
    def test_device(self, name: str, key: str) -> None:
        refuse(name, ValueError, f"{key} must be on cpu, got meta", **{key: torch.ones(N, device="meta")})

    def test_positive_is_a_tensor(self) -> None:
        refuse("similarity_cross_entropy", TypeError, "positive must be a torch.Tensor, got float", positive=1.0)


LABELS = torch.zeros(N, dtype=torch.int64), torch.zeros(M, dtype=torch.int64)
MASK = torch.ones(M, dtype=torch.bool)
EXCLUSIONS = {
    "period alone": (Exclude(period=3), ValueError, "exclude.period must be positive and come with exclude.diagonal"),
    "period of zero": (Exclude(0, 0), ValueError, "exclude.period must be positive.*got 0"),
    "diagonal that overflows": (
        Exclude(2**63 - 1),
        ValueError,
        r"exclude.diagonal must be .* got 9223372036854",
    ),
    "period that overflows": (
        Exclude(0, 2**62),
        ValueError,
        r"exclude.period must be between .*got 46116860",
    ),
    "negative period": (Exclude(0, -2), ValueError, "exclude.period must be positive.*got -2"),
    "queries' groups alone": (Exclude(query_groups=LABELS[0]), ValueError, "query_groups and exclude.key_groups must"),
    "keys' groups alone": (Exclude(key_groups=LABELS[1]), ValueError, "query_groups and exclude.key_groups must"),
    "too few groups": (
        Exclude(query_groups=LABELS[0][1:], key_groups=LABELS[1]),
        ValueError,
        r"exclude.query_groups must have shape \(6,\), got \(5,\)",
    ),
    "too many groups": (
        Exclude(query_groups=LABELS[0], key_groups=torch.zeros(M + 1, dtype=torch.int64)),
        ValueError,
        r"exclude.key_groups must have shape \(8,\), got \(9,\)",
    ),
    "groups of floats": (
        Exclude(query_groups=LABELS[0].float(), key_groups=LABELS[1]),
        TypeError,
        "exclude.query_groups must be one of torch.int64, got torch.float32",
    ),
    "groups of a list": (
        Exclude(query_groups=[0] * N, key_groups=LABELS[1]),  # type: ignore[arg-type]
        TypeError,
        "exclude.query_groups must be a torch.Tensor, got list",
    ),
    "groups elsewhere": (
        Exclude(query_groups=LABELS[0], key_groups=LABELS[1].to("meta")),
        ValueError,
        "exclude.key_groups must be on cpu, got meta",
    ),
    "mask of the queries": (
        Exclude(key_mask=MASK[:N]),
        ValueError,
        r"exclude.key_mask must have shape \(8,\), got \(6,\)",
    ),
    "mask of integers": (
        Exclude(key_mask=MASK.long()),
        TypeError,
        "exclude.key_mask must be one of torch.bool, got torch.int64",
    ),
    "mask elsewhere": (Exclude(key_mask=MASK.to("meta")), ValueError, "exclude.key_mask must be on cpu, got meta"),
}
TWO_SETS = [name for name in FUNCTIONS if not name.startswith(("self", "sampled"))]


class TestExclude:
    @pytest.mark.parametrize("kind", EXCLUSIONS)
    @pytest.mark.parametrize("name", TWO_SETS)
    def test_rules(self, name: str, kind: str) -> None:
        exclude, error, message = EXCLUSIONS[kind]
        refuse(name, error, message, exclude=exclude)

    @pytest.mark.parametrize(
        ("exclude", "came"),
        [
            (Exclude(diagonal=1), "diagonal 1, key_groups None"),
            (Exclude(diagonal=-1, period=3), "diagonal -1, key_groups None"),
            (Exclude(query_groups=LABELS[0], key_groups=LABELS[0]), "diagonal None, key_groups given"),
        ],
        ids=["above", "below", "key groups"],
    )
    def test_a_rule_that_is_not_symmetric(self, exclude: Exclude, came: str) -> None:
        refuse("self_similarity_logsumexp", ValueError, f"exclude must be symmetric.*got {came}", exclude=exclude)

    @pytest.mark.parametrize(
        ("exclude", "came"),
        [(Exclude(), None), (Exclude(diagonal=3), 3), (Exclude(diagonal=-1), -1), (Exclude(0, 2), 0)],
        ids=["none", "beyond", "below", "period"],
    )
    def test_positives_without_a_diagonal(self, exclude: Exclude, came: int | None) -> None:
        message = rf"return_positive needs exclude.diagonal in \[0, 2\] and no period, got {came}"
        refuse("similarity_logsumexp", ValueError, message, exclude=exclude, return_positive=True)

    @pytest.mark.parametrize("period", [None, 2, 6])
    def test_partners_without_two_views(self, period: int | None) -> None:
        message = rf"return_positive needs z of 2 \* exclude.period rows, got 6 and {period}"
        exclude = Exclude(diagonal=0, period=period)
        refuse("self_similarity_logsumexp", ValueError, message, exclude=exclude, return_positive=True)


class TestScales:
    names = pytest.mark.parametrize("name", ["similarity_logsumexp", "self_similarity_logsumexp"])

    @names
    def test_none(self, name: str) -> None:
        refuse(name, ValueError, "scales must hold at least one multiplier, got none", scales=())

    @names
    @pytest.mark.parametrize("value", [-1.0, math.nan, math.inf], ids=str)
    def test_value(self, name: str, value: float) -> None:
        refuse(name, ValueError, rf"scales must be in \[0.0, inf\), got {value}", scales=(1.0, value))

    @names
    def test_no_number(self, name: str) -> None:
        refuse(name, TypeError, "scales must be a number, got str", scales=("1",))


class TestSamples:
    name = "sampled_logsumexp"

    @pytest.mark.parametrize("shape", [(N,), (N + 1, 3), (N, 3, 1)], ids=str)
    def test_shape_of_indices(self, shape: tuple[int, ...]) -> None:
        refuse(self.name, ValueError, r"indices must have shape \(6, C\), got", indices=torch.zeros(shape).long())

    @pytest.mark.parametrize("shape", [(N,), (N, 4), (N + 1, 3)], ids=str)
    def test_shape_of_mask(self, shape: tuple[int, ...]) -> None:
        refuse(self.name, ValueError, r"mask must have shape \(6, C\), got", mask=torch.ones(shape).bool())

    def test_dtypes(self) -> None:
        indices = torch.zeros(N, 3)
        refuse(self.name, TypeError, "indices must be torch.int64, got torch.float32", indices=indices)
        refuse(self.name, TypeError, "indices must be torch.int64, got torch.int32", indices=indices.int())
        refuse(self.name, TypeError, "mask must be torch.bool, got torch.float32", mask=indices)
        refuse(self.name, TypeError, "indices must be a torch.Tensor, got list", indices=[[0]])
        refuse(self.name, TypeError, "mask must be a torch.Tensor, got int", mask=1)

    def test_device(self) -> None:
        refuse(self.name, ValueError, "indices must be on .*meta", indices=torch.zeros(N, 3, device="meta").long())

    @pytest.mark.parametrize("value", [-1, M, 2**40, -(2**63)])
    def test_an_index_outside_the_keys(self, value: int) -> None:
        indices = torch.zeros(N, 3, dtype=torch.int64)
        indices[N - 1, 2] = value
        refuse(self.name, ValueError, rf"indices must be in \[0, {M}\), got {value}", indices=indices)

    def test_an_index_outside_the_keys_where_the_mask_is_false(self) -> None:
        indices, mask = torch.full((N, 3), M), torch.zeros(N, 3, dtype=torch.bool)
        refuse(self.name, ValueError, rf"indices must be in \[0, {M}\), got {M}", indices=indices, mask=mask)

    def test_no_key_at_all(self) -> None:
        indices = torch.zeros(N, 3, dtype=torch.int64)
        refuse(self.name, ValueError, r"indices must be in \[0, 0\), got 0", indices=indices, k=torch.randn(0, D))

    @pytest.mark.parametrize("value", [-1, M])
    def test_the_kernels_check_for_themselves(self, value: int) -> None:
        """A graph calls the ops without the public function; nothing is read or written outside."""
        q, k, indices = torch.randn(N, D), torch.randn(M, D), torch.full((N, 3), value)
        op = torch.ops.sslkernels
        message = rf"indices must be in \[0, {M}\), got {value}"
        with pytest.raises(RuntimeError, match=message):
            op.sampled_logsumexp(q, k, indices, None, None, 1.0)
        with pytest.raises(RuntimeError, match=message):
            op.sampled_logsumexp_backward(torch.ones(N), q, k, indices, None, None, 1.0, torch.ones(N), [True] * 3)
        compiled = torch.compile(ops.sampled_logsumexp, fullgraph=True, backend="aot_eager")
        with pytest.raises(RuntimeError, match=message):
            compiled(q, k, indices)

    def test_check_values_may_be_turned_on_and_off(self) -> None:
        assert not _checks.check_values.enabled
        with sslkernels.check_values():
            assert _checks.check_values.enabled
            with sslkernels.check_values(False):
                assert not _checks.check_values.enabled
            assert _checks.check_values.enabled
        assert not _checks.check_values.enabled


class TestUnitRows:
    def test_nothing(self) -> None:
        with pytest.raises(ValueError, match="xs must hold at least one tensor, got none"):
            ops.l2_normalize()

    def test_features(self) -> None:
        x = torch.randn(N, D)
        with pytest.raises(ValueError, match=r"xs\[1\] must be 2-D \(rows, features\), got shape \(4,\)"):
            ops.l2_normalize(x, x[0])
        with pytest.raises(
            ValueError, match=r"xs\[1\] must have as many features as xs\[0\] \(4\), got shape \(6, 3\)"
        ):
            ops.l2_normalize(x, x[:, 1:])
        with pytest.raises(
            TypeError, match=r"xs\[1\] must have the dtype of xs\[0\] \(torch.float32\), got torch.float64"
        ):
            ops.l2_normalize(x, x.double())
        with pytest.raises(TypeError, match=r"xs\[0\] must have a floating dtype, got torch.int64"):
            ops.l2_normalize(x.long())
        with pytest.raises(ValueError, match=r"xs\[1\] must be on the device of xs\[0\] \(cpu\), got meta"):
            ops.l2_normalize(x, x.to("meta"))

    @pytest.mark.parametrize("eps", [0.0, -1.0, math.nan, math.inf], ids=str)
    def test_eps(self, eps: float) -> None:
        with pytest.raises(ValueError, match=f"eps must be positive and finite, got {eps}"):
            ops.l2_normalize(torch.randn(N, D), eps=eps)

    def test_two_views(self) -> None:
        x, call = torch.randn(3, D), ops.two_view_cross_entropy
        with pytest.raises(
            ValueError, match=r"out1 must be torch.float32 \(3, 4\) as out0, got torch.float32 \(2, 4\)"
        ):
            call(x, x[1:])
        with pytest.raises(
            ValueError, match=r"out1 must be torch.float32 \(3, 4\) as out0, got torch.float64 \(3, 4\)"
        ):
            call(x, x.double())
        with pytest.raises(ValueError, match=r"out0 must be 2-D \(rows, features\), got shape \(4,\)"):
            call(x[0], x[0])
        with pytest.raises(ValueError, match=r"out1 must have as many features as out0 \(4\), got shape \(3, 3\)"):
            call(x, x[:, 1:])
        with pytest.raises(TypeError, match=r"out1 must have a floating dtype, got torch\.int64"):
            call(x, x.long())
        with pytest.raises(ValueError, match="scale must be finite, got inf"):
            call(x, x, math.inf)
        with pytest.raises(ValueError, match=r"weight must have shape \(6,\), got \(3,\)"):
            call(x, x, weight=torch.ones(3))


def test_nothing_is_written_by_a_refused_call() -> None:
    function, kept = arguments()["sampled_logsumexp"]
    before = {key: x.clone() for key, x in kept.items() if isinstance(x, Tensor)}
    refuse("sampled_logsumexp", ValueError, "indices", indices=torch.full((N, 3), M))
    assert all(torch.equal(kept[key], x) for key, x in before.items())
    function(**kept)
