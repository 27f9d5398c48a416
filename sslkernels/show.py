# SPDX-License-Identifier: Apache-2.0
"""Train MAE on photographs for a minute and draw what it paints: `python -m sslkernels show mae`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels import data
from sslkernels.methods import MAE
from sslkernels.nn import VisionTransformer

SIZE, PATCH = 48, 6
# The photographs with something to paint, one held-out crop of each.
SHOWN = ("astronaut", "brick", "chelsea", "coffee", "coins", "immunohistochemistry", "retina", "stereo_motorcycle")
MEAN, STD = (0.45, 0.43, 0.40), (0.27, 0.26, 0.27)  # of the photographs, roughly


def new_method() -> MAE:
    """A MAE for images of any size; a minute's worth of one: pixels as they are, so that they can be looked at."""
    backbone = VisionTransformer(
        patch_size=PATCH, embed_dim=128, depth=4, num_heads=4, weight_init="glorot", mean=MEAN, std=STD
    )
    return MAE(backbone, decoder_dim=96, decoder_depth=2, decoder_heads=4)


def train(method: MAE, images: Tensor, *, steps: int, batch_size: int = 64, lr: float = 2e-3) -> float:
    """Train on images (N, 3, H, W), half of them mirrored, with a progress bar; the loss over the last tenth."""
    from tqdm import tqdm

    optimizer = torch.optim.AdamW(method.parameters(), lr=lr, weight_decay=0.05, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in (progress := tqdm(range(steps), desc="mae", unit="step")):
        batch = data.augment(images[torch.randint(len(images), (batch_size,))], scale=(0.6, 1.0), flip=True)
        loss, _ = method(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return sum(losses[-max(1, steps // 10) :]) / max(1, steps // 10)


def load_images(paths: list[Path]) -> Tensor:
    """Files as squares (N, 3, SIZE, SIZE) in [0, 1]: the middle of each."""
    from skimage import io

    images = []
    for path in paths:
        image = torch.tensor(io.imread(path)).float() / 255
        image = image[..., None].expand(-1, -1, 3) if image.ndim == 2 else image[..., :3]
        side = min(image.shape[:2])
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        square = image[top : top + side, left : left + side].permute(2, 0, 1)[None]
        images.append(F.interpolate(square, (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True))
    return torch.cat(images)


def draw(images: Tensor, grey: Tensor, painted: Tensor, path: Path, title: str) -> None:
    """Image, what the encoder sees of it, and what the decoder paints, side by side, two such in a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, names = math.ceil(len(images) / 2), ("image", "seen", "painted")
    figure = Figure(figsize=(9.6, 1.55 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 7, squeeze=False, width_ratios=(1, 1, 1, 0.12, 1, 1, 1))
    for axis in axes.flat:
        axis.axis("off")
    for index in range(len(images)):
        row, first = index // 2, 4 * (index % 2)
        for column, picture in enumerate((images[index], grey[index], painted[index])):
            axis = axes[row, first + column]
            axis.imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            if row == 0:
                axis.set_title(names[column], fontsize=10)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("method", choices=["mae"])
    parser.add_argument("--steps", type=int, default=600, help="of 64 images each (default: 600, about a minute)")
    parser.add_argument("--out", type=Path, default=Path("build/show"), help="folder for mae.png and mae.pt")
    parser.add_argument(
        "--images", type=Path, nargs="+", default=[], help="draw these in place of held-out photographs"
    )
    parser.add_argument("--checkpoint", type=Path, help="a mae.pt of an earlier run: draw, do not train")


def main(arguments: argparse.Namespace) -> None:
    for path in [*arguments.images, *([arguments.checkpoint] if arguments.checkpoint else [])]:
        if not path.is_file():
            raise SystemExit(f"{path} is no file")
    if arguments.steps < 1:
        raise SystemExit(f"--steps must be at least 1, got {arguments.steps}")
    torch.manual_seed(0)
    method = new_method()
    photographs = data.photographs(size=SIZE, test_crops=1)
    if arguments.checkpoint:
        method.load_state_dict(torch.load(arguments.checkpoint))
        trained = f"weights of {arguments.checkpoint}"
    else:
        loss = train(method, photographs.train_images, steps=arguments.steps)
        trained = f"{arguments.steps} steps, loss {loss:.3f}"
        arguments.out.mkdir(parents=True, exist_ok=True)
        torch.save(method.state_dict(), arguments.out / "mae.pt")
    shown = [photographs.classes.index(name) for name in SHOWN]
    images = load_images(arguments.images) if arguments.images else photographs.test_images[shown]
    method.eval()
    grey, painted = method.reconstruct(images, generator=torch.Generator().manual_seed(0))
    path = arguments.out / "mae.png"
    kind = "own images" if arguments.images else "held-out parts of photographs"
    draw(images, grey, painted, path, f"MAE sees a quarter of the patches of {kind} ({trained})")
    print(f"The picture is {path}.")
    if not arguments.checkpoint:
        again = f"python -m sslkernels show mae --checkpoint {arguments.out / 'mae.pt'} --images FILE..."
        print(f"The weights are {arguments.out / 'mae.pt'}: `{again}` paints your own.")
