# SPDX-License-Identifier: Apache-2.0
"""Schemas, fake kernels and autograd formulas of the patch ops; `patches.py` has what people call.

Here ids are (B, K) always, tokens (B, L, D), patch sizes (t, p, q); `mean_std` (2, C) holds both rows. `output_mask`
says which gradients anyone needs; the others come back as empty tensors.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch

from sslkernels.ops._emitted import emitted_gradients, save_emitted
from sslkernels.ops._registry import define, differentiable, once_differentiable
from sslkernels.reference import _patches as reference
from sslkernels.reference._precision import compute_dtype
from sslkernels.reference.patches import grid_of

NONE, MEAN, SUM = range(3)

# gather_patches


def _gather_patches_fake(images, ids, patch_size, channels_last, mean_std, dtype):
    t, h, w = grid_of(images, patch_size)
    count = t * h * w if ids is None else ids.shape[1]
    values = images.shape[1] * patch_size[0] * patch_size[1] * patch_size[2]
    return images.new_empty((images.shape[0], count, values), dtype=dtype)


gather_patches = define(
    "gather_patches(Tensor images, Tensor? ids, int[] patch_size, bool channels_last, Tensor? mean_std,"
    " ScalarType dtype) -> Tensor",
    reference=reference.gather_patches,
    fake=_gather_patches_fake,
)
gather_patches_backward = define(
    "gather_patches_backward(Tensor grad, Tensor? ids, SymInt[] shape, int[] patch_size, bool channels_last,"
    " Tensor? mean_std, ScalarType dtype) -> Tensor",
    reference=reference.gather_patches_backward,
    fake=lambda grad, ids, shape, *rest: grad.new_empty(shape, dtype=rest[-1]),
)


def _gather_patches_setup(ctx, inputs, output) -> None:
    images, ids, ctx.patch_size, ctx.channels_last, mean_std, _ = inputs
    ctx.shape, ctx.dtype = images.shape, images.dtype
    ctx.save_for_backward(ids, mean_std)


def _gather_patches_autograd(ctx, grad):
    if grad is None:
        return (None,) * 6
    ids, mean_std = ctx.saved_tensors
    images = gather_patches_backward(grad, ids, ctx.shape, ctx.patch_size, ctx.channels_last, mean_std, ctx.dtype)
    return images, *(None,) * 5


differentiable(gather_patches, setup_context=_gather_patches_setup, backward=_gather_patches_autograd)
once_differentiable(gather_patches_backward)

# embed_patches: the patches are kept for the gradient of the weight


def _embed_patches_fake(images, ids, weight, bias, position, patch_size, channels_last, mean_std):
    patches = _gather_patches_fake(images, ids, patch_size, channels_last, mean_std, weight.dtype)
    return images.new_empty((*patches.shape[:2], weight.shape[0]), dtype=weight.dtype), patches


def _embed_patches_backward_fake(grad, patches, ids, weight, length, output_mask):
    dim = weight.shape[0]
    shapes = (patches.shape, weight.shape, (dim,), (length, dim))
    return tuple(grad.new_empty(tuple(shape) if wanted else (0,)) for shape, wanted in zip(shapes, output_mask))


embed_patches = define(
    "embed_patches(Tensor images, Tensor? ids, Tensor weight, Tensor? bias, Tensor? position, int[] patch_size,"
    " bool channels_last, Tensor? mean_std) -> (Tensor out, Tensor patches)",
    reference=reference.embed_patches,
    fake=_embed_patches_fake,
)
embed_patches_backward = define(
    "embed_patches_backward(Tensor grad, Tensor patches, Tensor? ids, Tensor weight, SymInt length,"
    " bool[4] output_mask) -> (Tensor dpatches, Tensor dweight, Tensor dbias, Tensor dposition)",
    reference=reference.embed_patches_backward,
    fake=_embed_patches_backward_fake,
    everywhere=True,  # two products and two sums
)


def _embed_patches_setup(ctx, inputs, output) -> None:
    images, ids, weight, _, position, ctx.patch_size, ctx.channels_last, mean_std = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.shape, ctx.dtype, ctx.length = images.shape, images.dtype, 0 if position is None else position.shape[0]
    ctx.save_for_backward(output[1], ids, weight, mean_std)


def _embed_patches_autograd(ctx, grad, unused):
    if grad is None:
        return (None,) * 8
    patches, ids, weight, mean_std = ctx.saved_tensors
    mask = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4)]
    gradients = embed_patches_backward(grad, patches, ids, weight, ctx.length, mask)
    dpatches, *rest = (g if m else None for g, m in zip(gradients, mask))
    images = None
    if mask[0]:
        options = (ctx.shape, ctx.patch_size, ctx.channels_last, mean_std, ctx.dtype)
        images = gather_patches_backward(dpatches, ids, *options)
    return images, None, *rest, None, None, None


differentiable(embed_patches, setup_context=_embed_patches_setup, backward=_embed_patches_autograd)
once_differentiable(embed_patches_backward)

# gather_tokens

gather_tokens = define(
    "gather_tokens(Tensor tokens, Tensor ids) -> Tensor",
    reference=reference.gather_tokens,
    fake=lambda tokens, ids: tokens.new_empty((*ids.shape, tokens.shape[2])),
)
gather_tokens_backward = define(
    "gather_tokens_backward(Tensor grad, Tensor ids, SymInt length) -> Tensor",
    reference=reference.gather_tokens_backward,
    fake=lambda grad, ids, length: grad.new_empty((grad.shape[0], length, grad.shape[2])),
)


def _gather_tokens_setup(ctx, inputs, output) -> None:
    tokens, ids = inputs
    ctx.length = tokens.shape[1]
    ctx.save_for_backward(ids)


def _gather_tokens_autograd(ctx, grad):
    return None if grad is None else gather_tokens_backward(grad, *ctx.saved_tensors, ctx.length), None


differentiable(gather_tokens, setup_context=_gather_tokens_setup, backward=_gather_tokens_autograd)
once_differentiable(gather_tokens_backward)

# restore_tokens


def restored_dtype(visible, mask_token, position) -> torch.dtype:
    dtype = torch.promote_types(visible.dtype, mask_token.dtype)
    return dtype if position is None else torch.promote_types(dtype, position.dtype)


def _restore_tokens_fake(visible, ids, mask_token, position, length, prefix):
    shape = (visible.shape[0], length + prefix, visible.shape[2])
    return visible.new_empty(shape, dtype=restored_dtype(visible, mask_token, position))


def _restore_tokens_backward_fake(grad, ids, prefix, output_mask):
    batch, length, dim = grad.shape
    dtype = compute_dtype(grad)
    return (
        grad.new_empty((batch, ids.shape[1] + prefix, dim) if output_mask[0] else (0,)),
        grad.new_empty((dim,) if output_mask[1] else (0,), dtype=dtype),
        grad.new_empty((length, dim) if output_mask[2] else (0,), dtype=dtype),
    )


restore_tokens = define(
    "restore_tokens(Tensor visible, Tensor ids, Tensor mask_token, Tensor? position, SymInt length, int prefix)"
    " -> Tensor",
    reference=reference.restore_tokens,
    fake=_restore_tokens_fake,
)
restore_tokens_backward = define(
    "restore_tokens_backward(Tensor grad, Tensor ids, int prefix, bool[3] output_mask)"
    " -> (Tensor dvisible, Tensor dmask_token, Tensor dposition)",
    reference=reference.restore_tokens_backward,
    fake=_restore_tokens_backward_fake,
)


def _restore_tokens_setup(ctx, inputs, output) -> None:
    visible, ids, mask_token, position, _, ctx.prefix = inputs
    ctx.dtypes = [None if x is None else x.dtype for x in (visible, mask_token, position)]
    ctx.save_for_backward(ids)


def _restore_tokens_autograd(ctx, grad):
    if grad is None:
        return (None,) * 6
    mask = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
    gradients = restore_tokens_backward(grad, *ctx.saved_tensors, ctx.prefix, mask)
    visible, mask_token, position = (g.to(d) if m else None for g, d, m in zip(gradients, ctx.dtypes, mask))
    return visible, None, mask_token, position, None, None


differentiable(restore_tokens, setup_context=_restore_tokens_setup, backward=_restore_tokens_autograd)
once_differentiable(restore_tokens_backward)

# masked_patch_loss: where the weight of a row is known, the forward emits the gradient

_LOSS = (
    "Tensor pred, Tensor images, Tensor ids, int[] patch_size, int normalize, float eps, bool l1, bool channels_last,"
    " Tensor? mean_std"
)


def _masked_patch_loss_fake(pred, images, ids, *rest):
    dtype, reduction, want_grad = compute_dtype(pred, images), *rest[-2:]
    loss = pred.new_empty(ids.shape if reduction == NONE else (), dtype=dtype)
    return loss, pred.new_empty(pred.shape if want_grad else (0,), dtype=dtype)


masked_patch_loss = define(
    f"masked_patch_loss({_LOSS}, int reduction, bool want_grad) -> (Tensor loss, Tensor dpred)",
    reference=reference.masked_patch_loss,
    fake=_masked_patch_loss_fake,
)
masked_patch_loss_backward = define(
    f"masked_patch_loss_backward(Tensor grad, {_LOSS}) -> Tensor",
    reference=reference.masked_patch_loss_backward,
    fake=lambda grad, pred, *rest: pred.new_empty(pred.shape),
)


def _masked_patch_loss_setup(ctx, inputs, output) -> None:
    pred, images, ids, *options, mean_std, ctx.reduction, _ = inputs
    ctx.mark_non_differentiable(output[1])
    if ctx.reduction == NONE:
        ctx.options = options
        ctx.save_for_backward(pred, images, ids, mean_std)
    else:
        save_emitted(ctx, (pred,), (ctx.needs_input_grad[0],), output[1:])


def _masked_patch_loss_autograd(ctx, grad, unused):
    if ctx.reduction != NONE:
        return *emitted_gradients(ctx, grad), *(None,) * 10
    if grad is None:
        return (None,) * 11
    pred, images, ids, mean_std = ctx.saved_tensors
    dpred = masked_patch_loss_backward(grad, pred, images, ids, *ctx.options, mean_std)
    return dpred, *(None,) * 10


differentiable(masked_patch_loss, setup_context=_masked_patch_loss_setup, backward=_masked_patch_loss_autograd)
once_differentiable(masked_patch_loss_backward)

# permute_patches: its gradient is itself, the other way round

permute_patches = define(
    "permute_patches(Tensor images, Tensor ids, int[] patch_size, bool inverse) -> Tensor",
    reference=reference.permute_patches,
    fake=lambda images, *rest: images.new_empty(images.shape),
)


def _permute_patches_setup(ctx, inputs, output) -> None:
    _, ids, ctx.patch_size, ctx.inverse = inputs
    ctx.save_for_backward(ids)


def _permute_patches_autograd(ctx, grad):
    if grad is None:
        return (None,) * 4
    return permute_patches(grad, *ctx.saved_tensors, ctx.patch_size, not ctx.inverse), None, None, None


differentiable(permute_patches, setup_context=_permute_patches_setup, backward=_permute_patches_autograd)
