# SPDX-License-Identifier: Apache-2.0
"""Models with losses of self-distillation that span ranks, and calls of what those stand on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from contract import Case
from torch import Tensor, nn

from sslkernels import distributed, losses
from sslkernels.distributed.distillation import sinkhorn_centers

WIDTH, PROTOTYPES, PATCHES = 5, 7, 6
TEMPERATURES = {"teacher_temp": 0.5, "student_temp": 0.3}


class Distilled(nn.Module):
    """A student and prototypes that learn from a constant teacher; `loss(self, process_group, *data)`."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.student, self.prototypes = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, PROTOTYPES, bias=False)
        self.register_buffer("constant", torch.randn(WIDTH, WIDTH))
        self.loss = loss

    def forward(self, *data: Tensor, process_group: Any = None, strategy: str | None = None) -> Tensor:
        return self.loss(self, process_group, *data)

    def logits(self, x: Tensor) -> Tensor:
        return self.prototypes(self.student(x))

    def teacher(self, x: Tensor) -> Tensor:
        return x @ self.get_buffer("constant")

    def targets(self, x: Tensor) -> Tensor:
        return self.prototypes(self.teacher(x)).detach()


def crops(n: int, generator: torch.Generator) -> Sequence[Tensor]:
    """Four views, the first two global; one tensor a view, as its rows are the ranks'."""
    return [torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) for _ in range(4)]


def dino_of_logits(model: Distilled, group: Any, *views: Tensor) -> Tensor:
    teacher, student = [model.targets(x) for x in views[:2]], [model.logits(x) for x in views]
    center = torch.linspace(-1, 1, PROTOTYPES, dtype=teacher[0].dtype)
    loss, mean = losses.dino_loss(teacher, student, center, **TEMPERATURES, return_center=True, process_group=group)
    return loss + 0.0 * mean.sum()


def dino_of_rows(model: Distilled, group: Any, *views: Tensor) -> Tensor:
    student, teacher = (torch.stack([layer(x) for x in views]) for layer in (model.student, model.teacher))
    weight = model.prototypes.weight
    return losses.dino_loss(teacher[:2], student, weight=weight, **TEMPERATURES, process_group=group)


def dino_with_sinkhorn(model: Distilled, group: Any, *views: Tensor) -> Tensor:
    teacher, student = (torch.stack([make(x) for x in views]) for make in (model.targets, model.logits))

    def center(batch: distributed.Batch) -> Tensor:
        return sinkhorn_centers(batch, [teacher[:2].flatten(0, 1)], 3, 0.5)

    return losses.dino_loss(teacher[:2], student, center, **TEMPERATURES, process_group=group)


dino = Case(lambda: Distilled(dino_of_logits), crops)
dino_rows = Case(lambda: Distilled(dino_of_rows), crops)
dino_sinkhorn = Case(lambda: Distilled(dino_with_sinkhorn), crops)


def images(n: int, generator: torch.Generator) -> Sequence[Tensor]:
    """Patches and a mask that leaves the first rank none, other images one to all, and some again none."""
    patches = torch.randn(n, PATCHES, WIDTH, generator=generator, dtype=torch.float64)
    mask = torch.rand(n, PATCHES, generator=generator) < 0.4
    mask[6], mask[7:9, 0] = False, True
    mask[:6] = False
    return patches, mask


def first_patches(n: int, generator: torch.Generator) -> Sequence[Tensor]:
    """The same number of masked patches in each image, so that a compiler knows how many there are."""
    patches, _ = images(n, generator)
    return patches, (torch.arange(PATCHES) < 2).expand(n, -1).contiguous()


