# SPDX-License-Identifier: Apache-2.0
"""A real recording of speech that an installed package ships (nothing is downloaded), its windows, and MFCCs."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import math
import wave
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

__all__ = ["Conversation", "SpeechData", "Turn", "conversation", "mfcc", "speech"]

TRAINING = 20.0  # seconds: both speakers are alone for several of them before it, and after it


class Turn(NamedTuple):
    """Somebody talks, from `start` to `end` in seconds."""

    start: float
    end: float
    speaker: str


class Conversation(NamedTuple):
    """waveform (samples,), float32 in [-1, 1], `rate` samples a second, and who talks when; turns may overlap."""

    waveform: Tensor
    rate: int
    turns: tuple[Turn, ...]


class SpeechData(NamedTuple):
    """Windows (N, 1, samples), float32 of mean 0 and deviation 1, and their class indices (N,), int64, of two parts of
    the recording that share no sample."""

    train_windows: Tensor
    train_labels: Tensor
    test_windows: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]


@functools.cache
def conversation() -> Conversation:
    """The telephone call of two people, 30 seconds at 16 kHz, that pyannote.audio's wheel holds with their turns.

    The package is found, not imported: what it depends on is not needed.
    """
    try:
        files = importlib.metadata.distribution("pyannote.audio")
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            "the recording is pyannote.audio's: pip install --no-deps -r requirements-speech.txt"
        ) from None
    folder = Path(str(files.locate_file("pyannote/audio/sample")))
    with wave.open(str(folder / "sample.wav")) as recording:
        samples = numpy.frombuffer(recording.readframes(recording.getnframes()), dtype="<i2")
        rate = recording.getframerate()
    turns = []
    for line in (folder / "sample.rttm").read_text().splitlines():
        _, _, _, start, length, _, _, speaker, *_ = line.split()
        turns.append(Turn(float(start), float(start) + float(length), speaker))
    return Conversation(torch.from_numpy(samples.astype("float32") / 2**15), rate, tuple(turns))


def speech(*, seconds: float = 1.0, train_windows: int = 400, test_windows: int = 200) -> SpeechData:
    """Windows of the conversation in which one speaker alone talks; the class is the speaker (two, in equal parts).

    Training windows lie in its first 20 seconds, held-out ones in the last 10, at places drawn at random, so that they
    overlap a lot. Each has its own mean and deviation taken out: loudness does not tell the speaker. The same windows
    at every call.

    Of half a minute, one speaker alone is heard for 11 seconds of the first part and 9 of the second: enough to show
    that a method learns something, never an estimate of how well it names speakers.
    """
    if not seconds > 0 or train_windows < 1 or test_windows < 1:
        raise ValueError(f"expected positive numbers, got {seconds=}, {train_windows=}, {test_windows=}")
    generator = torch.Generator().manual_seed(0)
    end = len(conversation().waveform) / conversation().rate
    parts: list[Tensor] = []
    for begin, stop, count in ((0.0, TRAINING, train_windows), (TRAINING, end, test_windows)):
        windows, labels = _windows(begin, stop, seconds, count, generator)
        centred = windows - windows.mean(dim=2, keepdim=True)
        parts += [centred / centred.std(dim=2, keepdim=True), labels]
    train, train_labels, test, test_labels = parts
    return SpeechData(train, train_labels, test, test_labels, _speakers())


def _speakers() -> tuple[str, ...]:
    return tuple(sorted({turn.speaker for turn in conversation().turns}))


def _alone(speaker: str, begin: float, end: float) -> list[tuple[float, float]]:
    """The stretches between `begin` and `end` in which this speaker talks and nobody else does."""
    turns = conversation().turns
    edges = sorted({begin, end, *(t for turn in turns for t in turn[:2] if begin < t < end)})
    stretches: list[tuple[float, float]] = []
    for left, right in itertools.pairwise(edges):
        if {turn.speaker for turn in turns if turn.start <= left and turn.end >= right} != {speaker}:
            continue
        if stretches and stretches[-1][1] == left:
            left = stretches.pop()[0]
        stretches.append((left, right))
    return stretches


def _windows(begin: float, end: float, seconds: float, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` windows (count, 1, samples) between two times, the speakers by turns, and the speakers' indices."""
    recorded, speakers = conversation(), _speakers()
    samples = round(seconds * recorded.rate)
    labels = torch.arange(count) % len(speakers)
    starts = torch.empty(count, dtype=torch.int64)
    for index, speaker in enumerate(speakers):
        places = torch.cat([
            torch.arange(math.ceil(left * recorded.rate), int(right * recorded.rate) - samples + 1)
            for left, right in _alone(speaker, begin, end)
            if int(right * recorded.rate) - samples >= math.ceil(left * recorded.rate)
        ] or [torch.empty(0, dtype=torch.int64)])  # fmt: skip
        if not len(places):
            raise ValueError(
                f"between {begin:g} and {end:g} s {speaker} is never alone for {seconds:g} s: give fewer seconds"
            )
        chosen = labels == index
        starts[chosen] = places[torch.randint(len(places), (int(chosen.sum()),), generator=generator)]
    return recorded.waveform.unfold(0, samples, 1)[starts][:, None], labels


