# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sslkernels import data
from sslkernels.methods import SwAV
from sslkernels.nn import ResidualCNN


def swav(**options) -> SwAV:
    torch.manual_seed(0)
    options = {"dim": 16, "hidden_dim": 24, "prototypes": 10, "freeze_prototypes_steps": 2, **options}
    method = SwAV(ResidualCNN(in_chans=1, channels=(8, 16)), **options)
    with torch.no_grad():
        method.prototypes.weight.mul_(3)  # as an optimizer may leave them
    return method


@pytest.fixture
def crops() -> list[torch.Tensor]:
    """Two global and three local crops of 12 digits, of another size."""
    images, generator = data.digits().train_images[:12], torch.Generator().manual_seed(3)
    return data.multi_crop(images, local_crops=3, generator=generator, **data.DIGIT_CROPS)


def sinkhorn(scores: torch.Tensor) -> torch.Tensor:
    """distributed_sinkhorn of the original, in one process: (B, K) -> (B, K)."""
    q = (scores / 0.05).exp().T
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def original(method: SwAV, crops: list[torch.Tensor], queues: list[torch.Tensor] | None = None) -> torch.Tensor:
    """main_swav.py::train up to the loss; crops of one size in one pass of the backbone, all in one of the head."""
    method = copy.deepcopy(method)
    prototypes = F.normalize(method.prototypes.weight, dim=1)
    features = torch.cat([method.backbone(torch.cat(crops[:2])), method.backbone(torch.cat(crops[2:]))])
    scores = (F.normalize(method.projector(features), dim=1) @ prototypes.T).chunk(len(crops))
    loss = 0
    for i in range(2):
        out = scores[i].detach() if queues is None else torch.cat([queues[i] @ prototypes.T, scores[i]]).detach()
        q = sinkhorn(out)[-12:]
        for v in range(len(crops)):
            if v != i:
                loss = loss - (q * F.log_softmax(scores[v] / 0.1, dim=1)).sum(dim=1).mean() / (len(crops) - 1) / 2
    return loss


def test_loss_is_the_originals(crops):
    method, crops = swav().double(), [crop.double() for crop in crops]
    expected = original(method, crops)
    loss, metrics = method(crops)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    assert 0 < metrics["spread"] < 1.5


def test_two_crops_are_enough(crops):
    method, crops = swav().double(), [crop.double() for crop in crops[:2]]
    z = [F.normalize(z, dim=1) for z in copy.deepcopy(method.projector)(method.backbone(torch.cat(crops))).chunk(2)]
    s0, s1 = (z @ F.normalize(method.prototypes.weight, dim=1).T for z in z)
    expected = F.cross_entropy(s1 / 0.1, sinkhorn(s0)) + F.cross_entropy(s0 / 0.1, sinkhorn(s1))
    method = swav().double()
    torch.testing.assert_close(method(crops)[0], expected / 2, rtol=1e-9, atol=0)


def test_prototypes_are_normalized_in_place_before_the_forward(crops):
    method = swav()
    expected = F.normalize(method.prototypes.weight.detach(), dim=1)
    method(crops)
    torch.testing.assert_close(method.prototypes.weight.detach(), expected)
    method.eval()
    with torch.no_grad():
        method.prototypes.weight.mul_(3)
    before = copy.deepcopy(method.state_dict())
    method(crops)
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


def test_prototypes_stay_for_the_first_steps(crops):
    method = swav()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, weight_decay=0.1)
    method.normalize_prototypes()
    start = method.prototypes.weight.detach().clone()
    for step, moved in enumerate((False, False, True)):
        optimizer.zero_grad()
        method(crops)[0].backward()
        assert (method.prototypes.weight.grad is not None) == moved
        assert all(p.grad.abs().max() > 0 for p in method.projector[3].parameters())
        optimizer.step()
        method.after_step(step)
        assert torch.allclose(method.prototypes.weight, start) != moved


def test_queue_is_used_once_it_is_full(crops):
    """18 places and batches of 12, collected from step 1 on: full after step 2, used from step 3 on."""
    method, crops = swav(queue_size=18, queue_start=1).double(), [crop.double() for crop in crops]
    seen = [[], []]
    for step in range(5):
        queues = [torch.cat(rows[-2:])[-18:] for rows in seen] if step > 2 else None
        expected = original(method, crops, queues)
        if queues is not None:  # they matter
            assert abs(expected - original(method, crops)) > 1e-6
        loss, _ = method(crops)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
        if step >= 1:
            network = copy.deepcopy(method)
            with torch.no_grad():
                features = [network.backbone(torch.cat(part)) for part in (crops[:2], crops[2:])]
                z = F.normalize(network.projector(torch.cat(features)), dim=1).chunk(5)
            for rows, embedding in zip(seen, z[:2], strict=True):
                rows.append(embedding)
        method.after_step(step)
        for parameter in method.backbone.parameters():  # the next batch is embedded elsewhere
            parameter.data.mul_(1 + 0.1 * torch.randn_like(parameter))


def test_counters_are_in_the_state(crops):
    method = swav(queue_size=12)
    for step in range(2):
        method(crops)
        method.after_step(step)
    other = swav(queue_size=12)
    assert (other.step, other.queued) == (0, 0)
    other.load_state_dict(method.state_dict())
    assert (other.step, other.queued) == (2, 24)
    assert torch.equal(other(crops)[0], method(crops)[0])
    assert method.prototypes.weight.requires_grad


def test_defaults_are_the_originals():
    method = SwAV(ResidualCNN(in_chans=1, channels=(8,)))
    assert [type(layer) for layer in method.projector] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert all(method.projector[i].bias is not None for i in (0, 3))
    assert (method.projector[0].out_features, method.projector[3].out_features) == (2048, 128)
    assert method.prototypes.weight.shape == (3000, 128) and method.prototypes.bias is None
    criterion = method.criterion
    assert (criterion.temperature, criterion.sinkhorn_iterations, criterion.sinkhorn_epsilon) == (0.1, 3, 0.05)
    assert (method.freeze_prototypes_steps, method.queue_size) == (313, 0)


def test_refuses_crops_of_other_images(crops):
    with pytest.raises(ValueError, match=r"crops must be of the same images, got \[\(12, 1, 8, 8\)"):
        swav()([*crops[:4], crops[4][:5]])


def test_many_prototypes_are_used(trained):
    """The held-out digits are spread over the prototypes; in a collapse they all go to one."""
    run = trained("swav").run
    with torch.no_grad():
        z = F.normalize(run.method.projector(run.method.backbone(run.data[2])), dim=1)
        share = F.one_hot((z @ run.method.prototypes.weight.T).argmax(dim=1), len(run.method.prototypes.weight))
    share = share.double().mean(dim=0)
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    assert entropy.exp() > 30  # 73 of 300
