# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from sslkernels import data
from sslkernels.methods import MoCo
from sslkernels.nn import ResidualCNN


@pytest.fixture
def method() -> MoCo:
    torch.manual_seed(0)
    method = MoCo(ResidualCNN(in_chans=1, channels=(16, 32)), dim=16, queue_size=30, momentum=0.9)
    with torch.no_grad():  # as after some steps: the two encoders differ
        for parameter in method.key_encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return method


def encoder_parameters(method: MoCo) -> list[torch.Tensor]:
    return [p.detach().clone() for p in (*method.backbone.parameters(), *method.head.parameters())]


def test_key_encoder_moves_before_the_keys_are_made(method, views):
    """The loss of the original's forward, in float64: EMA first, then keys, then logits over the queue as it was."""
    before = copy.deepcopy(method)
    loss, _ = method(views)

    with torch.no_grad():
        for key, parameter in zip(before.key_encoder.parameters(), encoder_parameters(before), strict=True):
            key.copy_(0.9 * key + 0.1 * parameter)
        q = F.normalize(before.head(before.backbone(views[0])).double(), dim=1)
        k = F.normalize(before.key_encoder(views[1]).double(), dim=1)
        logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ before.queue.keys.double().T], dim=1) / 0.07
        expected = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-4, atol=0)
    for moved, parameter in zip(method.key_encoder.parameters(), before.key_encoder.parameters(), strict=True):
        torch.testing.assert_close(moved, parameter, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(method.queue.keys[:12].double(), k, rtol=1e-4, atol=1e-5)
    assert torch.equal(method.queue.keys[12:], before.queue.keys[12:])


def test_queue_wraps_around(method, views):
    """Three batches of 12 in 30 places: the third fills the last 6 and the first 6."""
    for _ in range(2):
        method(views)
    second = method.queue.keys.clone()
    method(views)
    changed = (method.queue.keys != second).any(dim=1)
    assert changed.tolist() == [True] * 6 + [False] * 18 + [True] * 6
    assert int(method.queue.pointer) == 6


def test_gradient_is_of_the_negatives_the_loss_was_given(method, views):
    """Backward comes after this batch's keys have overwritten some of them."""
    before = copy.deepcopy(method)
    loss, _ = method(views)
    loss.backward()

    before.update_key_encoder()
    q = F.normalize(before.head(before.backbone(views[0])), dim=1)
    k = F.normalize(before.key_encoder(views[1]), dim=1)
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ before.queue.keys.T], dim=1) / 0.07
    F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long)).backward()
    torch.testing.assert_close(method.head[-1].weight.grad, before.head[-1].weight.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(method.backbone.stem.weight.grad, before.backbone.stem.weight.grad, rtol=1e-3, atol=1e-5)


def test_key_encoder_gets_no_gradient(method, views):
    loss, _ = method(views)
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in method.key_encoder.parameters())
    assert all(p.grad is not None for p in (*method.backbone.parameters(), *method.head.parameters()))


def test_key_encoder_keeps_its_own_statistics(method, views):
    """Batch norm buffers are not averaged: the key encoder's come from the key views alone."""
    method((views[0], views[1]))
    query_mean, key_mean = method.backbone.bn.running_mean, method.key_encoder[0].bn.running_mean
    expected = 0.1 * method.key_encoder[0].stem(views[1]).mean(dim=(0, 2, 3))
    torch.testing.assert_close(key_mean, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(query_mean, key_mean)


def test_evaluation_changes_nothing(method, views):
    method.eval()
    before = copy.deepcopy(method.state_dict())
    method(views)
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


def test_defaults_are_version_1():
    method = MoCo(ResidualCNN(in_chans=1, channels=(8,)))
    assert (method.momentum, method.criterion.temperature, len(method.head)) == (0.999, 0.07, 1)
    assert method.queue.keys.shape == (65536, 128)
    assert len(MoCo(ResidualCNN(in_chans=1, channels=(8,)), queue_size=8, mlp=True).head) == 3


@pytest.mark.parametrize("momentum", [-0.1, 1.1])
def test_refuses_a_momentum_outside_0_to_1(momentum):
    with pytest.raises(ValueError, match="momentum"):
        MoCo(ResidualCNN(in_chans=1), queue_size=8, momentum=momentum)


def test_learns_the_photographs():
    """Crops of 16 photographs, held-out crops from another part of each."""
    from sslkernels.evaluation import extract_features, knn_accuracy

    photos = data.photographs(size=16, train_crops=32, test_crops=16)
    torch.manual_seed(0)
    method = MoCo(ResidualCNN(channels=(16, 32, 64)), queue_size=512, momentum=0.99)

    def knn() -> float:
        train, test = (extract_features(method, x) for x in (photos.train_images, photos.test_images))
        return knn_accuracy(train, photos.train_labels, test, photos.test_labels, k=5)

    untrained = knn()
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        chosen = torch.randperm(len(photos.train_images), generator=generator)[:64]
        loss, _ = method(data.two_views(photos.train_images[chosen], generator=generator, **data.PHOTO_VIEWS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert knn() > untrained + 0.05