def mfcc(waveforms: Tensor, *, rate: int = 16_000, deltas: bool = True) -> Tensor:
    """Mel-frequency cepstra of waveforms (..., samples): (..., frames, 39), a frame every 10 ms, as HuBERT clusters.

        frame  = 25 ms, its mean taken out, x_t - 0.97 x_(t-1), times Povey's window hann^0.85
        energy = max(|FFT|^2 through 23 triangles that are even in mel = 1127 ln(1 + f / 700), 20 Hz to rate / 2, 2^-23)
        c      = the first 13 of the orthonormal DCT of log energy, c_i times 1 + 11 sin(pi i / 22)
        frame's features = c, its slope over 5 frames, and the slope of that (`deltas=False`: c alone)

    Frames that would reach beyond the end are left out; the slope takes the first and last frame for those beyond.
    Floating waveforms; at least one frame long. Scale shifts c_0 alone, as long as no energy is below the floor.

    Raises:
        ValueError: fewer samples than one frame.

    Example:
        >>> mfcc(torch.randn(2, 16_000)).shape
        torch.Size([2, 98, 39])

    Source: Kaldi `feat/feature-mfcc.cc` with its defaults but for the energy (`use_energy=False`), without dither;
    fairseq `examples/hubert/simple_kmeans/dump_mfcc_feature.py`, and torchaudio's `compliance/kaldi.py` and
    `compute_deltas`, which it calls.
    """
    length, shift = int(0.025 * rate), int(0.010 * rate)
    if waveforms.ndim < 1 or waveforms.shape[-1] < length:
        raise ValueError(
            f"waveforms must have at least the {length} samples of a frame of 25 ms, got {tuple(waveforms.shape)}"
        )
    frames = waveforms.unfold(-1, length, shift)
    frames = frames - frames.mean(dim=-1, keepdim=True)
    frames = frames - 0.97 * torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
    size = 2 ** math.ceil(math.log2(length))
    window, mel, dct = (x.to(frames) for x in _constants(length, size, rate))
    power = torch.fft.rfft(frames * window, n=size).abs().square()
    energy = (power @ mel).clamp_min(2.0**-23)
    cepstra = energy.log() @ dct
    if not deltas:
        return cepstra
    slope = _slope(cepstra)
    return torch.cat([cepstra, slope, _slope(slope)], dim=-1)


@functools.cache
def _constants(length: int, size: int, rate: int, bands: int = 23, kept: int = 13) -> tuple[Tensor, Tensor, Tensor]:
    """Window (length,), triangles (size / 2 + 1, bands), and DCT with its weights (bands, kept), in float64."""
    window = torch.hann_window(length, periodic=False, dtype=torch.float64) ** 0.85

    def mels(frequency: Tensor) -> Tensor:
        return 1127 * torch.log1p(frequency / 700)

    low, high = mels(torch.tensor([20.0, rate / 2], dtype=torch.float64)).tolist()
    edges = torch.linspace(low, high, bands + 2, dtype=torch.float64)
    bins = mels(torch.arange(size // 2 + 1, dtype=torch.float64) * rate / size)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    mel = torch.minimum(rising, falling).clamp_min(0)

    band, index = torch.arange(bands, dtype=torch.float64)[:, None], torch.arange(kept, dtype=torch.float64)
    dct = (2 / bands) ** 0.5 * torch.cos(math.pi / bands * (band + 0.5) * index)
    dct[:, 0] = bands**-0.5
    return window, mel, dct * (1 + 11 * torch.sin(math.pi * index / 22))


def _slope(x: Tensor) -> Tensor:
    """Of the least-squares line through five frames (..., frames, D)."""
    count = x.shape[-2]
    x = torch.cat([x[..., :1, :], x[..., :1, :], x, x[..., -1:, :], x[..., -1:, :]], dim=-2)
    one, two = (x[..., 2 + k : 2 + k + count, :] - x[..., 2 - k : 2 - k + count, :] for k in (1, 2))
    return (one + 2 * two) / 10
