# SPDX-License-Identifier: Apache-2.0
"""Masks of latent prediction: a context and target blocks, whose sizes one draw decides for the whole batch.

Shapes depend on the draw, so it takes place on the host, and the ids are then sent to their device.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sslkernels import _checks as check
from sslkernels._random import seed_tensor
from sslkernels.ops._masks_grid import Device, grid_of, moved
from sslkernels.ops._registry import define
from sslkernels.reference import masks as reference

TRUNCATE = ("random", "raster")


def _dynamic() -> Any:
    return torch.library.get_ctx().new_dynamic_size()


def _multiblock_fake(seed, batch, height, width, targets, *rest):
    count = _dynamic() if rest[-1] is None else rest[-1]
    return seed.new_empty(batch, count), seed.new_empty(batch, targets, _dynamic())


_multiblock = define(
    "multiblock_mask(Tensor seed, SymInt batch, SymInt height, SymInt width, int targets, float[2] context_scale,"
    " float[2] target_scale, float[2] target_aspect, int min_keep, bool allow_overlap, bool raster,"
    " bool reproduce_bugs, SymInt? context_tokens) -> (Tensor context, Tensor targets)",
    reference=reference.multiblock_mask,
    fake=_multiblock_fake,
)
_multiblock3d = define(
    "multiblock3d_mask(Tensor seed, SymInt batch, SymInt frames, SymInt height, SymInt width, int blocks,"
    " float[2] spatial_scale, float[2] temporal_scale, float[2] aspect, bool raster, SymInt context_frames,"
    " SymInt? max_keep) -> (Tensor context, Tensor target)",
    reference=reference.multiblock3d_mask,
    fake=lambda seed, batch, *rest: (seed.new_empty(batch, _dynamic()), seed.new_empty(batch, _dynamic())),
)


# how the kernel's refusals begin, of what only the drawn blocks can tell
_REFUSALS = re.compile("(context_tokens|blocks) must .*")


def _run(op: Callable[..., tuple[Tensor, Tensor]], device: Device, *args: Any) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        context, target = op(*args)
    else:
        try:
            context, target = op(*args)
        except RuntimeError as error:
            refusal = _REFUSALS.search(str(error))
            if refusal is None:
                raise
            raise ValueError(refusal[0]) from None
    return moved(context, device), moved(target, device)


def _host_seed(seed: int | Tensor | None, generator: torch.Generator | None) -> Tensor:
    for name, x in (("seed", seed), ("generator", generator)):
        if isinstance(x, Tensor | torch.Generator) and x.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, as it decides shapes, got {x.device}")
    return seed_tensor(seed, generator)


def multiblock_mask(
    batch_size: int,
    grid: Sequence[int],
    *,
    targets: int = 4,
    context_scale: Sequence[float] = (0.85, 1.0),
    target_scale: Sequence[float] = (0.15, 0.2),
    target_aspect: Sequence[float] = (0.75, 1.5),
    min_keep: int = 10,
    allow_overlap: bool = False,
    truncate: str = "random",
    reproduce_bugs: bool = False,
    context_tokens: int | None = None,
    device: Device = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Predict blocks from a large block around them: I-JEPA's mask.

    One size of target blocks and one of context blocks is drawn for the batch, positions for each sample:

        area = int(H W scale), h = round(sqrt(area * aspect)), w = round(sqrt(area / aspect)), h < H, w < W
        context = a block of aspect 1, less the union of the target blocks (unless allow_overlap)

    A context of at most min_keep tokens is drawn again; after 20 failures the last target block may overlap it, after
    20 more the last but one, and so on. Then all contexts are cut to one length, the shortest of the batch.

    Args:
        grid: (H, W), patches.
        targets: M, blocks to predict.
        context_scale, target_scale: smallest and largest area of a block as a part of the grid.
        target_aspect: smallest and largest h / w.
        truncate: what a cut leaves: "random" tokens of the context, or as the original the first in "raster" order,
            which drops tokens at the bottom right most often.
        reproduce_bugs: as the original, draw scale and aspect from one random number (they are then one to one) and
            never place a block at the last row or column.
        context_tokens: cut to this length instead, so that a sample does not depend on the shortest of its batch and
            the context's shape is fixed. Fix target_scale and target_aspect to fix the targets' shape as well.
        batch_size: B.
        device: of the result. The draw takes place on the host, where the shapes are needed.
        generator, seed: as in `random_mask`, both on the CPU.

    Returns:
        context, (B, Kc), and targets, (B, M, Kt): int64 ids, each ascending.

    Raises:
        ValueError, TypeError: numbers out of range, by name; a context that can't have more than min_keep tokens; a
            sample of this batch with fewer than context_tokens (compiled: RuntimeError); a seed on another device.

    Example:
        >>> context, targets = multiblock_mask(16, (14, 14), seed=0)
        >>> targets.shape[:2]
        torch.Size([16, 4])

    Source: facebookresearch/ijepa, src/masks/multiblock.py::MaskCollator.
    """
    check.integer("batch_size", batch_size, 0)
    height, width = grid_of(grid, 2, 2)
    check.integer("targets", targets, 1)
    context_scale = check.interval("context_scale", context_scale, 0.0, 1.0)
    target_scale = check.interval("target_scale", target_scale, 0.0, 1.0)
    target_aspect = check.interval("target_aspect", target_aspect, 0.0, math.inf)
    check.integer("min_keep", min_keep, 0)
    h, w = reference.inner_block_size(context_scale[0], 1.0, height, width)
    if h * w <= min_keep:
        raise ValueError(f"min_keep must be less than the smallest context block ({h} x {w}), got {min_keep}")
    check.choice("truncate", truncate, TRUNCATE)
    if context_tokens is not None:
        check.integer("context_tokens", context_tokens, 1, h * w)
    return _run(
        *(_multiblock, device, _host_seed(seed, generator), batch_size, height, width, targets),
        *(context_scale, target_scale, target_aspect, min_keep, allow_overlap, truncate == "raster", reproduce_bugs),
        context_tokens,
    )


