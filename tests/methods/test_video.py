# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from sslkernels import data, video
from sslkernels.evaluation import knn_accuracy

SMALL = {"size": 16, "frames": 4, "train_clips": 90, "test_clips": 60}


def test_clips_are_the_same_at_every_call():
    clips = data.clips(**SMALL)
    assert clips.train_clips.shape == (90, 3, 4, 16, 16) and clips.test_clips.shape == (60, 3, 4, 16, 16)
    assert clips.train_clips.min() >= 0 and clips.train_clips.max() <= 1
    assert clips.train_labels.bincount().tolist() == [30] * 3 and clips.test_labels.bincount().tolist() == [20] * 3
    assert clips.classes == video.VIDEOS
    motion = data.clips(**SMALL, label="motion")
    assert motion.train_labels.bincount().tolist() == [18] * 5 and motion.test_labels.bincount().tolist() == [12] * 5
    assert motion.classes == ("still", "up", "down", "left", "right")
    assert torch.equal(motion.train_clips, clips.train_clips)
    assert torch.equal(data.clips(**SMALL).test_clips, clips.test_clips)


def test_the_class_is_the_motion_of_the_window(monkeypatch):
    """On a film whose pixels are their own coordinates, and whose frames tell their number."""
    t, y, x = torch.meshgrid(torch.arange(200), torch.arange(64), torch.arange(100), indexing="ij")
    monkeypatch.setattr(video, "_film", lambda name, side: torch.stack([t, y, x], dim=1).to(torch.uint8))
    clips = data.clips(size=32, frames=8, train_clips=150, test_clips=150, label="motion")
    for part, labels in ((clips.train_clips, clips.train_labels), (clips.test_clips, clips.test_labels)):
        frame, top, left = (part[:, :, :, 0, 0] * 255).round().unbind(dim=1)  # each (N, T)
        assert torch.equal(frame[:, 1:] - frame[:, :-1], torch.ones(150, 7))
        directions = torch.tensor(list(video.MOTIONS.values()))[labels]
        for moved, direction in ((top, directions[:, 0]), (left, directions[:, 1])):
            total = (moved[:, -1] - moved[:, 0]) * direction
            assert ((total >= 6) & (total <= 15) | (direction == 0) & (total == 0)).all()
            still = direction == 0
            assert torch.equal(moved[still], moved[still][:, :1].expand(-1, 8))
        # the middle of the path does not tell the class
        middle = (left[:, 3] + left[:, 4]) / 2
        means = torch.stack([middle[labels == i].mean() for i in range(5)])
        assert means.max() - means.min() < 3 * middle.std() * (2 / 30) ** 0.5
    assert (clips.train_clips[:, 0].max() * 255).round() < 120 <= (clips.test_clips[:, 0].min() * 255).round()


def test_one_frame_hardly_tells_the_class():
    """Chance is 20%, and three standard deviations of 320 draws are 7%: the middle frame tells nothing, the last one
    (29%) where a window can have gone, and all the frames 42%, their differences 79%."""
    clips = data.clips(train_clips=640, test_clips=320, label="motion")

    def knn(view) -> float:
        train, test = (view(part).flatten(1) for part in (clips.train_clips, clips.test_clips))
        return knn_accuracy(train, clips.train_labels, test, clips.test_labels, k=5)

    assert knn(lambda x: x[:, :, 3]) < 0.27
    assert knn(lambda x: x[:, :, 7]) < 0.35
    assert knn(lambda x: x.diff(dim=2)) > 0.7


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="frames"):
        data.clips(frames=1)
    with pytest.raises(ValueError, match='label must be "film" or "motion"'):
        data.clips(label="speed")
    with pytest.raises(ValueError, match="do not fit"):
        data.clips(size=32, frames=18)
