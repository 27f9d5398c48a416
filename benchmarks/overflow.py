# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.overflow`: up to which logit each form of Sinkhorn-Knopp gives codes, and how exact they are.

DINOv2's teacher: temperature 0.04, three iterations. Normal logits of 128 samples and 2,048 prototypes, scaled to a
largest one, against float64 by log-sum-exps. Writes the table in docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import machine, report
from benchmarks.contenders import distillation as contenders
from benchmarks.formulas.distillation import sinkhorn_codes
from benchmarks.worker import relative_error

ITERATIONS, TEMPERATURE = 3, 0.04
LARGEST = (1.0, 3.5, 3.6, 10.0, 100.0)
SHAPE = (128, 2048)


def shifted_rows(scores: Tensor, iterations: int, epsilon: float) -> Tensor:
    """What is often proposed: finite, but the first column sums are other ones."""
    return contenders.dinov2_sinkhorn(scores - scores.amax(1, keepdim=True), iterations, epsilon)


FORMS: dict[str, Callable[[Tensor, int, float], Tensor]] = {
    "DINOv2, SwAV": contenders.dinov2_sinkhorn,
    "lightly": contenders.lightly_sinkhorn,
    "DINOv2, the maximum of each row subtracted": shifted_rows,
    "one exponential, the largest score subtracted (lean-exp)": contenders.lean_sinkhorn_exp,
    "log-sum-exps (lean)": contenders.lean_sinkhorn,
    "sinkhorn_knopp": contenders.ours_sinkhorn,
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


def main() -> None:
    made = table(errors())
    report.insert(machine.ROOT / "docs" / "benchmarks.md", "overflow", made)
    print(made)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
