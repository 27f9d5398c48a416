# SPDX-License-Identifier: Apache-2.0
"""DINO: crops of an image agree with a slow teacher, which sees large crops alone, on one of many prototypes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkernels.ema import EMA
from sslkernels.losses import DINOLoss
from sslkernels.methods._distillation import check_crops, rows_of_crops, teacher_metrics
from sslkernels.methods._method import Method
from sslkernels.nn import DINOHead, feature_dim


class DINO(Method):
    """Caron et al. 2021. batch = crops, a list: two global ones, then any number of local ones, each (B, C, H, W).

        s_v      = head(backbone(crop v)) / student_temp                for all crops
        p_t      = softmax((teacher(crop t) - center) / T)              for the two global ones, no gradient
        loss     = mean over pairs t != v and over the batch of -<p_t, log_softmax(s_v)>
        center  <- center_momentum * center + (1 - center_momentum) * mean of the teacher's logits      after the loss
        teacher <- m * teacher + (1 - m) * student                      in `after_step`, parameters only

    T takes `warmup_teacher_temp_steps` values at equal distances from `warmup_teacher_temp` to `teacher_temp`, and
    stays there; the original counts in epochs. m goes from `momentum` to 1 along a cosine over `total_steps`, or stays
    without them. During the first `freeze_last_layer_steps` the prototypes get no gradient. Crops of one size pass the
    backbone together, and all of them the head. Every forward moves the center, as in the original. Features are the
    teacher's, which the paper evaluates.

    metrics hold the teacher's entropy and divergence, of 32 rows: a divergence of 0 is collapse, into one prototype
    with an entropy of 0, into all of them with log(out_dim).

    Args:
        backbone: any network that takes crops of both sizes.
        out_dim: number of prototypes.
        head_options: of `DINOHead`.
        fused_head: `linear_soft_cross_entropy` of bottlenecks and prototypes, which holds a panel of logits at a time,
            in place of all of them, (crops * B, out_dim). For a large out_dim.
        center_mode: "mean" or, as DINOv2 has it, "sinkhorn_knopp", which needs no center: see `DINOLoss`.

    Source: facebookresearch/dino `main_dino.py`, `vision_transformer.py`, `utils.py`. Its gradient clipping, weight
    decay and learning rate are the training loop's.

    Example:
        >>> from sslkernels.data import multi_crop
        >>> from sslkernels.nn import VisionTransformer
        >>> method = DINO(VisionTransformer(), out_dim=1024, total_steps=1000)
        >>> crops = multi_crop(torch.rand(8, 3, 32, 32), local_size=16, scale=(0.5, 1.0), local_scale=(0.25, 0.5))
        >>> loss, metrics = method(crops)
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        out_dim: int = 65536,
        head_options: Mapping[str, Any] | None = None,
        student_temp: float = 0.1,
        teacher_temp: float = 0.04,
        warmup_teacher_temp: float = 0.04,
        warmup_teacher_temp_steps: int = 0,
        center_momentum: float = 0.9,
        momentum: float = 0.996,
        total_steps: int | None = None,
        freeze_last_layer_steps: int = 0,
        fused_head: bool = False,
        center_mode: str = "mean",
        process_group: Any = None,
    ) -> None:
        super().__init__(process_group)
        head = DINOHead(feature_dim(backbone), out_dim, **(head_options or {}))
        self.student = nn.Sequential(OrderedDict(backbone=backbone, head=head))
        schedule = "constant" if total_steps is None else "cosine"
        self.teacher = EMA(self.student, momentum, schedule=schedule, total_steps=total_steps, use_buffers="ignore")
        self.criterion = DINOLoss(
            out_dim,
            teacher_temp=teacher_temp,
            student_temp=student_temp,
            center_momentum=center_momentum,
            center_mode=center_mode,
            process_group=process_group,
        )
        self.teacher_temps = (warmup_teacher_temp, teacher_temp, warmup_teacher_temp_steps)
        self.fused_head = fused_head
        self.freeze_last_layer_steps = freeze_last_layer_steps

    @property
    def backbone(self) -> nn.Module:
        return self.student.get_submodule("backbone")

    @property
    def teacher_backbone(self) -> nn.Module:
        return self.teacher.module.get_submodule("backbone")

    @property
    def heads(self) -> tuple[DINOHead, DINOHead]:
        """The student's and the teacher's."""
        student, teacher = (part.get_submodule("head") for part in (self.student, self.teacher.module))
        return cast(DINOHead, student), cast(DINOHead, teacher)

    def weights(self) -> tuple[Tensor, Tensor]:
        """The prototypes of student and teacher (out_dim, bottleneck_dim)."""
        student, teacher = self.heads
        frozen = self.teacher.step < self.freeze_last_layer_steps
        with torch.no_grad():
            constant = teacher.last_layer.weight
        return student.last_layer.weight.detach() if frozen else student.last_layer.weight, constant

    def temperature(self, warmup: float, final: float, steps: int) -> float:
        """Of the teacher, at the present step: `steps` values from `warmup` to `final`, then `final`."""
        done = min(1.0, self.teacher.step / (steps - 1)) if steps > 1 else 1.0
        return warmup + (final - warmup) * done

    def outputs(self, teacher: Tensor, student: Tensor, weights: tuple[Tensor, Tensor]) -> dict[str, Any]:
        """What a loss takes of bottlenecks (..., bottleneck_dim): these and the prototypes, or the logits."""
        weight, teacher_weight = weights
        if not self.fused_head:
            return {"teacher_out": F.linear(teacher, teacher_weight), "student_out": F.linear(student, weight)}
        prototypes = {"weight": weight, "teacher_weight": teacher_weight}
        return {"teacher_out": teacher, "student_out": student, **prototypes}

    def class_loss(
        self, teacher: Tensor, student: Tensor, weights: tuple[Tensor, Tensor], size: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the bottlenecks of crops of `size` images, crop by crop: DINO's loss, and the metrics."""
        temperature = self.temperature(*self.teacher_temps)
        center = self.criterion.center if self.criterion.center_mode == "mean" else None
        metrics = teacher_metrics(teacher, weights[1], center, temperature)
        outputs = self.outputs(teacher.unflatten(0, (2, size)), student.unflatten(0, (-1, size)), weights)
        return self.criterion(**outputs, teacher_temp=temperature), metrics

    def forward(self, batch: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        check_crops(batch)
        head, teacher_head = self.heads
        with torch.no_grad():
            teacher = teacher_head.bottleneck(self.teacher_backbone(torch.cat(list(batch[:2]))))
        student = head.bottleneck(torch.cat(rows_of_crops(self.backbone, batch)))
        loss, metrics = self.class_loss(teacher, student, self.weights(), len(batch[0]))
        return loss, {"loss": loss.detach(), **metrics}

    def after_step(self, step: int) -> None:
        """Move the teacher towards the student."""
        self.teacher.update(self.student, step)

    def encode(self, x: Tensor) -> Tensor:
        return self.teacher_backbone(x)
