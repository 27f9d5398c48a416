# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F


def test_loss_is_siglips(training):
    """Every pair a logistic loss, summed over all pairs and divided by the batch; in float64."""
    run = training("siglip")
    images, texts = run.batch(13)
    loss, metrics = run.method((images, texts))
    with torch.no_grad():
        i, t = (run.method.encode_image(images).double(), run.method.encode_text(texts).double())
    sign = 2 * torch.eye(13, dtype=torch.float64) - 1
    expected = -F.logsigmoid(sign * (10 * i @ t.T - 10)).sum() / 13
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=0)
    assert metrics["scale"].item() == pytest.approx(10, rel=1e-6)
    assert metrics["bias"].item() == -10


def test_scale_and_bias_are_learned_and_free(training):
    run = training("siglip")
    loss, _ = run.method(run.batch(16))
    loss.backward()
    assert run.method.logit_scale.grad.item() != 0 and run.method.logit_bias.grad.item() != 0
    with torch.no_grad():
        run.method.logit_scale.fill_(7.0)
    run.method.after_step(0)
    assert run.method.logit_scale.item() == 7
