# SPDX-License-Identifier: Apache-2.0
"""Patches of images and clips: read the visible ones, put tokens back in place, compare with the pixels hidden.

Patches are numbered row by row over the grid (H/p, W/q) of an image, frame by frame over (T/t, H/p, W/q) of a clip. The
values of a patch come in the order (c, [t], p, q) of a convolution's weight, or with `channels_last` as ([t], p, q, c).
`patch_size` is an int or (p, q) for images (B, C, H, W), and (t, p, q) for clips (B, C, T, H, W). Images may be
floating or uint8, of any strides: channels_last memory is read without a copy. ids are int64, (B, K), or (K,) for all
samples. An id outside the grid raises on the CPU (compiled: RuntimeError) or under `check_values`; elsewhere it makes
what depends on it NaN. Double backward raises. Definitions in plain PyTorch: `sslkernels.reference.patches`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels import _checks as check
from sslkernels._autocast import autocasts
from sslkernels.ops import _patches as op
from sslkernels.reference._precision import compute_dtype
from sslkernels.reference.patches import Patch, grid_of

__all__ = [
    "embed_patches",
    "gather_patches",
    "gather_tokens",
    "masked_patch_loss",
    "permute_patches",
    "restore_tokens",
]

NORMALIZE = (None, "patch", "channel")
REDUCTIONS = ("none", "mean", "sum")


def gather_patches(
    images: Tensor,
    ids: Tensor | None = None,
    patch_size: int | Sequence[int] = 16,
    *,
    channels_last: bool = False,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The values of the patches that ids name; no other pixel is read.

        out[b, k] = (patch ids[b, k] of image b - mean) / std

    `F.linear(gather_patches(x, ids, p), conv.weight.flatten(1), conv.bias)` is the convolution with stride p at these
    patches alone.

    Args:
        images: (B, C, H, W), or clips (B, C, T, H, W).
        ids: (B, K) or (K,), repeats allowed; None takes all patches in order.
        patch_size: as above; the sides must be multiples of it.
        channels_last: order of the values, as above. MAE and VideoMAE have their channels last.
        mean, std: one number a channel, in the units of values in [0, 1] where images are uint8. No gradient.
        dtype: of the result; that of float images, float32 for uint8, which is divided by 255.

    Returns:
        (B, K, C * [t] * p * q). Differentiable in float images; patches named twice add up.

    Raises:
        ValueError, TypeError: images of another rank or dtype; a side that the patch does not divide; ids of another
            shape, dtype or device, or outside the grid; mean or std of another length, or one without the other.

    Example:
        >>> gather_patches(torch.rand(2, 3, 32, 32), torch.tensor([[0, 3], [1, 2]]), 16).shape
        torch.Size([2, 2, 768])

    Source: the linear form of a ViT's patch embedding (arXiv:2010.11929) on visible patches (arXiv:2111.06377).
    """
    patch = _check_images(images, patch_size)
    ids = None if ids is None else _check_ids("ids", ids, images.shape[0], images)
    dtype = dtype or (images.dtype if images.is_floating_point() else torch.float32)
    if dtype not in check.FLOATS:
        raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")
    mean_std = _mean_std(mean, std, images, dtype)
    return _call(
        ids, _count(images, patch), False, op.gather_patches, images, ids, patch, channels_last, mean_std, dtype
    )


