# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sslkernels import speech
from sslkernels.methods import HuBERT
from sslkernels.methods.hubert import ClusterLabels
from sslkernels.nn import ConvFeatureEncoder, SpeechTransformer

CLASSES = 7


def backbone() -> SpeechTransformer:
    torch.manual_seed(0)
    encoder = ConvFeatureEncoder([(8, 20, 10), (12, 8, 8), (12, 4, 4)])
    return SpeechTransformer(encoder, embed_dim=16, depth=2, num_heads=2, kernel=8, groups=2)


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return speech.speech(train_windows=3, test_windows=1).train_windows


@pytest.fixture(scope="module")
def labels(windows) -> ClusterLabels:
    return ClusterLabels.fit(windows, CLASSES)


@pytest.mark.parametrize("pred_nomask_weight", [0.0, 0.5])
def test_loss_is_the_originals(windows, labels, pred_nomask_weight):
    """hubert.py and hubert_criterion.py in float64: C + 1 logits, the label in front and its duplicate at -inf, the
    sum over the frames by their number, ten times the mean square of the convolutions' output."""
    method = HuBERT(backbone(), labels, CLASSES, dim=10, pred_nomask_weight=pred_nomask_weight).double()
    waveforms = windows.double()
    loss, metrics = method(waveforms, generator=torch.Generator().manual_seed(3))
    mask = method.mask(3, 49, torch.Generator().manual_seed(3))

    net = method.backbone
    raw = net.encoder(waveforms)
    x = net.project(F.layer_norm(raw, (12,), net.feature_norm.weight, net.feature_norm.bias))
    x[mask] = method.mask_token
    x = method.final_proj(net.norm(net.blocks(x + net.positions(x))))
    ids = labels(waveforms)[:, ::2]  # MFCCs come twice as often
    assert ids.shape == (3, 49)

    def total(chosen):
        positive = method.label_embeddings[ids[chosen]]
        targets = torch.cat([positive[None], method.label_embeddings[:, None].expand(-1, len(positive), -1)])
        logits = torch.cosine_similarity(x[chosen], targets, dim=-1).T / 0.1
        logits[:, 1:][F.one_hot(ids[chosen], CLASSES).bool()] = -math.inf
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="sum")

    if pred_nomask_weight:
        masked = (total(mask) + pred_nomask_weight * total(~mask)) / mask.numel()
    else:
        masked = total(mask) / mask.sum()
    torch.testing.assert_close(metrics["masked"], masked, rtol=1e-9, atol=0)
    torch.testing.assert_close(metrics["penalty"], raw.square().mean(), rtol=1e-9, atol=0)
    torch.testing.assert_close(loss, masked + 10 * raw.square().mean(), rtol=1e-9, atol=0)


def test_masks_are_the_originals():
    """About 57% of 500 frames are hidden, in spans of 10; another mask for each waveform and call."""
    method = HuBERT(backbone(), lambda waveforms: waveforms, CLASSES)
    mask = method.mask(400, 500)
    assert abs(mask.float().mean() - 0.57) < 0.01
    assert len(mask.unique(dim=0)) == 400 and not torch.equal(mask, method.mask(400, 500))
    changes = F.pad(mask.int(), (1, 1)).diff(dim=1)
    begins, ends = (changes == 1).nonzero(), (changes == -1).nonzero()
    assert (ends[:, 1] - begins[:, 1]).min() == 10


def test_what_is_hidden_does_not_leak(windows, labels):
    """Neither from the masked frames' features nor from the labels: the context of the others is all there is."""
    method = HuBERT(backbone(), labels, CLASSES, dim=10, feature_grad_mult=1.0)
    torch.nn.init.zeros_(method.final_proj.weight)
    net = method.backbone
    x = net.project(net.feature_norm(net.encoder(windows))).detach().requires_grad_()
    net.project = torch.nn.Identity()
    net.feature_norm = torch.nn.Identity()
    net.encoder.forward = lambda waveforms: x
    heard = method.hear(windows, torch.Generator().manual_seed(3))
    heard.context.square().sum().backward()
    assert torch.equal(x.grad.abs().amax(dim=2) > 0, ~heard.mask)


