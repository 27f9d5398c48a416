# SPDX-License-Identifier: Apache-2.0
"""DINO, iBOT, SwAV and KoLeo over ranks; their centres are the same everywhere, and those of one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from contract import EVEN, UNEVEN, Setting
from contract import check as check_contract
from prototype_cases import WithMean, centers_on, koleo_by_ring, koleo_on, module_steps, wrong_on_rank_1
from torch import Tensor

from sslkernels import losses, ops

NAMES = ["dino", "dino_rows", "dino_sinkhorn", "ibot", "ibot_sinkhorn", "swav", "swav_queue", "koleo"]

check = functools.partial(check_contract, module="prototype_cases")


@pytest.mark.parametrize("group", ["2", "3", "4", "subgroup"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_one_process(ranks: Any, name: str, group: str) -> None:
    check(ranks, name, group, Setting(UNEVEN))


@pytest.mark.parametrize("name", ["dino", "ibot", "ibot_sinkhorn", "swav_queue", "koleo"])
def test_batches_of_one_size_compared_once(ranks: Any, name: str) -> None:
    check(ranks, name, "2", Setting(EVEN, check="first"))


@pytest.mark.parametrize("name", ["dino", "dino_rows", "dino_sinkhorn", "ibot_first", "swav_queue", "koleo"])
def test_compiled(ranks: Any, name: str) -> None:
    check(ranks, name, "2", Setting(UNEVEN, compiled=True))


@pytest.mark.parametrize("name", ["dino_sinkhorn", "ibot_first", "koleo"])
def test_compiled_for_batches_of_one_size(ranks: Any, name: str) -> None:
    check(ranks, name, "2", Setting(EVEN, check="first", compiled=True))


@pytest.mark.parametrize("name", ["dino", "ibot_sinkhorn", "koleo"])
def test_gradients_accumulate(ranks: Any, name: str) -> None:
    check(ranks, name, "2", Setting(UNEVEN, micro_batches=2))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_narrow_dtypes(ranks: Any, name: str, dtype: torch.dtype, tolerance: float) -> None:
    check(ranks, name, "2", Setting(UNEVEN, dtype=dtype), tolerance)


def rows_of(count: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(count, 9, dtype=torch.float64)


def codes_of(scores: Tensor, center: Tensor, epsilon: float) -> Tensor:
    return ((scores - center) / epsilon).softmax(-1)


# rows of two views on each rank; a rank may have none
SHARES = ((4, 1), (0, 5), (3, 0), (7, 2))


@pytest.mark.parametrize(("group", "shares"), [("2", SHARES), ("4", SHARES), ("subgroup", SHARES[2:])])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_is_that_of_all_rows(ranks: Any, group: str, shares: Any, iterations: int) -> None:
    views = [[rows_of(count, 1 + rank) for count in counts] for rank, counts in enumerate(shares)]
    views = views[: 4 if group == "4" else 2]
    found = ranks.run(centers_on, group, views, iterations, 0.5)
    for center, *parts in zip(found[0], *views):
        exact = ops.sinkhorn_center(torch.cat(parts), iterations, 0.5)
        torch.testing.assert_close(center, exact, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(center, found[0]) for center in found)


@pytest.mark.parametrize(("scale", "epsilon"), [(1.0, 0.5), (0.1, 0.05), (100.0, 0.04)])
def test_sinkhorn_in_float32(ranks: Any, scale: float, epsilon: float) -> None:
    """Codes within the design's bound, also beyond the range of exp; the ranks still have the same bits."""
    views = [[rows_of(count, scale).float()] for count in (5, 0, 3)]
    found = ranks.run(centers_on, "3", views, 3, epsilon)
    x = torch.cat([own for (own,) in views])
    error = codes_of(x, found[0][0], epsilon).double() - ops.sinkhorn_knopp(x.double(), 3, epsilon)
    assert error.abs().max() <= max(1e-5, 4 * 2.0**-23 * x.abs().max() / epsilon)
    assert all(torch.equal(center, found[0]) for center in found)


def test_sinkhorn_of_hidden_and_far_scores(ranks: Any) -> None:
    """A prototype that one rank hides, ranks whose scores are far from each other's; NaN and +inf spoil all ranks."""
    first, second = rows_of(5), rows_of(4) + 40.0
    first[:, 2], second[1, 3] = -torch.inf, -torch.inf
    found = ranks.run(centers_on, "2", [[first], [second]], 3, 0.05)
    exact = ops.sinkhorn_knopp(torch.cat([first, second]), 3, 0.05)
    codes = torch.cat([codes_of(x, center[0], 0.05) for x, center in zip((first, second), found)])
    torch.testing.assert_close(codes, exact, rtol=1e-10, atol=1e-12)
    second[:, 2] = -torch.inf  # now nobody shows it
    for bad in (-torch.inf, torch.nan, torch.inf):
        second[0, 2] = bad
        for x, center in zip((first, second), ranks.run(centers_on, "2", [[first], [second]], 3, 0.05)):
            assert codes_of(x, center[0], 0.05).isnan().all()