def multiblock3d_mask(
    batch_size: int,
    grid: Sequence[int],
    *,
    blocks: int = 8,
    spatial_scale: Sequence[float] = (0.15, 0.15),
    temporal_scale: Sequence[float] = (1.0, 1.0),
    aspect: Sequence[float] = (0.75, 1.5),
    truncate: str = "random",
    max_context_frames: int | None = None,
    max_keep: int | None = None,
    device: Device = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Predict the union of blocks of a clip from the rest: the masks of V-JEPA and V-JEPA 2.

    One block size is drawn for the batch, from three random numbers, positions for each sample; blocks that leave no
    context are drawn again. All contexts and all targets are then cut to the shortest of the batch. V-JEPA takes the
    mean of two masks: 8 blocks of spatial scale 0.15, and 2 blocks of 0.7.

    Args:
        grid: (T, H, W), frames after tubelets and patches.
        blocks: whose union is the target.
        spatial_scale: smallest and largest part of a frame that a block covers.
        temporal_scale: smallest and largest part of the frames that it lasts.
        aspect: smallest and largest h / w.
        max_context_frames: the context ends after so many frames; what follows is target.
        max_keep: at most so many context tokens.
        batch_size, truncate, device, generator, seed: as in `multiblock_mask`.

    Returns:
        context, (B, Kc), and target, (B, Kt): int64 ids in the order (t, h, w), each ascending.

    Raises:
        ValueError, TypeError: as in `multiblock_mask`; blocks that cover the clip in 100 draws (compiled:
            RuntimeError).

    Example:
        >>> context, target = multiblock3d_mask(2, (8, 14, 14), seed=0)
        >>> context.shape[0], target.shape[0]
        (2, 2)

    Source: facebookresearch/jepa, src/masks/multiblock3d.py; facebookresearch/vjepa2,
        src/masks/multiseq_multiblock3d.py.
    """
    check.integer("batch_size", batch_size, 0)
    frames, height, width = grid_of(grid, 3)
    check.integer("blocks", blocks, 1)
    spatial_scale = check.interval("spatial_scale", spatial_scale, 0.0, 1.0)
    temporal_scale = check.interval("temporal_scale", temporal_scale, 0.0, 1.0)
    aspect = check.interval("aspect", aspect, 0.0, math.inf)
    check.choice("truncate", truncate, TRUNCATE)
    max_context_frames = frames if max_context_frames is None else max_context_frames
    check.integer("max_context_frames", max_context_frames, 1, frames)
    if max_keep is not None:
        check.integer("max_keep", max_keep, 1)
    return _run(
        *(_multiblock3d, device, _host_seed(seed, generator), batch_size, frames, height, width, blocks),
        *(spatial_scale, temporal_scale, aspect, truncate == "raster", max_context_frames, max_keep),
    )
