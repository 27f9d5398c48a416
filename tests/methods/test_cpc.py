# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from sslkernels import speech
from sslkernels.methods import CPC
from sslkernels.nn import ConvFeatureEncoder, SpeechGRU


def cpc(**options) -> CPC:
    torch.manual_seed(0)
    encoder = ConvFeatureEncoder([(6, 20, 10), (8, 8, 8), (8, 4, 4)], norm="layer")
    return CPC(SpeechGRU(encoder, dim=10), **{"steps": 3, **options})


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return speech.speech(train_windows=3, test_windows=1).train_windows


@pytest.mark.parametrize("negatives", ["batch", "sequence"])
def test_loss_is_the_papers(windows, negatives):
    """Equation 4, one step, waveform and time at a time, in float64."""
    method = cpc(negatives=negatives).double()
    loss, metrics = method(windows.double())
    z = method.backbone.encoder(windows.double())
    c, _ = method.backbone.gru(z)
    length = z.shape[1]
    steps, top1 = [], []
    for k in (1, 2, 3):
        terms, hits = [], []
        for b in range(3):
            keys = z.flatten(0, 1) if negatives == "batch" else z[b]
            for t in range(length - k):
                predicted = method.criterion.predictors[k - 1] @ c[b, t]
                scores, own = keys @ predicted, z[b, t + k] @ predicted
                terms.append(scores.logsumexp(0) - own)
                hits.append((scores.max() <= own + 1e-12).double())
        steps.append(torch.stack(terms).mean())
        top1.append(torch.stack(hits).mean())
    torch.testing.assert_close(loss, torch.stack(steps).mean(), rtol=1e-9, atol=0)
    torch.testing.assert_close(metrics["top1"].double(), torch.stack(top1).mean(), rtol=1e-6, atol=1e-6)


def test_defaults_are_the_papers():
    method = CPC(SpeechGRU(ConvFeatureEncoder([(6, 20, 10)], norm="none")))
    assert method.backbone.dim == 256 and method.criterion.predictors.shape == (12, 6, 256)


def test_a_norm_over_time_is_refused():
    with pytest.raises(ValueError, match='must have norm="layer" or "none", got "group"'):
        CPC(SpeechGRU(ConvFeatureEncoder([(6, 20, 10)])))


def test_every_weight_learns_and_features_are_contexts(windows):
    method = cpc()
    method(windows)[0].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in method.parameters())
    contexts = method.backbone.gru(method.backbone.encoder(windows))[0]
    torch.testing.assert_close(method.encode(windows), contexts.mean(dim=1))


def test_trains_on_real_speech(trained):
    """Of 784 frames, those 10 to 120 ms later are found ten times as often as by chance, among held-out ones."""
    assert trained("cpc").run.accuracy()["pretext"] > 0.01
