# SPDX-License-Identifier: Apache-2.0
"""The recording, its windows, MFCCs by their definition, and the encoders of speech."""

from __future__ import annotations

import importlib.metadata
import math

import numpy
import pytest
import torch

from sslkernels import speech
from sslkernels.evaluation import knn_accuracy
from sslkernels.nn import ConvFeatureEncoder, ConvPositionalEmbedding, SpeechGRU, SpeechTransformer
from sslkernels.nn.speech import CPC_LAYERS, WAV2VEC2_LAYERS, scale_gradient

SMALL = {"train_windows": 30, "test_windows": 20}


def test_recording_is_real_speech():
    recorded = speech.conversation()
    assert recorded.waveform.shape == (480_000,) and recorded.rate == 16_000
    assert 0.1 < recorded.waveform.abs().max() < 1
    assert len(recorded.turns) == 10 and {turn.speaker for turn in recorded.turns} == {"speaker90", "speaker91"}
    assert recorded.turns[0] == (6.69, pytest.approx(7.12), "speaker90")
    # nobody talks before the first turn, and telephones are quiet then
    talk = recorded.waveform[107_040:].square().mean()
    assert recorded.waveform[:100_000].square().mean() < 0.01 * talk


def test_windows_are_the_same_at_every_call():
    first, second = speech.speech(**SMALL), speech.speech(**SMALL)
    assert first.train_windows.shape == (30, 1, 16_000) and first.test_windows.shape == (20, 1, 16_000)
    assert first.train_labels.bincount().tolist() == [15, 15] and first.test_labels.bincount().tolist() == [10, 10]
    assert first.classes == ("speaker90", "speaker91")
    torch.testing.assert_close(first.train_windows.mean(dim=2), torch.zeros(30, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(first.train_windows.std(dim=2), torch.ones(30, 1))
    assert torch.equal(first.train_windows, second.train_windows)
    assert torch.equal(first.test_windows, second.test_windows)


def test_windows_hold_one_speaker_of_their_part(monkeypatch):
    """On a recording whose samples tell their time: the class is who alone talks, and the parts are disjoint."""
    recorded = speech.conversation()
    time = torch.arange(len(recorded.waveform), dtype=torch.float64) / recorded.rate
    monkeypatch.setattr(speech, "conversation", lambda: recorded._replace(waveform=time))
    generator = torch.Generator().manual_seed(0)
    train, train_labels = speech._windows(0, speech.TRAINING, 1.0, 200, generator)
    test, test_labels = speech._windows(speech.TRAINING, 30, 1.0, 100, generator)
    assert train.max() < speech.TRAINING <= test.min()
    for windows, labels in ((train[:, 0], train_labels), (test[:, 0], test_labels)):
        for window, label in zip(windows, labels, strict=True):
            begin, end = float(window[0]), float(window[-1])
            assert end - begin == pytest.approx(15_999 / 16_000)
            heard = {turn.speaker for turn in recorded.turns if turn.start < end and turn.end > begin}
            assert heard == {speech._speakers()[label]}
    assert train[:, 0, 0].unique().numel() > 190  # anywhere, not on a grid


def test_speakers_cannot_be_told_by_loudness_nor_without_hearing():
    """Chance is 50%; MFCCs name 4 of 5 held-out windows and more, so there is something to learn."""
    data = speech.speech()

    def knn(features) -> float:
        return knn_accuracy(
            features(data.train_windows), data.train_labels, features(data.test_windows), data.test_labels, k=5
        )

    assert abs(knn(lambda x: torch.cat([x.std(dim=2), torch.ones(len(x), 1)], dim=1)) - 0.5) < 0.15
    assert knn(lambda x: speech.mfcc(x)[:, 0].mean(dim=1)) > 0.75


def test_refuses_what_does_not_fit(monkeypatch):
    with pytest.raises(ValueError, match="positive"):
        speech.speech(seconds=0)
    with pytest.raises(ValueError, match=r"speaker90 is never alone for 2 s"):
        speech.speech(seconds=2)
    speech.conversation.cache_clear()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(ModuleNotFoundError, match=r"requirements-speech\.txt"):
        speech.conversation()


def kaldi_mfcc(x: numpy.ndarray) -> numpy.ndarray:
    """Kaldi's definition, one frame, one triangle and one cosine at a time."""

    def mel(frequency):
        return 1127 * math.log(1 + frequency / 700)

    edges = [mel(20) + i * (mel(8000) - mel(20)) / 24 for i in range(25)]
    rows = []
    for start in range(0, len(x) - 400 + 1, 160):
        frame = x[start : start + 400] - x[start : start + 400].mean()
        frame = numpy.array([frame[i] - 0.97 * frame[max(i - 1, 0)] for i in range(400)])
        frame *= [(0.5 - 0.5 * math.cos(2 * math.pi * i / 399)) ** 0.85 for i in range(400)]
        power = abs(numpy.fft.rfft(frame, 512)) ** 2
        energies = []
        for low, middle, high in zip(edges, edges[1:], edges[2:], strict=False):
            energy = 0.0
            for k in range(256):
                place = mel(k * 16_000 / 512)
                if low < place <= middle:
                    energy += power[k] * (place - low) / (middle - low)
                elif middle < place < high:
                    energy += power[k] * (high - place) / (high - middle)
            energies.append(math.log(max(energy, 2.0**-23)))
        row = []
        for i in range(13):
            cosine = sum(e * math.cos(math.pi / 23 * (b + 0.5) * i) for b, e in enumerate(energies))
            row.append(cosine * math.sqrt((1 if i == 0 else 2) / 23) * (1 + 11 * math.sin(math.pi * i / 22)))
        rows.append(row)
    parts = [numpy.array(rows)]
    for _ in range(2):
        last = parts[-1]
        at = [last[min(max(t, 0), len(last) - 1)] for t in range(-2, len(last) + 2)]
        parts.append(
            numpy.array([sum(n * (at[t + 2 + n] - at[t + 2 - n]) for n in (1, 2)) / 10 for t in range(len(last))])
        )
    return numpy.concatenate(parts, axis=1)


@pytest.mark.parametrize("samples", [400, 559, 560, 3000])
def test_mfcc_is_kaldis(samples):
    x = speech.conversation().waveform[120_000 : 120_000 + samples].double()
    ours = speech.mfcc(x)
    expected = torch.from_numpy(kaldi_mfcc(x.numpy()))
    assert ours.shape == (1 + (samples - 400) // 160, 39)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    # float32: its rounding of the power spectrum, of relative size 1e-7 times the range of the frame's spectrum
    torch.testing.assert_close(speech.mfcc(x.float()).double(), expected, rtol=1e-3, atol=1e-2)


def test_mfcc_takes_batches_and_silence_and_no_scale():
    x = speech.conversation().waveform[120_000:136_000].double().view(2, 2, 4000)
    features = speech.mfcc(x)
    assert features.shape == (2, 2, 23, 39)
    torch.testing.assert_close(features[1, 0], speech.mfcc(x[1, 0]))
    assert torch.equal(speech.mfcc(x, deltas=False), features[..., :13])
    louder = speech.mfcc(100 * x) - speech.mfcc(10 * x)  # loud enough that no energy is at the floor
    shift = torch.zeros(39, dtype=torch.float64)
    shift[0] = 23**0.5 * math.log(100)
    torch.testing.assert_close(louder, shift.expand_as(louder), rtol=1e-9, atol=1e-9)
    assert speech.mfcc(torch.zeros(400)).isfinite().all()
    with pytest.raises(ValueError, match="400 samples"):
        speech.mfcc(torch.randn(399))


@pytest.mark.parametrize(("layers", "hop", "field"), [(WAV2VEC2_LAYERS, 320, 400), (CPC_LAYERS, 160, 465)])
def test_frames_follow_from_the_strides(layers, hop, field):
    """The first frame hears `field` samples, and every `hop` more bring another."""
    encoder = ConvFeatureEncoder([(4, kernel, stride) for _, kernel, stride in layers])
    assert encoder.stride == hop
    for samples in (field, field + hop - 1, field + hop, 16_000):
        expected = 1 + (samples - field) // hop
        assert encoder.frames(samples) == expected
        assert encoder(torch.randn(2, samples)).shape == (2, expected, 4)
    with pytest.raises(ValueError, match="too few"):
        encoder(torch.randn(2, 1, field - 1))
    # a frame hears its own samples and no others, where no norm looks at all of them
    encoder.norms[0] = torch.nn.Identity()
    x = torch.randn(1, 1, field + 4 * hop, requires_grad=True)
    encoder(x)[0, 2].sum().backward()
    heard = x.grad[0, 0].nonzero()
    assert heard.min() == 2 * hop and heard.max() == 2 * hop + field - 1


def test_encoder_is_fairseqs():
    """Its layers as a Sequential of torch's own modules, for both norms."""
    torch.manual_seed(0)
    x = torch.randn(2, 1, 4000, dtype=torch.float64)
    encoder = ConvFeatureEncoder([(6, *rest) for _, *rest in WAV2VEC2_LAYERS]).double()
    y = torch.nn.functional.conv1d(x, encoder.convolutions[0].weight, stride=5)
    y = (y - y.mean(dim=2, keepdim=True)) / (y.var(dim=2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    for index, convolution in enumerate(encoder.convolutions):
        y = torch.nn.functional.conv1d(y, convolution.weight, stride=2) if index else y
        y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
    torch.testing.assert_close(encoder(x), y.transpose(1, 2))
    assert len(list(encoder.parameters())) == 7 + 2

    encoder = ConvFeatureEncoder([(6, 10, 5), (6, 3, 2)], norm="layer").double()
    y = x
    for convolution, norm, stride in zip(encoder.convolutions, encoder.norms, (5, 2), strict=True):
        y = torch.nn.functional.conv1d(y, convolution.weight, stride=stride)
        y = (y - y.mean(dim=1, keepdim=True)) / (y.var(dim=1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        y = torch.nn.functional.gelu(y * norm.weight[:, None] + norm.bias[:, None])
    torch.testing.assert_close(encoder(x), y.transpose(1, 2))


@pytest.mark.parametrize("kernel", [5, 8])
def test_positions_look_around(kernel):
    """A frame hears kernel / 2 frames before it and one less behind it if the kernel is even."""
    torch.manual_seed(0)
    positions = ConvPositionalEmbedding(8, kernel=kernel, groups=2)
    x = torch.randn(1, 20, 8, requires_grad=True)
    y = positions(x)
    assert y.shape == x.shape
    y[0, 10, :4].sum().backward()
    times, channels = x.grad[0].nonzero().unbind(dim=1)
    assert (times.min(), times.max()) == (10 - kernel // 2, 10 + (kernel - 1) // 2)
    assert channels.max() == 3  # the other group is not heard
    weight = positions.convolution.weight  # normalized at each place of the kernel: g v / |v|
    length, direction = (getattr(positions.convolution.parametrizations.weight, f"original{i}") for i in (0, 1))
    assert length.numel() == kernel
    torch.testing.assert_close(weight, length * direction / direction.norm(dim=(0, 1), keepdim=True))


def test_gradients_are_scaled():
    x = torch.randn(5, requires_grad=True)
    assert torch.equal(scale_gradient(x, 0.1), x)
    scale_gradient(x, 0.25).square().sum().backward()
    torch.testing.assert_close(x.grad, 0.5 * x.detach())
    assert scale_gradient(x, 1) is x
    assert not scale_gradient(x, 0).requires_grad
    compiled = torch.compile(lambda x: scale_gradient(x, 0.1).sum(), backend="aot_eager", fullgraph=True)
    (gradient,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(gradient, torch.full((5,), 0.1))


def test_transformer_takes_a_block_and_any_length():
    torch.manual_seed(0)
    encoder = ConvFeatureEncoder([(6, 10, 5), (6, 8, 8)])
    model = SpeechTransformer(encoder, embed_dim=8, depth=2, num_heads=2, kernel=4, groups=2)
    for samples in (1000, 4000):
        x = torch.randn(3, 1, samples)
        tokens = model.forward_features(x)
        assert tokens.shape == (3, encoder.frames(samples), 8)
        torch.testing.assert_close(model(x), tokens.mean(dim=1))
        torch.testing.assert_close(model.norm(model.forward_features(x, depth=2)), tokens)
        assert not torch.equal(model.forward_features(x, depth=1), model.forward_features(x, depth=2))
    with pytest.raises(ValueError, match="between 1 and the 2 blocks"):
        model.forward_features(x, depth=3)
    with pytest.raises(ValueError, match="embed_dim"):
        SpeechTransformer(encoder, embed_dim=10, num_heads=4)


def test_gru_hears_the_past_alone():
    model = SpeechGRU(ConvFeatureEncoder([(6, 10, 5), (6, 8, 8)], norm="layer"), dim=8)
    x = torch.randn(1, 1, 2000, requires_grad=True)
    context = model.gru(model.encoder(x))[0]
    assert model(x).shape == (1, model.dim)
    context[0, 10].sum().backward()
    assert x.grad[0, 0].nonzero().max() == 10 * 40 + 45 - 1


@pytest.mark.parametrize("layers", [[], [(4, 0, 1)]])
def test_encoder_refuses(layers):
    with pytest.raises(ValueError, match="layers must be"):
        ConvFeatureEncoder(layers)
    with pytest.raises(ValueError, match="norm must be"):
        ConvFeatureEncoder(norm="batch")
    with pytest.raises(ValueError, match="waveforms must be"):
        ConvFeatureEncoder([(4, 2, 1)])(torch.randn(2, 2, 100))
