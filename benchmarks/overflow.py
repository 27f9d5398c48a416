# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.overflow`: up to which logit each form of Sinkhorn-Knopp gives codes, and how exact they are;
and what KoLeo makes of equal rows. Writes the tables in docs/benchmarks.md.

DINOv2's teacher: temperature 0.04, three iterations. Normal logits of 128 samples and 2,048 prototypes, scaled to a
largest one, against float64 by log-sum-exps.
KoLeo: 64 normal rows of 384, of which two may be equal, or two zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import machine, report
from benchmarks.contenders import distillation_codes as codes
from benchmarks.contenders import neighbors
from benchmarks.formulas.distillation import sinkhorn_codes
from benchmarks.worker import relative_error

ITERATIONS, TEMPERATURE = 3, 0.04
LARGEST = (1.0, 3.5, 3.6, 10.0, 100.0)
SHAPE = (128, 2048)


def shifted_rows(scores: Tensor, iterations: int, epsilon: float) -> Tensor:
    """What is often proposed: finite, but the first column sums are other ones."""
    return codes.dinov2_sinkhorn(scores - scores.amax(1, keepdim=True), iterations, epsilon)


FORMS: dict[str, Callable[[Tensor, int, float], Tensor]] = {
    "DINOv2, SwAV": codes.dinov2_sinkhorn,
    "lightly": codes.lightly_sinkhorn,
    "DINOv2, the maximum of each row subtracted": shifted_rows,
    "one exponential, the largest score subtracted (lean-exp)": codes.lean_sinkhorn_exp,
    "log-sum-exps (lean)": codes.lean_sinkhorn,
    "sinkhorn_knopp": codes.ours_sinkhorn,
}


def logits(largest: float) -> Tensor:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    return x * (largest / x.max())


def errors() -> dict[str, list[float]]:
    """For each form and each scale, the relative error of the codes, by norm; NaN where they are not finite."""
    found: dict[str, list[float]] = {name: [] for name in FORMS}
    for largest in LARGEST:
        scores = logits(largest)
        exact = sinkhorn_codes(scores.double(), ITERATIONS, TEMPERATURE)
        for name, form in FORMS.items():
            found[name].append(relative_error(form(scores.clone(), ITERATIONS, TEMPERATURE), exact))
    return found


def table(found: dict[str, list[float]]) -> str:
    header = ["relative error of the codes; largest logit", *(f"{x:g}" for x in LARGEST)]
    return report.table(
        header, [[name, *(f"{e:.0e}" if e == e else "NaN" for e in row)] for name, row in found.items()]
    )


KOLEO = {"lightly": neighbors.lightly_koleo, "DINOv2": neighbors.dinov2_koleo, "koleo_loss": neighbors.ours_koleo}
ROWS: dict[str, tuple[int, float]] = {  # what row 1 repeats, and times what both are taken
    "distinct rows": (1, 1.0), "two equal rows": (0, 1.0), "two rows of zeros": (0, 0.0),
}  # fmt: skip


def told(form: Callable[[Tensor, float], Tensor], rows: str, dtype: torch.dtype) -> str:
    """Loss and largest component of the gradient."""
    repeated, scale = ROWS[rows]
    x = torch.randn(64, 384, generator=torch.Generator().manual_seed(0))
    x[:2] = scale * x[[0, repeated]]
    x = x.to(dtype).requires_grad_()
    loss = form(x, 1e-8)
    (gradient,) = torch.autograd.grad(loss, x)
    return f"{loss.item():.3g}, {gradient.abs().max().item():.2g}"


def koleo_table() -> str:
    header = ["loss, largest component of its gradient", *(f"float16, {rows}" for rows in ROWS), "float32, equal rows"]
    cases = [*((rows, torch.float16) for rows in ROWS), ("two equal rows", torch.float32)]
    return report.table(header, [[name, *(told(form, *case) for case in cases)] for name, form in KOLEO.items()])


def main() -> None:
    for marker, made in (("overflow", table(errors())), ("koleo", koleo_table())):
        report.insert(machine.ROOT / "docs" / "benchmarks.md", marker, made)
        print(made)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