def ibot_of(select: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def ibot(model: Distilled, group: Any, patches: Tensor, mask: Tensor) -> Tensor:
        tokens = select(patches, mask)
        options = {**TEMPERATURES, "return_center": True, "process_group": group}
        loss, mean = losses.ibot_patch_loss(model.targets(tokens), model.logits(tokens), mask, **options)
        return loss + 0.0 * mean.sum()

    return ibot


def ibot_with_sinkhorn(model: Distilled, group: Any, patches: Tensor, mask: Tensor) -> Tensor:
    tokens = patches[mask]
    teacher, student, weight = model.teacher(tokens), model.student(tokens), model.prototypes.weight

    def center(batch: distributed.Batch) -> Tensor:
        return sinkhorn_centers(batch, [F.linear(teacher, weight)], 3, 0.5)

    return losses.ibot_patch_loss(teacher, student, mask, center, weight=weight, **TEMPERATURES, process_group=group)


ibot = Case(lambda: Distilled(ibot_of(lambda patches, mask: patches[mask])), images)
ibot_first = Case(lambda: Distilled(ibot_of(lambda patches, mask: patches[:, :2].flatten(0, 1))), first_patches)
ibot_sinkhorn = Case(lambda: Distilled(ibot_with_sinkhorn), images)


def clusters(model: Distilled, group: Any, a: Tensor, b: Tensor, c: Tensor, *queues: Tensor) -> Tensor:
    high, low = [model.logits(x) for x in (a, b)], [model.logits(c)]
    queued = [model.targets(x.flatten(0, 1)) for x in queues] or None
    return losses.swav_loss(high, low, queued, 0.3, 3, 0.5, process_group=group)


def with_queues(n: int, generator: torch.Generator) -> Sequence[Tensor]:
    """For each sample three stored ones of the first crop and two of the second."""
    queues = [torch.randn(n, length, WIDTH, generator=generator, dtype=torch.float64) for length in (3, 2)]
    return *crops(n, generator)[:3], *queues


swav = Case(lambda: Distilled(clusters), lambda n, generator: crops(n, generator)[:3])
swav_queue = Case(lambda: Distilled(clusters), with_queues)


def spread(model: Distilled, group: Any, x: Tensor) -> Tensor:
    return losses.koleo_loss(model.logits(x), process_group=group)


koleo = Case(lambda: Distilled(spread), lambda n, generator: crops(n, generator)[:1])


# what runs on the ranks beside the contract


def centers_on(group: Any, views: Sequence[Sequence[Tensor]], iterations: int, epsilon: float) -> Tensor:
    """Of the views of this rank among those of all."""
    own = views[torch.distributed.get_rank(group)]
    batch = distributed.batch(group, None, "centers", first=own[0])
    return sinkhorn_centers(batch, own, iterations, epsilon)


class WithMean(losses.IBOTPatchLoss):
    """Takes `center_mean` by its place."""

    def forward(self, teacher: Tensor, student: Tensor, mask: Tensor, *mean: Tensor, **options: Any) -> Tensor:
        return super().forward(teacher, student, mask, center_mean=mean[0] if mean else None, **options)


def module_steps(
    group: Any, make: Callable[..., nn.Module], steps: Sequence[Any], compiled: bool = False
) -> tuple[list[Tensor], Tensor]:
    """The losses of a module over several steps, which are lists of arguments by rank, and its centre after them."""
    rank = 0 if group is None else torch.distributed.get_rank(group)
    module = make(process_group=group).double()
    torch.compiler.reset()
    call = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
    found = [call(*arguments[rank]) for arguments in steps]
    return found, dict(module.named_buffers()).popitem()[1]


def koleo_on(group: Any, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    x = parts[torch.distributed.get_rank(group)].clone().requires_grad_()
    loss = losses.KoLeoLoss(process_group=group)(x)
    loss.backward()
    assert x.grad is not None
    return loss.detach(), x.grad


def wrong_on_rank_1(group: Any, name: str) -> str:
    """The error of each rank, of a call that is wrong on rank 1 alone; a step without a fault follows."""
    outcome = _error(lambda: _call(group, name if torch.distributed.get_rank(group) == 1 else ""))
    _call(group, "")
    return outcome


def _error(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _call(group: Any, fault: str) -> None:
    """Each of these losses in turn."""
    torch.manual_seed(0)
    views = [torch.randn(4, PROTOTYPES) for _ in range(5)]
    teacher, student, mask = views[:2], list(views), torch.ones(2, 2, dtype=torch.bool)
    high, low, queues = views[:2], views[2:4], [views[0][:3], views[1]]
    if fault == "teacher rows":
        teacher[1] = teacher[1][:3]
    elif fault == "local width":
        student[3] = student[3][:, 1:]
    elif fault == "local dtype":
        student[4] = student[4].double()
    elif fault == "local device":
        student[4] = student[4].to("meta")
    elif fault == "crop dtype":
        low[1] = low[1].double()
    elif fault == "queue dtype":
        queues[1] = queues[1].double()
    losses.DINOLoss(PROTOTYPES, process_group=group)(teacher, student)
    losses.SwaVLoss(process_group=group)(high, low, queues)
    ibot = losses.IBOTPatchLoss(PROTOTYPES, center_mode="sinkhorn_knopp", process_group=group)
    ibot(views[0], views[1], mask, center_mean=views[0][0] if fault == "center_mean" else None)
    ring = distributed.Group(group, strategy="ring")
    losses.koleo_loss(views[0], process_group=ring if fault == "ring" else group)


def koleo_by_ring(group: Any) -> tuple[str, str]:
    """Function and module, on all ranks."""
    ring = distributed.Group(group, strategy="ring")
    function = _error(lambda: losses.koleo_loss(torch.randn(3, 4), process_group=ring))
    found = function, _error(lambda: losses.KoLeoLoss(process_group=ring))
    _call(group, "")
    return found
