# SPDX-License-Identifier: Apache-2.0
"""Self-distillation over prototypes as modules: DINO, iBOT's patch loss, SwAV. Each is its function plus a centre.

Constructors and `forward` take what lightly's class of that name takes, and their `state_dict` is interchangeable.

Where `weight` is given to `forward`, the outputs are the hidden rows before the head's last layer (256 wide, of unit
length), `weight` its prototypes, and the logits, 65,536 a row, are not stored; else the outputs are logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sslkernels import _checks as check
from sslkernels.distributed import Batch
from sslkernels.distributed.distillation import sinkhorn_centers
from sslkernels.losses._distillation import Views, dino_loss, ibot_patch_loss
from sslkernels.losses._module import shown_span, spanning
from sslkernels.losses._swav import swav_loss

__all__ = ["DINOLoss", "IBOTPatchLoss", "SwaVLoss", "dino_loss", "ibot_patch_loss", "swav_loss"]

CENTER_MODES = ("mean", "sinkhorn_knopp")


class DINOLoss(nn.Module):
    """`dino_loss` with the centre and the teacher temperature of DINO.

    The centre of this batch's loss is the one from before it; then centre = momentum * centre + (1 - momentum) * mean
    of the teacher's logits, in every forward, as in DINO, DINOv2 and lightly.

    Args:
        output_dim: V, the number of prototypes.
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs: with `epoch` given to forward, the teacher's
            temperature goes from the first to the second in that many epochs, linearly; without, it is teacher_temp.
            DINOv2 goes from 0.04 to 0.07 by iterations: give `teacher_temp` to forward.
        student_temp: the student's temperature.
        center_momentum: of the centre.
        center_mode: "mean", or "sinkhorn_knopp": DINOv2's option, whose centre balances the prototypes over this
            batch's teacher rows of all views, in three iterations; the buffer then stays as it is.
        process_group: as in `dino_loss`; the centre, of either mode, is then that of the rows of all ranks, and the
            same on each.

    `forward(teacher_out, student_out, teacher_temp=None, epoch=None, *, weight=None, teacher_weight=None,
    inplace=False)` takes what `dino_loss` does; lightly's lists of (B, V) among it. With weight and "sinkhorn_knopp"
    the teacher's logits are stored, since each iteration reads them; the student's are not.

    Example:
        >>> loss_fn = DINOLoss(output_dim=32)
        >>> teacher = [torch.randn(4, 32) for _ in range(2)]
        >>> student = [torch.randn(4, 32, requires_grad=True) for _ in range(6)]
        >>> loss_fn(teacher, student, epoch=0).backward()
    """

    center: Tensor

    def __init__(
        self,
        output_dim: int = 65536,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 30,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_mode: str = "mean",
        *,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        self.process_group = process_group
        _check_options(output_dim, center_mode, center_momentum, teacher_temp=teacher_temp, student_temp=student_temp)
        check.positive("warmup_teacher_temp", warmup_teacher_temp)
        check.integer("warmup_teacher_temp_epochs", warmup_teacher_temp_epochs, 0)
        self.warmup_teacher_temp, self.teacher_temp = warmup_teacher_temp, teacher_temp
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs
        self.student_temp, self.center_momentum, self.center_mode = student_temp, center_momentum, center_mode
        self.register_buffer("center", torch.zeros(1, 1, output_dim))

    def forward(
        self,
        teacher_out: Views,
        student_out: Views,
        teacher_temp: float | None = None,
        epoch: int | None = None,
        *,
        weight: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        inplace: bool = False,
    ) -> Tensor:
        temperature = self.temperature(epoch) if teacher_temp is None else teacher_temp
        call: dict[str, Any] = {"weight": weight, "teacher_weight": teacher_weight, "inplace": inplace}
        call.update(student_temp=self.student_temp, process_group=self.process_group)
        if self.center_mode == "mean":
            loss, mean = dino_loss(teacher_out, student_out, self.center, temperature, return_center=True, **call)
            _move(self.center, mean, self.center_momentum)
            return loss

        def center(batch: Batch) -> Tensor | None:
            views = [teacher_out] if isinstance(teacher_out, Tensor) else list(teacher_out)
            rows = [x.flatten(0, -2) for x in views]
            together = rows[0] if len(rows) == 1 else torch.cat(rows)
            return _balanced(batch, together, temperature, weight, teacher_weight)

        return dino_loss(teacher_out, student_out, center, temperature, **call)

    def temperature(self, epoch: int | None) -> float:
        """The teacher's temperature in an epoch."""
        last = self.warmup_teacher_temp_epochs - 1
        if epoch is None or epoch > last:
            return self.teacher_temp
        return self.warmup_teacher_temp + (self.teacher_temp - self.warmup_teacher_temp) * epoch / max(last, 1)

    def extra_repr(self) -> str:
        names = ("warmup_teacher_temp", "teacher_temp", "warmup_teacher_temp_epochs", "student_temp")
        return _shown(self, self.center.shape[-1], *names, "center_momentum", "center_mode")


class Center(nn.Module):
    """A centre (1, V) as a module of its own, which is where lightly's iBOT loss keeps it."""

    center: Tensor

    def __init__(self, output_dim: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(1, output_dim))


