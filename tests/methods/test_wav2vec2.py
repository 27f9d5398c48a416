# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sslkernels import speech
from sslkernels.methods import Wav2Vec2
from sslkernels.nn import ConvFeatureEncoder, SpeechTransformer


def wav2vec2(**options) -> Wav2Vec2:
    torch.manual_seed(0)
    encoder = ConvFeatureEncoder([(8, 20, 10), (12, 8, 8), (12, 4, 4)])
    backbone = SpeechTransformer(encoder, embed_dim=16, depth=1, num_heads=2, kernel=8, groups=2)
    return Wav2Vec2(backbone, **{"dim": 8, "num_vars": 5, **options})


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return speech.speech(train_windows=3, test_windows=1).train_windows


def test_loss_is_the_originals(windows, monkeypatch):
    """wav2vec2.py and wav2vec_criterion.py in float64, the distractors gathered: the sum over masked frames of the
    cross-entropy, 0.1 and 10 times the other terms and the number of these frames, all by that number."""
    method = wav2vec2(num_negatives=7).double().eval()  # without the noise of the codes
    waveforms = windows.double()
    drawn = {}
    import sslkernels.losses._wav2vec2 as module

    original = module.distractor_counts

    def counts(*args, **options):
        drawn["counts"] = original(*args, **options)
        return drawn["counts"].clone()  # the loss strikes equal targets out of its own

    monkeypatch.setattr(module, "distractor_counts", counts)
    loss, metrics = method(waveforms, generator=torch.Generator().manual_seed(3))
    mask = method.mask(3, 49, torch.Generator().manual_seed(3))

    net = method.backbone
    raw = net.encoder(waveforms)
    features = F.layer_norm(raw, (12,), net.feature_norm.weight, net.feature_norm.bias)
    x = net.project(features)
    x[mask] = method.mask_token
    x = method.final_proj(net.norm(net.blocks(x + net.positions(x))))
    logits = method.quantizer.weight_proj(features[mask]).view(-1, 2, 5)
    codebook = method.quantizer.vars.view(2, 5, 4)
    ids = logits.argmax(dim=2)
    q = method.project_q(torch.cat([codebook[0, ids[:, 0]], codebook[1, ids[:, 1]]], dim=1))

    total, first = q.new_zeros(()), 0
    for b in range(3):
        size = int(mask[b].sum())
        for i in range(size):
            times = drawn["counts"][b, i, :size].long()
            assert times.sum() == 7 and times[i] == 0
            negatives = q[first : first + size].repeat_interleave(times, dim=0)
            targets = torch.cat([q[first + i][None], negatives])
            row = torch.cosine_similarity(x[mask][first + i][None], targets, dim=1) / 0.1
            row[1:][(negatives == q[first + i]).all(dim=1)] = -math.inf
            total = total + row.logsumexp(0) - row[0]
        first += size
    mean = logits.softmax(dim=2).mean(dim=0)
    diversity = (10 - torch.exp(-(mean * torch.log(mean + 1e-7)).sum(dim=1)).sum()) / 10
    sample_size = mask.sum()
    total = total + 0.1 * diversity * sample_size + 10 * raw.square().mean() * sample_size
    torch.testing.assert_close(loss, total / sample_size, rtol=1e-9, atol=0)
    torch.testing.assert_close(metrics["diversity"], diversity, rtol=1e-9, atol=0)
    torch.testing.assert_close(metrics["penalty"], raw.square().mean(), rtol=1e-9, atol=0)


def test_masks_are_the_originals():
    """About 49% of 500 frames."""
    assert abs(wav2vec2().mask(400, 500).float().mean() - 0.49) < 0.01


def test_targets_see_what_is_hidden(windows):
    """The quantizer has the unmasked features, the transformer has the learned vector there."""
    method = wav2vec2()
    heard = method.hear(windows, torch.Generator().manual_seed(3))
    net = method.backbone
    torch.testing.assert_close(heard.features, net.feature_norm(net.encoder(windows)))
    assert heard.mask.any(dim=1).all() and not heard.mask.all(dim=1).any()
    x = torch.where(heard.mask[..., None], method.mask_token, net.project(heard.features))
    torch.testing.assert_close(heard.context, net.forward_tokens(x))


def test_quantizer_cools_and_its_temperature_is_state(windows):
    method = wav2vec2(quantizer_temp=(2.0, 0.5, 0.9))
    assert method.quantizer.curr_temp == 2.0
    for step in range(3):
        method.after_step(step)
    assert method.quantizer.curr_temp == pytest.approx(2 * 0.9**3)
    resumed = wav2vec2(quantizer_temp=(2.0, 0.5, 0.9))
    resumed.load_state_dict(method.state_dict())
    assert resumed.quantizer.curr_temp == method.quantizer.curr_temp and resumed.updates == 3
    losses = [m(windows, generator=torch.Generator().manual_seed(5))[0] for m in (method, resumed)]
    assert torch.equal(*losses)
    method.after_step(99)
    assert method.quantizer.curr_temp == 0.5


def test_every_weight_learns(windows):
    method = wav2vec2()
    method(windows)[0].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in method.parameters())


def test_defaults_are_the_originals():
    method = Wav2Vec2(SpeechTransformer(ConvFeatureEncoder([(6, 20, 10)]), embed_dim=48, depth=0))
    assert (method.mask_ratio, method.mask_length, method.feature_grad_mult) == (0.65, 10, 0.1)
    assert method.quantizer.vars.shape == (1, 640, 128) and method.quantizer.max_temp == 2.0
    criterion = method.criterion
    assert (criterion.diversity_weight, criterion.penalty_weight, criterion.temperature) == (0.1, 10.0, 0.1)
    assert criterion.options["num_negatives"] == 100
    assert method.final_proj.out_features == method.project_q.in_features == 256


def test_trains_on_real_speech(trained):
    """Codes are found again among held-out distractors, and most codes are in use: 32 would be all of both groups."""
    run = trained("wav2vec2").run
    _, metrics = run.method(run.batch())
    assert metrics["code_perplexity"] > 10
    assert run.accuracy()["pretext"] > 0.1
