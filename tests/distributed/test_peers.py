# SPDX-License-Identifier: Apache-2.0
"""What users of other libraries get on several ranks beside what the contract says; `peer_cases` restates it."""

from __future__ import annotations

import importlib.util

import peer_cases
import pytest
from contract import EVEN, Setting, alone, check, step

ITSELF = pytest.mark.skipif(importlib.util.find_spec("lightly") is None, reason="lightly is not installed")


@pytest.mark.parametrize(
    "name", ["nt_xent", "dcl", *(pytest.param(f"{x}_itself", marks=ITSELF) for x in ("nt_xent", "dcl"))]
)
def test_lightly_is_right_and_the_same_as_ours(ranks, name):
    """With even batches on the default group, all it offers; so that `gather_distributed=True` changes no result."""
    check(ranks, name, "4", Setting(EVEN), module="peer_cases")
    loss, gradients = alone(getattr(peer_cases, name), Setting(EVEN))
    outcomes = ranks.run(step, "4", f"{name.removesuffix('_itself')}_module", "distributed_cases", Setting(EVEN))
    assert sum(value for value, _ in outcomes) / 4 == pytest.approx(float(loss), rel=1e-10)
    for key, exact in gradients.items():
        assert (outcomes[0][1][key] - exact).norm() <= 1e-10 * exact.norm()


@pytest.mark.parametrize("name", ["dclw", pytest.param("dclw_itself", marks=ITSELF)])
def test_lightly_weights_positives_among_the_own_rows_alone(ranks, name):
    """Its DCLWLoss takes the softmax of the weights over each rank's batch: another loss than that of one process."""
    with pytest.raises(AssertionError, match="instead of"):
        check(ranks, name, "4", Setting(EVEN), 1e-3, module="peer_cases")


@pytest.mark.parametrize(
    ("flags", "ratio", "cosine"), [("00", 0.25, 1.0), ("01", 1.0, 1.0), ("10", None, 0.999), ("11", 1.0, 1.0)]
)
def test_gradients_of_open_clip_by_its_flags(ranks, flags, ratio, cosine):
    """local_loss and gather_with_grad: a quarter of the gradient on 4 ranks, right, another direction, right."""
    _, exact = alone(getattr(peer_cases, f"open_clip_{flags}"), Setting(EVEN))
    _, found = ranks.run(step, "4", f"open_clip_{flags}", "peer_cases", Setting(EVEN))[0]
    for key in ("image.weight", "text.weight"):
        a, b = found[key].flatten(), exact[key].flatten()
        measured = float(a @ b / (a.norm() * b.norm()))
        if ratio is None:
            assert measured < cosine
        else:
            assert measured == pytest.approx(cosine, abs=1e-12)
            assert float(a.norm() / b.norm()) == pytest.approx(ratio, abs=1e-10)