def test_first_sinkhorn_centre_where_nobody_shows_a_prototype(ranks: Any) -> None:
    """-inf there, as in one process, and no NaN."""
    views = [rows_of(5), rows_of(4)]
    for x in views:
        x[:, 2] = -torch.inf
    exact = ops.sinkhorn_center(torch.cat(views), 1, 0.5)
    assert exact[2] == -torch.inf
    for center in ranks.run(centers_on, "2", [[x] for x in views], 1, 0.5):
        torch.testing.assert_close(center[0], exact, rtol=1e-12, atol=1e-12)


def dino_arguments(sizes: Any) -> list[tuple[Any, ...]]:
    """Of each rank."""
    views = [[rows_of(n, 1 + rank) for _ in range(5)] for rank, n in enumerate(sizes)]
    return [(own[:2], own[1:]) for own in views]


def ibot_arguments(sizes: Any, *, chosen: bool = False) -> list[tuple[Any, ...]]:
    """Masked tokens of each rank, of which the last has none; `chosen`: with a center_mean."""
    found = []
    for rank, n in enumerate(sizes):
        mask = torch.rand(n, 8) < (0.5 if rank < len(sizes) - 1 else 0.0)
        count = int(mask.sum())
        mean = (rows_of(1)[0],) if chosen else ()
        found.append((rows_of(count, 1 + rank), rows_of(count), mask, *mean))
    return found


def together(arguments: list[tuple[Any, ...]], name: str) -> tuple[Any, ...]:
    """What one process is given that has the rows of all ranks."""
    if name.startswith("DINO"):
        return tuple([torch.cat(views) for views in zip(*side)] for side in zip(*arguments))
    teacher, student, mask, *mean = zip(*arguments)
    images = torch.tensor([len(m) for m in mask], dtype=torch.float64)
    means = [(torch.stack(x).T @ images) / images.sum() for x in mean]
    return torch.cat(teacher), torch.cat(student), torch.cat(mask), *means


MODULES = {
    "DINO": (functools.partial(losses.DINOLoss, 9, center_mode="mean"), dino_arguments),
    "DINO by Sinkhorn": (functools.partial(losses.DINOLoss, 9, center_mode="sinkhorn_knopp"), dino_arguments),
    "iBOT": (functools.partial(losses.IBOTPatchLoss, 9), ibot_arguments),
    "iBOT by Sinkhorn": (functools.partial(losses.IBOTPatchLoss, 9, center_mode="sinkhorn_knopp"), ibot_arguments),
    "iBOT of all tokens": (functools.partial(WithMean, 9), functools.partial(ibot_arguments, chosen=True)),
}


@pytest.mark.parametrize(
    ("name", "group", "compiled"),
    [(name, group, False) for name in MODULES for group in "23"]
    + [("DINO by Sinkhorn", "2", True), ("iBOT", "2", True)],
)
def test_modules_over_steps(ranks: Any, name: str, group: str, compiled: bool) -> None:
    """The centre is the same on all ranks and that of one process, step by step."""
    make, arguments = MODULES[name]
    steps = [arguments(UNEVEN[: int(group)]) for _ in range(3)]
    outcomes = ranks.run(module_steps, group, make, steps, compiled)
    exact, center = module_steps(None, make, [[together(step, name)] for step in steps])
    mean = torch.stack([torch.stack(found) for found, _ in outcomes]).mean(0)
    torch.testing.assert_close(mean, torch.stack(exact), rtol=1e-10, atol=0)
    for _, found in outcomes:
        assert torch.equal(found, outcomes[0][1])
        torch.testing.assert_close(found, center, rtol=1e-12, atol=1e-14)
    assert center.any() == ("Sinkhorn" not in name)


def test_dino_centre_is_lightlys(ranks: Any) -> None:
    """Its rule on even batches: the ranks' means are summed and divided by their number."""
    step = dino_arguments((4, 4))
    outcomes = ranks.run(module_steps, "2", functools.partial(losses.DINOLoss, 9, center_momentum=0.8), [step])
    own_means = [torch.stack(teacher).mean((0, 1)) for teacher, _ in step]
    for _, center in outcomes:
        torch.testing.assert_close(center.flatten(), 0.2 * (own_means[0] + own_means[1]) / 2)