def test_gradients_of_the_convolutions_are_scaled(windows, labels):
    gradients = []
    for factor in (1.0, 0.1, 0.0):
        method = HuBERT(backbone(), labels, CLASSES, dim=10, feature_grad_mult=factor)
        method(windows, generator=torch.Generator().manual_seed(3))[0].backward()
        gradients.append([p.grad for p in (*method.backbone.encoder.parameters(), *method.final_proj.parameters())])
    whole, tenth, none = gradients
    for a, b in zip(whole[:-2], tenth[:-2], strict=True):
        torch.testing.assert_close(0.1 * a, b, rtol=1e-5, atol=1e-6 * float(a.abs().max()))
    assert torch.equal(whole[-2], tenth[-2])
    assert all(gradient is None for gradient in none[:-2])


def test_labels_are_nearest_clusters_of_mfccs(windows, labels):
    ids = labels(windows)
    features = speech.mfcc(windows[:, 0])
    assert ids.shape == (3, 98)
    assert torch.equal(ids, torch.cdist(features.double(), labels.centroids.double()).argmin(dim=2))
    assert len(ids.unique()) == CLASSES
    again = ClusterLabels.fit(windows, CLASSES)
    assert torch.equal(again.centroids, labels.centroids)
    assert not any(p.requires_grad for p in labels.parameters()) and "centroids" in labels.state_dict()


def test_frames_take_the_label_that_begins_with_them(windows):
    """Whatever the strides: 100 labels a second in ones and halves of frames, and none after the last label."""
    method = HuBERT(backbone(), lambda waveforms: torch.arange(90).expand(3, -1), 90)
    ids = method.targets(windows, 49)
    assert torch.equal(ids[0, :45], torch.arange(0, 90, 2)) and (ids[:, 45:] == -100).all()
    method.label_stride = 480  # a label every 30 ms: frames of 20 ms at 0, 20, 40, 60 ms
    assert method.targets(windows, 6)[0].tolist() == [0, 0, 1, 2, 2, 3]
    loss, _ = method(windows, generator=torch.Generator().manual_seed(3))
    assert loss.isfinite()


def test_second_training_names_clusters_of_a_block(windows, labels):
    method = HuBERT(backbone(), labels, CLASSES, dim=10)
    units = method.cluster(windows, 5, depth=1)
    features = method.backbone.forward_features(windows, depth=1).detach()
    assert torch.equal(units(windows), torch.cdist(features.double(), units.centroids.double()).argmin(dim=2))
    second = HuBERT(backbone(), units, 5, dim=10)
    assert torch.equal(second.targets(windows, 49), units(windows))
    before = units(windows)
    torch.nn.init.zeros_(method.backbone.project.weight)  # the first network goes on, its labels do not
    assert torch.equal(units(windows), before)
    second(windows)[0].backward()
    assert all(p.grad is None for p in units.parameters()) and not any(p.requires_grad for p in units.parameters())
    restored = HuBERT(backbone(), method.cluster(windows, 5, depth=1), 5, dim=10)
    restored.load_state_dict(second.state_dict())
    assert torch.equal(restored.targets(windows, 49), before)


def test_pretext_accuracy_counts(windows, labels, monkeypatch):
    method = HuBERT(backbone(), labels, CLASSES, dim=10)
    with torch.no_grad():
        method.label_embeddings.copy_(torch.eye(CLASSES, 10))
    method.final_proj = torch.nn.Identity()
    named = method.label_embeddings[method.targets(windows, 49)]
    right = torch.randn(3, 49, 1) < 0
    heard = method.hear(windows)._replace(context=torch.where(right, named, -named))
    monkeypatch.setattr(method, "hear", lambda *a: heard)
    torch.testing.assert_close(method.pretext_accuracy(windows), right[..., 0][heard.mask].float().mean())


def test_trains_on_real_speech(trained):
    """The units of held-out hidden frames are named more often than by naming the commonest of the training."""
    run = trained("hubert").run
    heard, held_out = (run.method.targets(run.data[part], 49).flatten() for part in (0, 2))
    commonest = (held_out == heard.bincount().argmax()).float().mean()
    assert run.accuracy()["pretext"] > 1.25 * commonest  # 0.117 against 0.078


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes"),
        ({"mask_ratio": 0.0}, "mask_ratio"),
        ({"mask_length": 0}, "mask_length"),
        ({"feature_grad_mult": 1.5}, "feature_grad_mult"),
        ({"label_stride": 0}, "label_stride"),
        ({"temperature": 0.0}, "temperature"),
        ({"penalty_weight": -1.0}, "penalty_weight"),
    ],
)
def test_refuses(labels, options, message):
    with pytest.raises(ValueError, match=message):
        HuBERT(backbone(), labels, **{"num_classes": CLASSES, **options})