def embed_patches(
    images: Tensor,
    ids: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    position: Tensor | None = None,
    patch_size: int | Sequence[int] = 16,
    *,
    channels_last: bool = False,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Embeddings of the patches that ids name, with their positions: no other patch is read, embedded or stored.

        out[b, k] = weight @ patch ids[b, k] of image b + bias + position[ids[b, k]]

    Args:
        images, ids, patch_size, channels_last, mean, std: as in `gather_patches`.
        weight: of a Conv2d (D, C, p, q), a Conv3d (D, C, t, p, q), or (D, C * [t] * p * q).
        bias: (D,).
        position: (L, D) for the L patches of an image.

    Returns:
        (B, K, D); K = L if ids is None. Differentiable in all floating arguments but mean and std. Under autocast the
        patches are read in its dtype and the product is taken in it, as that of a convolution.

    Raises:
        ValueError, TypeError: as in `gather_patches`; weight, bias or position of another shape.

    Example:
        >>> conv, position = torch.nn.Conv2d(3, 8, 16, 16), torch.randn(4, 8)
        >>> embed_patches(torch.rand(2, 3, 32, 32), torch.tensor([0, 3]), conv.weight, conv.bias, position).shape
        torch.Size([2, 2, 8])

    Source: MAE's encoder (arXiv:2111.06377), which embeds all patches before it gathers.
    """
    patch = _check_images(images, patch_size)
    length, values = _count(images, patch), images.shape[1] * patch[0] * patch[1] * patch[2]
    for name, x in (("weight", weight), ("bias", bias), ("position", position)):
        if x is not None:
            check.tensor(name, x)
            check.same_device(name, x, "images", images)
    if weight.ndim < 2 or weight[0].numel() != values:
        raise ValueError(f"weight must have {values} values for each output, got shape {tuple(weight.shape)}")
    dim = weight.shape[0]
    if bias is not None and bias.shape != (dim,):
        raise ValueError(f"bias must have shape ({dim},), got {tuple(bias.shape)}")
    if position is not None and position.shape != (length, dim):
        raise ValueError(f"position must have shape ({length}, {dim}), got {tuple(position.shape)}")
    casts = autocasts(images)
    dtype = torch.get_autocast_dtype(images.device.type) if casts else weight.dtype
    matrix = weight.flatten(1)
    same = all(x is None or x.dtype == dtype for x in (bias, position))
    if casts or not same or dtype not in (torch.float32, torch.float64) or images.dtype == torch.float64 != dtype:
        patches = gather_patches(images, ids, patch_size, channels_last=channels_last, mean=mean, std=std, dtype=dtype)
        out = F.linear(patches, matrix, bias)
        return out if position is None else out + (position if ids is None else gather_tokens(position, ids))
    places = None if ids is None else _check_ids("ids", ids, images.shape[0], images)
    mean_std = _mean_std(mean, std, images, dtype)
    tensors = (images, places, matrix, bias, position)
    return _call(places, length, False, op.embed_patches, *tensors, patch, channels_last, mean_std)[0]


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """The tokens that ids name.

        out[b, k] = tokens[b, ids[b, k]]

    Args:
        tokens: (B, L, D), or (L, D) shared by the samples: a table of positions.
        ids: (B, K), or (B, M, K) for M masks of a sample. Repeats allowed.

    Returns:
        (B, K, D) or (B, M, K, D). The gradient adds up repeats in a fixed order.

    Raises:
        ValueError, TypeError: tokens or ids of another rank, dtype or device; ids outside [0, L).

    Example:
        >>> gather_tokens(torch.randn(2, 5, 3), torch.tensor([[0, 4], [2, 1]])).shape
        torch.Size([2, 2, 3])

    Source: `apply_masks` of I-JEPA (arXiv:2301.08243), which repeats the batch for each mask.
    """
    check.tensor("tokens", tokens)
    if tokens.ndim not in (2, 3) or tokens.dtype not in check.FLOATS:
        raise ValueError(f"tokens must be floating (B, L, D) or (L, D), got {tokens.dtype} {tuple(tokens.shape)}")
    _check_int64("ids", ids, tokens)
    shared = tokens.ndim == 2
    if ids.ndim not in (2, 3) or not (shared or ids.shape[0] == tokens.shape[0]):
        batch = "B" if shared else tokens.shape[0]
        raise ValueError(f"ids must have shape ({batch}, K) or ({batch}, M, K), got {tuple(ids.shape)}")
    rows = ids.reshape(1, ids.numel()) if shared else ids.flatten(1)
    table = tokens.unsqueeze(0) if shared else tokens
    out = _call(rows, table.shape[1], False, op.gather_tokens, table, rows)
    return out.view(*ids.shape, tokens.shape[-1])


def restore_tokens(
    visible: Tensor,
    ids: Tensor,
    mask_token: Tensor,
    position: Tensor | None = None,
    length: int | None = None,
    *,
    num_prefix_tokens: int = 0,
) -> Tensor:
    """A decoder's input: visible tokens back at their places, the mask token elsewhere, positions added.

        out[b, P + ids[b, k]] = visible[b, P + k] + position[P + ids[b, k]]
        out[b, P + l]         = mask_token        + position[P + l]            where no id is l
        out[b, :P]            = visible[b, :P]    + position[:P]

    Args:
        visible: (B, P + K, D).
        ids: (B, K) or (K,), places in [0, L), each at most once in a sample.
        mask_token: (D,), or any shape with D elements.
        position: (P + L, D), or (1, P + L, D).
        length: L; needed only without `position`.
        num_prefix_tokens: P, the leading tokens that have no place in the grid (a class token).

    Returns:
        (B, P + L, D) in the widest dtype of the three, which are its differentiable arguments.

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device; ids outside [0, L) or repeated.

    Example:
        >>> restore_tokens(torch.randn(2, 3, 4), torch.tensor([0, 2, 5]), torch.zeros(4), torch.randn(6, 4)).shape
        torch.Size([2, 6, 4])

    Source: the decoder of MAE (arXiv:2111.06377).
    """
    check.tensor("visible", visible)
    check.tensor("mask_token", mask_token)
    if visible.ndim != 3 or visible.dtype not in check.FLOATS:
        raise ValueError(f"visible must be floating (B, P + K, D), got {visible.dtype} {tuple(visible.shape)}")
    batch, rows, dim = visible.shape
    prefix = num_prefix_tokens
    if not 0 <= prefix <= rows:
        raise ValueError(f"num_prefix_tokens must be in [0, {rows}], got {prefix}")
    if mask_token.numel() != dim or mask_token.dtype not in check.FLOATS:
        raise ValueError(
            f"mask_token must hold {dim} floating elements, got {mask_token.dtype} {tuple(mask_token.shape)}"
        )
    check.same_device("mask_token", mask_token, "visible", visible)
    if position is not None:
        check.tensor("position", position)
        check.same_device("position", position, "visible", visible)
        shape = tuple(position.shape)
        if position.ndim not in (2, 3) or shape[-1] != dim or shape[-2] < prefix or position.shape[:-2].numel() != 1:
            raise ValueError(f"position must have shape ({prefix} + L, {dim}), got {shape}")
        if position.dtype not in check.FLOATS:
            raise TypeError(f"position must be float32, float64, bfloat16 or float16, got {position.dtype}")
        position = position.reshape(shape[-2:])
        if length not in (None, shape[-2] - prefix):
            raise ValueError(f"length must be {shape[-2] - prefix}, as position has it, got {length}")
        length = shape[-2] - prefix
    if length is None:
        raise ValueError("length must be given where position is not")
    ids = _check_ids("ids", ids, batch, visible)
    if ids.shape[1] != rows - prefix:
        raise ValueError(f"ids must have shape ({batch}, {rows - prefix}), got {tuple(ids.shape)}")
    token = mask_token.reshape(dim)
    return _call(ids, length, True, op.restore_tokens, visible, ids, token, position, length, prefix)


def masked_patch_loss(
    pred: Tensor,
    images: Tensor,
    ids: Tensor,
    patch_size: int | Sequence[int] = 16,
    *,
    normalize: str | None = None,
    eps: float = 1e-6,
    loss: str = "l2",
    channels_last: bool = True,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Reconstruction loss of hidden patches, straight from the image: no target is stored.

        t        = values of patch ids[b, m] of image b, less mean, by std, as `gather_patches` gives them
        t        = (t - mean(t)) / sqrt(var(t) + eps)      normalize="patch", over all values of the patch: MAE
        t        = (t - mean(t)) / (sqrt(var(t)) + eps)    normalize="channel", over those of one channel: VideoMAE
        row[b,m] = mean over the patch of (pred - t)^2     loss="l2"; of |pred - t| for "l1", SimMIM's

    Variances are unbiased. The gradient flows to pred alone, and is computed with the loss unless reduction is "none".

    Args:
        pred: (B, M, P) with P = C * [t] * p * q, a row for each id; or (B, L, P), a row for each patch, of which those
            of ids are read. M = L: a row for each id.
        images, patch_size, mean, std: as in `gather_patches`.
        ids: (B, M) or (M,): the hidden patches, each at most once in a sample.
        channels_last: order of the values of pred, as above.
        reduction: "mean" of all rows, their "sum", or "none".

    Returns:
        A scalar, or (B, M) for "none", float32 (float64 if pred or images are).

    Raises:
        ValueError, TypeError: as in `gather_patches`; pred of another shape; no id, or one repeated; an unknown option.

    Example:
        >>> pred, images = torch.randn(2, 3, 768, requires_grad=True), torch.rand(2, 3, 32, 32)
        >>> masked_patch_loss(pred, images, torch.tensor([0, 1, 3]), 16, normalize="patch").shape
        torch.Size([])

    Source: MAE (arXiv:2111.06377), SimMIM (arXiv:2111.09886), VideoMAE (arXiv:2203.12602).
    """
    patch = _check_images(images, patch_size)
    ids = _check_ids("ids", ids, images.shape[0], images)
    check.tensor("pred", pred)
    check.same_device("pred", pred, "images", images)
    length, values = _count(images, patch), images.shape[1] * patch[0] * patch[1] * patch[2]
    count = ids.shape[1]
    if pred.dtype not in check.FLOATS:
        raise TypeError(f"pred must be float32, float64, bfloat16 or float16, got {pred.dtype}")
    batch = images.shape[0]
    if pred.ndim != 3 or (pred.shape[0], pred.shape[2]) != (batch, values) or pred.shape[1] not in (count, length):
        rows = count if count == length else f"{count} or {length}"
        raise ValueError(f"pred must have shape ({batch}, {rows}, {values}), got {tuple(pred.shape)}")
    if ids.numel() == 0:
        raise ValueError(f"ids must name at least one patch, got shape {tuple(ids.shape)}")
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize must be None, 'patch' or 'channel', got {normalize!r}")
    check.choice("loss", loss, ("l2", "l1"))
    check.choice("reduction", reduction, REDUCTIONS)
    check.in_range("eps", eps, 0.0, float("inf"))
    mode = NORMALIZE.index(normalize)
    mean_std = _mean_std(mean, std, images, compute_dtype(pred, images))
    options = (patch, mode, float(eps), loss == "l1", channels_last, mean_std, REDUCTIONS.index(reduction))
    wanted = reduction != "none" and pred.requires_grad and torch.is_grad_enabled()
    return _call(ids, length, True, op.masked_patch_loss, pred, images.detach(), ids, *options, wanted)[0]


def permute_patches(images: Tensor, ids: Tensor, patch_size: int | Sequence[int]) -> Tensor:
    """Images whose patches have changed places: jigsaw puzzles.

        patch l of the result = patch ids[b, l] of image b

    Args:
        images: as in `gather_patches`; the result has their shape and dtype.
        ids: (B, L) or (L,), a permutation of all L patches of each sample.
        patch_size: as above; the sides must be multiples of it.

    Returns:
        Images, contiguous. Differentiable; integer images have zeros where, off the CPU, ids are no permutation.

    Raises:
        ValueError, TypeError: as in `gather_patches`; ids that are no permutation.

    Example:
        >>> permute_patches(torch.arange(4.0).reshape(1, 1, 2, 2), torch.tensor([3, 2, 1, 0]), 1)
        tensor([[[[3., 2.],
                  [1., 0.]]]])

    Source: Noroozi and Favaro 2016 (arXiv:1603.09246).
    """
    patch = _check_images(images, patch_size)
    ids = _check_ids("ids", ids, images.shape[0], images)
    length = _count(images, patch)
    if ids.shape[1] != length:
        raise ValueError(f"ids must be a permutation of {length} patches, got shape {tuple(ids.shape)}")
    return _call(ids, length, True, op.permute_patches, images, ids, patch, False)


def _call(ids: Tensor | None, length: int, distinct: bool, run: Callable, *args: Any) -> Any:
    """Run an op that checks its ids; what it finds there is a ValueError, but in compiled code."""
    if ids is None or torch.compiler.is_compiling():
        return run(*args)
    if ids.device.type != "cpu":
        check.ids("ids", ids, length, distinct)
    try:
        return run(*args)
    except RuntimeError:
        check.ids("ids", ids, length, distinct)
        raise


def _count(images: Tensor, patch: Patch) -> int:
    t, h, w = grid_of(images, patch)
    return t * h * w


def _check_images(images: Any, patch_size: Any) -> Patch:
    check.tensor("images", images)
    if images.ndim not in (4, 5):
        raise ValueError(f"images must be (B, C, H, W) or clips (B, C, T, H, W), got shape {tuple(images.shape)}")
    if images.dtype not in (*check.FLOATS, torch.uint8):
        raise TypeError(f"images must be float32, float64, bfloat16, float16 or uint8, got {images.dtype}")
    sizes = patch_size
    if isinstance(sizes, int) and not isinstance(sizes, bool) and images.ndim == 4:
        sizes = (sizes, sizes)
    if not isinstance(sizes, Sequence) or len(sizes) != images.ndim - 2 or not all(type(s) is int for s in sizes):
        expected = "an int or (p, q)" if images.ndim == 4 else "(t, p, q) for clips"
        raise ValueError(f"patch_size must be {expected}, got {patch_size!r}")
    for size, side in zip(sizes, images.shape[2:]):
        if size < 1 or side % size:
            raise ValueError(
                f"patch_size must divide the sides {tuple(images.shape[2:])} of images, got {tuple(sizes)}"
            )
    return (1, *sizes)[-3:]


def _check_int64(name: str, ids: Any, like: Tensor) -> None:
    check.tensor(name, ids)
    if ids.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {ids.dtype}")
    if ids.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {ids.device}")


def _check_ids(name: str, ids: Any, batch: int, like: Tensor) -> Tensor:
    """ids for each sample: (B, K)."""
    _check_int64(name, ids, like)
    if ids.ndim == 1:
        return ids.expand(batch, -1)
    if ids.ndim != 2 or ids.shape[0] != batch:
        raise ValueError(f"{name} must have shape ({batch}, K) or (K,), got {tuple(ids.shape)}")
    return ids


def _mean_std(mean: Any, std: Any, images: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Both as one tensor (2, C) in the dtype of the arithmetic."""
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise ValueError("mean and std must come together, got only one of them")
    channels, dtype = images.shape[1], compute_dtype(images.dtype, dtype)
    for name, x in (("mean", mean), ("std", std)):
        if not isinstance(x, Tensor | Sequence):
            raise TypeError(f"{name} must be a tensor or a sequence of numbers, got {type(x).__name__}")
        if (x.numel() if isinstance(x, Tensor) else len(x)) != channels:
            raise ValueError(f"{name} must have one number for each of {channels} channels, got {x}")
        if isinstance(x, Tensor):
            check.same_device(name, x, "images", images)
        elif name == "std" and not all(v > 0 for v in x):
            raise ValueError(f"std must be positive, got {x}")

    def row(x: Any) -> Tensor:
        if isinstance(x, Tensor):
            return x.detach().reshape(channels).to(dtype)
        # by filling: a copy from host memory would wait for the device
        return torch.stack([torch.full((), v, dtype=dtype, device=images.device) for v in x])

    return torch.stack([row(mean), row(std)])