class IBOTPatchLoss(nn.Module):
    """`ibot_patch_loss` with a centre of the patch tokens.

    The centre of this batch's loss is the one from before it, then it moves as in `DINOLoss`, by the mean of the given
    masked tokens: DINOv2's and lightly's rule. iBOT's own takes all patch tokens of the teacher, masked or not: give
    their mean logits as `center_mean`. A batch without a masked token has a loss of 0 and leaves the centre as it is;
    so has a rank without one its part in the exchanges.

    Args:
        output_dim: V, the number of prototypes.
        teacher_temp, student_temp: temperatures.
        center_mode: "mean", or "sinkhorn_knopp" over the masked tokens, as in `DINOLoss`.
        center_momentum: of the centre.
        process_group: as in `DINOLoss`.

    `forward(teacher_out, student_out, mask, teacher_temp=None, *, weight=None, teacher_weight=None, center_mean=None,
    inplace=False)`.

    Example:
        >>> mask = torch.rand(4, 7, 7) < 0.3
        >>> student = torch.randn(int(mask.sum()), 32, requires_grad=True)
        >>> IBOTPatchLoss(output_dim=32)(torch.randn(student.shape), student, mask).backward()
    """

    def __init__(
        self,
        output_dim: int = 65536,
        teacher_temp: float = 0.04,
        student_temp: float = 0.1,
        center_mode: str = "mean",
        center_momentum: float = 0.9,
        *,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        self.process_group = process_group
        _check_options(output_dim, center_mode, center_momentum, teacher_temp=teacher_temp, student_temp=student_temp)
        self.teacher_temp, self.student_temp = teacher_temp, student_temp
        self.center_momentum, self.center_mode = center_momentum, center_mode
        self.center = Center(output_dim)

    def forward(
        self,
        teacher_out: Tensor,
        student_out: Tensor,
        mask: Tensor,
        teacher_temp: float | None = None,
        *,
        weight: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        center_mean: Tensor | None = None,
        inplace: bool = False,
    ) -> Tensor:
        temperature, center = self.teacher_temp if teacher_temp is None else teacher_temp, self.center.center
        call: dict[str, Any] = {"weight": weight, "teacher_weight": teacher_weight, "inplace": inplace}
        call.update(student_temp=self.student_temp, process_group=self.process_group)
        if self.center_mode == "sinkhorn_knopp":

            def balanced(batch: Batch) -> Tensor | None:
                return _balanced(batch, teacher_out, temperature, weight, teacher_weight)

            call.update(center_mean=center_mean)  # which it refuses, where other ranks hear of it
            return ibot_patch_loss(teacher_out, student_out, mask, balanced, temperature, **call)
        call.update(return_center=True, center_mean=center_mean)
        loss, mean = ibot_patch_loss(teacher_out, student_out, mask, center, temperature, **call)
        _move(center, mean, self.center_momentum)
        return loss

    def extra_repr(self) -> str:
        names = ("teacher_temp", "student_temp", "center_mode", "center_momentum")
        return _shown(self, self.center.center.shape[-1], *names)


class SwaVLoss(nn.Module):
    """`swav_loss` as a module.

    Args:
        temperature: of the predictions.
        sinkhorn_iterations, sinkhorn_epsilon: of the codes, as in `sinkhorn_knopp`.
        sinkhorn_gather_distributed: True is process_group="world", as lightly's.
        process_group: as in `swav_loss`.

    Example:
        >>> high = [torch.randn(4, 32, requires_grad=True) for _ in range(2)]
        >>> SwaVLoss()(high, [torch.randn(4, 32, requires_grad=True)]).backward()
    """

    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        sinkhorn_epsilon: float = 0.05,
        sinkhorn_gather_distributed: bool = False,
        *,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        check.positive("temperature", temperature)
        check.integer("sinkhorn_iterations", sinkhorn_iterations, 1)
        check.positive("sinkhorn_epsilon", sinkhorn_epsilon)
        self.process_group = spanning(sinkhorn_gather_distributed, process_group, None)["process_group"]
        self.temperature = temperature
        self.sinkhorn_iterations, self.sinkhorn_epsilon = sinkhorn_iterations, sinkhorn_epsilon

    def forward(
        self,
        high_resolution_outputs: Sequence[Tensor],
        low_resolution_outputs: Sequence[Tensor] = (),
        queue_outputs: Sequence[Tensor] | None = None,
    ) -> Tensor:
        options = (self.temperature, self.sinkhorn_iterations, self.sinkhorn_epsilon)
        outputs = high_resolution_outputs, low_resolution_outputs, queue_outputs
        return swav_loss(*outputs, *options, process_group=self.process_group)

    def extra_repr(self) -> str:
        return _shown(self, None, "temperature", "sinkhorn_iterations", "sinkhorn_epsilon")


@torch.no_grad()
def _move(center: Tensor, mean: Tensor, momentum: float) -> None:
    center.lerp_(mean.to(center.dtype).view_as(center), 1 - momentum)


@torch.no_grad()
def _balanced(
    batch: Batch, rows: Tensor, temperature: float, weight: Tensor | None, teacher_weight: Tensor | None
) -> Tensor | None:
    """The centre of DINOv2's Sinkhorn over the teacher's rows, logits or hidden; none where there are no rows."""
    if batch.local and not rows.shape[0]:
        return None
    prototypes = weight if teacher_weight is None else teacher_weight
    logits = rows if prototypes is None else nn.functional.linear(rows, prototypes)
    return sinkhorn_centers(batch, [logits], 3, temperature)


def _check_options(output_dim: int, center_mode: str, center_momentum: float, **temperatures: float) -> None:
    check.integer("output_dim", output_dim, 1)
    check.choice("center_mode", center_mode, CENTER_MODES)
    check.in_range("center_momentum", center_momentum, 0.0, 1.0)
    for name, x in temperatures.items():
        check.positive(name, x)


def _shown(module: nn.Module, output_dim: int | None, *names: str) -> str:
    shown = {} if output_dim is None else {"output_dim": output_dim}
    shown.update({name: getattr(module, name) for name in names})
    span = shown_span({"process_group": module.process_group, "strategy": None})
    return ", ".join([*(f"{name}={x}" for name, x in shown.items()), *span])