def test_no_rank_has_a_masked_token(ranks: Any) -> None:
    """Nothing is learned, and the centre stays as the step before has left it."""
    some = ibot_arguments((3, 2))
    none = [(rows_of(0), rows_of(0), torch.zeros(n, 8, dtype=torch.bool)) for n in (3, 2)]
    for mode in ("mean", "sinkhorn_knopp"):
        make = functools.partial(losses.IBOTPatchLoss, 9, center_mode=mode)
        before, after = (ranks.run(module_steps, "2", make, steps) for steps in ([some], [some, none]))
        for (_, kept), (found, center) in zip(before, after):
            assert torch.equal(center, kept) and found[1] == 0


def test_koleo_reaches_a_neighbor_on_another_rank(ranks: Any) -> None:
    """The only row of rank 0 has its neighbour on rank 1, which is pushed by it as in one process."""
    x = torch.eye(9, dtype=torch.float64)[:6] + 0.01 * rows_of(6)
    x[0] = x[2] + 0.1 * rows_of(1)[0]
    x.requires_grad_()
    loss = losses.koleo_loss(x)
    loss.backward()
    sizes = (1, 3, 2)
    outcomes = ranks.run(koleo_on, "3", x.detach().split(sizes))
    torch.testing.assert_close(torch.stack([value for value, _ in outcomes]).mean(), loss.detach())
    assert x.grad is not None
    for (_, grad), exact in zip(outcomes, x.grad.split(sizes)):
        torch.testing.assert_close(grad / 3, exact, rtol=1e-10, atol=1e-12)


def test_koleo_of_equal_rows_on_different_ranks(ranks: Any) -> None:
    """No direction leads them apart: a constant, and no gradient, as in one process."""
    row = rows_of(1)
    exact = losses.koleo_loss(row.expand(2, -1))
    for value, grad in ranks.run(koleo_on, "2", [row, row.clone()]):
        torch.testing.assert_close(value, exact)
        assert not grad.any()


def test_koleo_of_a_neighbor_of_no_length_on_another_rank(ranks: Any) -> None:
    """The pair adds a constant, and no gradient to the row of zeros, as in one process."""
    x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [-1.0, 0.1, 0.0]], dtype=torch.float64, requires_grad=True)
    exact = losses.koleo_loss(x)
    exact.backward()
    assert x.grad is not None and not x.grad[1].any()
    outcomes = ranks.run(koleo_on, "2", x.detach().split((1, 2)))
    torch.testing.assert_close(torch.stack([value for value, _ in outcomes]).mean(), exact.detach())
    torch.testing.assert_close(torch.cat([grad for _, grad in outcomes]) / 2, x.grad, rtol=1e-10, atol=1e-12)


def test_koleo_by_ring_is_refused(ranks: Any) -> None:
    for found in ranks.run(koleo_by_ring, "2"):
        for error in found:
            assert error.startswith("ValueError: strategy must be 'gather', which is all that KoLeo offers, got 'ring'")


FAULTS = {
    "teacher rows": "ValueError in dino_loss: teacher_out[1] must have the (B, V) of teacher_out[0] (4, 7), got (3, 7)",
    "local width": "ValueError in dino_loss: student_out[3] must have the (B, V) of student_out[0] (4, 7), got (4, 6)",
    "local dtype": "TypeError in dino_loss: student_out[4] must have the dtype of student_out[0]",
    "local device": "ValueError in dino_loss: student_out[4] must be on the device of student_out[0] (cpu), got meta",
    "crop dtype": "TypeError in swav_loss: low_resolution_outputs[1] must have the dtype of high_resolution_outputs[0]",
    "center_mean": "ValueError in ibot_patch_loss: center_mean must not be given with center_mode='sinkhorn_knopp'",
    "ring": "ValueError in koleo_loss: strategy must be 'gather'",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_on_one_rank_is_an_error_on_all(ranks: Any, fault: str) -> None:
    other, own = ranks.run(wrong_on_rank_1, "2", fault)
    kind, _, message = FAULTS[fault].partition(" in ")
    assert own.startswith(f"{kind}: {message.split(': ', 1)[1]}"), own
    assert other.startswith(f"RuntimeError: rank 1 raised {FAULTS[fault]}"), other


def test_queues_of_another_dtype_on_one_rank(ranks: Any) -> None:
    for error in ranks.run(wrong_on_rank_1, "2", "queue dtype"):
        assert error.startswith("RuntimeError: swav_loss: the ranks disagree on queue: "), error
        assert error.endswith("'torch.float32, torch.float64' on rank 1"), error


def test_repr_names_the_group() -> None:
    assert "process_group=world" in repr(losses.DINOLoss(9, process_group="world"))
    assert "process_group=world" in repr(losses.SwaVLoss(sinkhorn_gather_distributed=True))
    assert repr(losses.KoLeoLoss(process_group="world")) == "KoLeoLoss(p=2, eps=1e-08, process_group=world)"
