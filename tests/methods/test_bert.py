# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sslkernels import text
from sslkernels.methods import BERT
from sslkernels.nn import TextTransformer
from sslkernels.training import dataset

VOCABULARY, LENGTH = 60, 24
SIZES = (24, 24, 24, 23, 20, 9)


def bert(**options) -> BERT:
    torch.manual_seed(0)
    backbone = TextTransformer(VOCABULARY, max_length=LENGTH, embed_dim=16, depth=1, num_heads=2)
    method = BERT(backbone, **options)
    torch.nn.init.normal_(method.decoder_bias)  # zero at first, when a lost bias would not show
    return method


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Six pairs, the last three with 1, 4 and 15 tokens of padding."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, VOCABULARY, (6, LENGTH), generator=generator)
    segments = torch.zeros_like(tokens)
    for row, size in enumerate(SIZES):
        tokens[row, [0, size // 2, size - 1]] = torch.tensor([text.CLS, text.SEP, text.SEP])
        tokens[row, size:] = text.PAD
        segments[row, size // 2 + 1 : size] = 1
    return tokens, segments, torch.tensor([0, 1, 1, 0, 1, 0])


def hidden_of(method: BERT, tokens: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """The backbone written out, row by row without its padding; zeros there."""
    net, rows = method.backbone, []
    for ids, segment, size in zip(tokens, segments, SIZES):
        x = net.token_embed.weight[ids[:size]] + net.position_embed.weight[:size]
        x = net.embed_norm(x + net.segment_embed.weight[segment[:size]])[None]
        for block in net.blocks:
            x = block(x)
        rows.append(F.pad(net.norm(x)[0], (0, 0, 0, len(ids) - size)))
    return torch.stack(rows)


def test_loss_is_the_originals(batch):
    """run_pretraining.py in float64 on the same mask: head at the chosen tokens, tied decoder and bias, and NSP."""
    tokens, segments, is_random = batch
    method = bert().double()
    loss, metrics = method(batch, generator=torch.Generator().manual_seed(3))
    inputs, labels = method.mask(tokens, torch.Generator().manual_seed(3))
    x = hidden_of(method, inputs, segments)
    dense, gelu, norm = method.transform
    logits = norm(gelu(dense(x))) @ method.backbone.token_embed.weight.T + method.decoder_bias
    mlm = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100].mean()
    pooled = torch.tanh(method.pooler[0](x[:, 0]))
    votes = pooled @ method.next_sentence.weight.T + method.next_sentence.bias
    nsp = -votes.log_softmax(-1)[torch.arange(6), is_random].mean()
    torch.testing.assert_close(loss, mlm + nsp, rtol=1e-12, atol=0)
    torch.testing.assert_close(metrics["mlm_loss"], mlm.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(metrics["nsp_loss"], nsp.detach(), rtol=1e-12, atol=0)
    assert metrics["nsp_accuracy"] == (votes.argmax(1) == is_random).double().mean()


def test_plain_tokens_have_no_next_sentence(batch):
    method = bert(next_sentence=False).double()
    loss, metrics = method(batch[0], generator=torch.Generator().manual_seed(3))
    pair, parts = bert().double()(
        (batch[0], torch.zeros_like(batch[1]), batch[2]), generator=torch.Generator().manual_seed(3)
    )
    assert set(metrics) == {"loss"} and "pooler.0.weight" not in method.state_dict()
    assert pair > loss and parts["mlm_loss"].isfinite()
    for wrong, right in ((method, batch), (bert(), batch[0])):
        with pytest.raises(ValueError, match="batch must be"):
            wrong(right)


def test_masks_are_berts():
    """Of 4,000 rows of 24 with 22 to choose from: 4 chosen each (0.15 * 24), 80 / 10 / 10, and nothing special."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, VOCABULARY, (4000, LENGTH), generator=generator)
    tokens[:, 0], tokens[:, -1] = text.CLS, text.SEP
    method = bert()
    inputs, labels = method.mask(tokens, generator)
    chosen = labels != -100
    assert (chosen.sum(dim=1) == 4).all() and not chosen[:, [0, -1]].any()
    assert torch.equal(labels[chosen], tokens[chosen]) and torch.equal(inputs[~chosen], tokens[~chosen])
    hidden = (inputs[chosen] == text.MASK).double().mean()
    # 10% of the random words are the word itself, or [MASK], one time in 60 each
    kept = (inputs[chosen] == tokens[chosen]).double().mean()
    assert abs(hidden - 0.8 - 0.1 / 60) < 0.015 and abs(kept - 0.1 - 0.1 / 60) < 0.012
    assert bert(ratio=0.5, max_predictions=7).mask(tokens)[1].ne(-100).sum(dim=1).unique().tolist() == [7]


def test_padding_counts_for_nothing(batch):
    method = bert(ratio=0.5, max_predictions=100)
    _, labels = method.mask(batch[0])
    assert (labels != -100).sum(dim=1).tolist() == [round(0.5 * size) for size in SIZES]
    assert not (labels[batch[0] == text.PAD] != -100).any()
    torch.testing.assert_close(method.encode(batch[0][5:, :9]), method.encode(batch[0])[5:], rtol=1e-5, atol=1e-6)


def test_whole_words_are_chosen():
    continuations = torch.zeros(VOCABULARY, dtype=torch.bool)
    continuations[40:] = True
    tokens = torch.randint(5, VOCABULARY, (500, LENGTH), generator=torch.Generator().manual_seed(0))
    tokens[:, 0], tokens[:, 1], tokens[:, -1] = text.CLS, 5, text.SEP
    method = bert(continuations=continuations, ratio=0.3)
    chosen = method.mask(tokens)[1] != -100
    words = (~continuations[tokens]).cumsum(dim=1)
    for row, word in zip(chosen, words):
        for number in word[row].unique():
            assert row[(word == number) & (torch.arange(LENGTH) < LENGTH - 1)].all()
    assert 4 < chosen.sum(dim=1).float().mean() <= 7
    assert "continuations" not in method.state_dict()
    with pytest.raises(ValueError, match=r"continuations must be bool \(60,\)"):
        bert(continuations=continuations[:5])


def test_the_network_never_sees_what_it_is_asked_for(batch, monkeypatch):
    method, seen = bert(), []
    forward = method.backbone.forward_features
    monkeypatch.setattr(method.backbone, "forward_features", lambda *args: seen.append(args) or forward(*args))
    method(batch, generator=torch.Generator().manual_seed(3))
    inputs, labels = method.mask(batch[0], torch.Generator().manual_seed(3))
    assert len(seen) == 1 and torch.equal(seen[0][0], inputs) and torch.equal(seen[0][1], batch[1])
    hidden = inputs == text.MASK
    assert hidden.sum() >= 8 and (labels[hidden] != -100).all()
    # whatever stands under a [MASK], the network's input is the same
    other = torch.where(hidden, 5 + (batch[0] + 1) % 50, batch[0])
    assert torch.equal(method.mask(other, torch.Generator().manual_seed(3))[0], inputs)


def test_gradient_reaches_every_parameter(batch):
    method = bert()
    method(batch)[0].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in method.parameters())


def test_fill(batch):
    tokens, segments, _ = batch
    method = bert().eval()
    hidden, labels = method.mask(tokens, torch.Generator().manual_seed(3), replace=(1.0, 0.0, 0.0))
    filled = method.fill(hidden, segments)
    logits = method.transform(method.backbone.forward_features(hidden, segments))
    logits = logits @ method.backbone.token_embed.weight.T + method.decoder_bias
    assert torch.equal(filled, torch.where(labels != -100, logits.argmax(-1), tokens))
    assert torch.equal(method.fill(tokens), tokens)
    asked = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    assert torch.equal(method.fill(hidden, segments, asked), torch.where(asked, logits.argmax(-1), hidden))


def test_learns_more_than_how_often_words_are(trained):
    """Held-out [MASK]s are named better than by the most frequent token, which the loss learns first."""
    run = trained("bert").run
    news = dataset("news")
    counts = news.train_tokens.flatten().bincount(minlength=256)
    counts[:5] = 0
    tokens = news.test_tokens[news.test_tokens >= 5]
    guess = (tokens == counts.argmax()).double().mean().item()
    assert 0.02 < guess < 0.04
    assert run.accuracy()["masked"] > 2 * guess
