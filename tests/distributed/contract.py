# SPDX-License-Identifier: Apache-2.0
"""The contract, as a step of training: a model under DistributedDataParallel on several ranks, and alone.

A case is a function that makes a model; `model(*data, process_group=, strategy=)` is its loss. Each rank takes its own
rows of `data`, of its own size where the batch is uneven, and the rows of higher ranks are larger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sslkernels.distributed import Group

EVEN, UNEVEN = (5, 5, 5, 5), (3, 6, 2, 5)
STRATEGIES = ("gather", "ring", "bidirectional_ring")
TOLERANCES = {torch.float64: (1e-10, 1e-10), torch.bfloat16: (1e-2, 2e-2)}  # of the loss, and of each gradient

Gradients = dict[str, Tensor]


class Case(NamedTuple):
    model: Callable[[], nn.Module]
    data: Callable[[int, torch.Generator], Sequence[Tensor]]  # of so many rows


class Setting(NamedTuple):
    sizes: Sequence[int]  # rows of each rank
    strategy: str = "gather"
    check: str | None = None
    compiled: bool = False
    micro_batches: int = 1  # of a step, whose gradients accumulate
    dtype: torch.dtype = torch.float64


def _inputs(case: Case, sizes: Sequence[int], dtype: torch.dtype, seed: int) -> list[list[Tensor]]:
    """What each rank takes."""
    generator = torch.Generator().manual_seed(seed)
    parts = [x.split(list(sizes)) for x in case.data(sum(sizes), generator)]
    return [
        [(part[r] * (1 + r)).to(dtype) if part[r].is_floating_point() else part[r] for part in parts]
        for r in range(len(sizes))
    ]


def _model(case: Case, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return case.model().to(dtype)


def _gradients(model: nn.Module) -> Gradients:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def alone(case: Case, setting: Setting) -> tuple[Tensor, Gradients]:
    """The loss of one process on all rows, and its gradients: of the ranks' numbers, however rounded, in float64."""
    model, total = _model(case, setting.dtype).double(), torch.zeros((), dtype=torch.float64)
    for seed in range(setting.micro_batches):
        parts = _inputs(case, setting.sizes, setting.dtype, seed)
        rows = [torch.cat(x) for x in zip(*parts)]
        loss = model(*(x.double() if x.is_floating_point() else x for x in rows)) / setting.micro_batches
        loss.backward()
        total += loss.detach()
    return total, _gradients(model)


def step(group: Any, name: str, module: str, setting: Setting) -> tuple[Tensor, Gradients]:
    """On a rank: its loss, and the gradients that DistributedDataParallel leaves."""
    import importlib

    import torch.distributed as dist

    case, rank = getattr(importlib.import_module(module), name), dist.get_rank(group)
    model = _model(case, setting.dtype)
    options = {"process_group": Group(group, check=setting.check), "strategy": setting.strategy}
    averaged = DistributedDataParallel(model, process_group=group)
    call: Any = averaged
    if setting.compiled:
        torch.compiler.reset()
        call = torch.compile(averaged.module, backend="aot_eager", fullgraph=True)
    total = torch.zeros((), dtype=torch.float64)
    for seed in range(setting.micro_batches):
        data = _inputs(case, setting.sizes, setting.dtype, seed)[rank]
        last = seed == setting.micro_batches - 1
        with averaged.no_sync() if not last else _nothing():
            loss = call(*data, **options) / setting.micro_batches
            loss.backward()
        total += loss.detach()
    if setting.compiled:  # past DDP, whose hooks no graph takes whole
        for p in model.parameters():
            dist.all_reduce(p.grad, group=group)
            p.grad /= dist.get_world_size(group)
    return total, _gradients(model)


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def check(
    ranks: Any, name: str, group: str, setting: Setting, tolerance: float | None = None, module: str = ""
) -> None:
    """Mean of the ranks' losses and every gradient on every rank, against one process on all rows in float64.

    tolerance: of both; None is that of the features' dtype.
    """
    import importlib

    from ranks import GROUPS

    module = module or "distributed_cases"
    of_loss, of_gradients = TOLERANCES[setting.dtype] if tolerance is None else (tolerance, tolerance)
    setting = setting._replace(sizes=setting.sizes[: len(GROUPS[group])])
    case = getattr(importlib.import_module(module), name)
    loss, gradients = alone(case, setting)
    outcomes = ranks.run(step, group, name, module, setting)
    mean = torch.stack([value for value, _ in outcomes]).mean()
    assert abs(mean - loss) <= of_loss * abs(loss), f"loss {mean} instead of {loss}"
    for rank, (_, found) in enumerate(outcomes):
        assert found.keys() == gradients.keys()
        for key, exact in gradients.items():
            error, size = (found[key].double() - exact).norm(), exact.norm()
            assert error <= of_gradients * size, f"rank {rank}: gradient of {key} is wrong by {error:.1e} of {size:.1e}"
