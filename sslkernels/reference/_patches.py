# SPDX-License-Identifier: Apache-2.0
"""The patch ops as the dispatcher calls them where no compiled kernel serves, in plain PyTorch.

Signatures are the schemas'. Gradients are written out, because autograd does not record below the dispatcher. Ids on
the CPU are checked, which raises; elsewhere a bad one makes NaN.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import torch.nn.functional as F

from sslkernels import _checks as check
from sslkernels.reference import patches as reference
from sslkernels.reference._precision import compute_dtype
from sslkernels.reference.patches import assemble, cells, grid_of, outside, repeated, spoil


def _length(images, patch) -> int:
    t, h, w = grid_of(images, patch)
    return t * h * w


def gather_patches(images, ids, patch_size, channels_last, mean_std, dtype):
    patch = tuple(patch_size)
    if ids is not None:
        check.ids("ids", ids, _length(images, patch))
    mean, std = (None, None) if mean_std is None else mean_std
    out = reference.gather_patches(images, ids, patch, channels_last=channels_last, mean=mean, std=std, dtype=dtype)
    return out.contiguous()


def gather_patches_backward(grad, ids, shape, patch_size, channels_last, mean_std, dtype):
    patch = tuple(patch_size)
    out = torch.zeros(tuple(shape), dtype=compute_dtype(grad, dtype), device=grad.device)
    t, h, w = grid_of(out, patch)
    grad = grad.to(out.dtype)
    if ids is None:
        out = assemble(grad, shape, patch, channels_last)
    else:
        check.ids("ids", ids, t * h * w)
        bad = outside(ids, t * h * w)
        known = ids.masked_fill(bad, 0)
        view = cells(out, patch, channels_last)
        rows = torch.arange(shape[0], device=ids.device)[:, None]
        values = grad.masked_fill(bad[..., None], 0).reshape(*ids.shape, *view.shape[4:])
        view.index_put_((rows, known // (h * w), known % (h * w) // w, known % w), values, accumulate=True)
    if mean_std is not None:
        out = out / mean_std[1].to(out.dtype).view(-1, *(1,) * (len(shape) - 2))
    return out.to(dtype).contiguous()


def embed_patches(images, ids, weight, bias, position, patch_size, channels_last, mean_std):
    patches = gather_patches(images, ids, patch_size, channels_last, mean_std, weight.dtype)
    out = F.linear(patches, weight, bias)
    if position is not None:
        out = out + (position if ids is None else reference.gather_tokens(position, ids))
    return out, patches


def embed_patches_backward(grad, patches, ids, weight, length, output_mask):
    """Gradients of the patches, weight, bias and position."""
    rows = grad.reshape(-1, grad.shape[-1])
    none = grad.new_empty(0)
    dpatches = (rows @ weight).view(patches.shape) if output_mask[0] else none
    dweight = rows.mT @ patches.view(-1, patches.shape[-1]) if output_mask[1] else none
    dposition = none
    if output_mask[3] and ids is None:
        dposition = grad.sum(0)
    elif output_mask[3]:
        table = torch.ops.sslkernels.gather_tokens_backward(rows.unsqueeze(0), ids.reshape(1, -1), length)
        dposition = table.squeeze(0)
    dbias = (dposition if output_mask[3] else rows).sum(0) if output_mask[2] else none
    return dpatches, dweight, dbias, dposition


def gather_tokens(tokens, ids):
    check.ids("ids", ids, tokens.shape[1])
    return reference.gather_tokens(tokens, ids)


def gather_tokens_backward(grad, ids, length):
    check.ids("ids", ids, length)
    bad = outside(ids, length)
    out = torch.zeros(grad.shape[0], length, grad.shape[2], dtype=compute_dtype(grad), device=grad.device)
    rows = torch.arange(grad.shape[0], device=ids.device)[:, None]
    values = grad.to(out.dtype).masked_fill(bad[..., None], 0)
    return out.index_put_((rows, ids.masked_fill(bad, 0)), values, accumulate=True).to(grad.dtype)


def restore_tokens(visible, ids, mask_token, position, length, prefix):
    check.ids("ids", ids, length, distinct=True)
    return reference.restore_tokens(visible, ids, mask_token, position, length, num_prefix_tokens=prefix).contiguous()


def restore_tokens_backward(grad, ids, prefix, output_mask):
    batch, length = grad.shape[0], grad.shape[1] - prefix
    check.ids("ids", ids, length, distinct=True)
    bad = outside(ids, length)
    known = ids.masked_fill(bad, 0)
    wide = grad.to(compute_dtype(grad))
    visible, mask_token, position = grad.new_empty(0), wide.new_empty(0), wide.new_empty(0)
    rows = torch.arange(batch, device=ids.device)[:, None]
    if output_mask[0]:
        taken = grad[:, prefix:][rows, known].masked_fill(bad[..., None], 0)
        visible = torch.cat([grad[:, :prefix], taken], 1)
    if output_mask[1]:
        masked = torch.ones(batch, length, dtype=torch.bool, device=grad.device)
        masked[rows, known] = False
        mask_token = wide[:, prefix:].masked_fill(~masked[..., None], 0).sum((0, 1))
    if output_mask[2]:
        position = wide.sum(0)
    return visible, mask_token, position


def _targets(pred, images, ids, patch_size, normalize, eps, channels_last, mean_std):
    """Error of each selected row, which rows are bad, and where they are in pred."""
    patch = tuple(patch_size)
    length = _length(images, patch)
    check.ids("ids", ids, length, distinct=True)
    dtype = compute_dtype(pred, images)
    mean, std = (None, None) if mean_std is None else mean_std
    target = reference.take_patches(reference.values(images, mean, std, dtype), ids, patch, channels_last)
    mode = (None, "patch", "channel")[normalize]
    target = reference.normalize_targets(target, images.shape[1], mode, eps, channels_last)
    selected = pred if pred.shape[1] == ids.shape[1] else reference.gather_tokens(pred, ids)
    return selected.to(dtype) - target, repeated(ids, length)


def _scatter(rows, pred, ids):
    """Gradients of the selected rows, as gradients of pred."""
    if pred.shape[1] == ids.shape[1]:
        return rows
    bad = outside(ids, pred.shape[1])
    out = torch.zeros(pred.shape, dtype=rows.dtype, device=rows.device)
    index = torch.arange(pred.shape[0], device=ids.device)[:, None]
    values = rows.masked_fill(bad[..., None], 0)
    return out.index_put_((index, ids.masked_fill(bad, 0)), values, accumulate=True)


def masked_patch_loss(pred, images, ids, patch_size, normalize, eps, l1, channels_last, mean_std, reduction, want_grad):
    error, bad = _targets(pred, images, ids, patch_size, normalize, eps, channels_last, mean_std)
    row = spoil((error.abs() if l1 else error * error).mean(-1), bad)
    if reduction == 0:
        return row, row.new_empty(0)
    weight = 1 / (row.numel() if reduction == 1 else 1)
    slope = error.sign() if l1 else 2 * error
    grad = _scatter(spoil(slope * (weight / error.shape[-1]), bad), pred, ids) if want_grad else row.new_empty(0)
    return row.sum() * weight, grad


def masked_patch_loss_backward(grad, pred, images, ids, patch_size, normalize, eps, l1, channels_last, mean_std):
    error, bad = _targets(pred, images, ids, patch_size, normalize, eps, channels_last, mean_std)
    slope = error.sign() if l1 else 2 * error
    rows = spoil(slope * (grad / error.shape[-1])[..., None], bad)
    return _scatter(rows, pred, ids).to(pred.dtype)


def permute_patches(images, ids, patch_size, inverse):
    check.ids("ids", ids, _length(images, tuple(patch_size)), distinct=True)
    if inverse:
        bad = repeated(ids, ids.shape[1]).any(1, keepdim=True)
        ids = ids.argsort(1).masked_fill(bad, -1)
    return reference.permute_patches(images, ids, tuple(patch_size)).contiguous()
