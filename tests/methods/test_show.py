# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys

import pytest
import torch
from skimage import io

from sslkernels import show
from sslkernels.__main__ import main


@pytest.fixture
def run(monkeypatch, capsys):
    """The command line in this process; what it printed."""

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["sslkernels", "show", *arguments])
        main()
        return capsys.readouterr().out

    return call


def test_trains_draws_and_draws_again(run, tmp_path):
    """A few steps, then own images (grey, with transparency, not square) from the weights that were left."""
    printed = run("mae", "--steps", "2", "--out", str(tmp_path))
    assert f"The picture is {tmp_path / 'mae.png'}" in printed and str(tmp_path / "mae.pt") in printed
    assert (tmp_path / "mae.png").read_bytes().startswith(b"\x89PNG")

    grey, transparent = tmp_path / "grey.png", tmp_path / "transparent.png"
    io.imsave(grey, torch.randint(256, (60, 90), dtype=torch.uint8).numpy(), check_contrast=False)
    io.imsave(transparent, torch.randint(256, (50, 70, 4), dtype=torch.uint8).numpy(), check_contrast=False)
    own = ["--checkpoint", str(tmp_path / "mae.pt"), "--images", str(grey), str(transparent)]
    run("mae", "--out", str(tmp_path / "again"), *own)
    assert (tmp_path / "again" / "mae.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "again" / "mae.pt").exists()


@pytest.mark.parametrize("arguments", [["mae", "--steps", "0"], ["mae", "--images", "nowhere.png"], ["simclr"]])
def test_refuses(arguments, run, capsys):
    with pytest.raises(SystemExit) as refused:
        run(*arguments)
    message = str(refused.value) + capsys.readouterr().err
    assert arguments[-1] in message or arguments[-2] in message


def test_images_are_their_middles(tmp_path):
    wide = torch.zeros(96, 200, 3, dtype=torch.uint8)
    wide[:, 52:148] = 255  # the middle square
    io.imsave(tmp_path / "wide.png", wide.numpy(), check_contrast=False)
    images = show.load_images([tmp_path / "wide.png"])
    assert images.shape == (1, 3, 48, 48) and torch.equal(images, torch.ones_like(images))
