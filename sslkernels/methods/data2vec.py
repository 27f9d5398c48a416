# SPDX-License-Identifier: Apache-2.0
"""data2vec 2.0: many masks of one image, all predicting what one pass of a teacher made of the whole of it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from sslkernels.ema import EMA
from sslkernels.evaluation import std_of_rows
from sslkernels.methods._method import Method
from sslkernels.nn import ConvolutionalDecoder, VisionTransformer
from sslkernels.ops import average_layers, gather_tokens, inverse_block_mask, masked_regression


class Data2Vec(Method):
    """Baevski et al. 2022, for images. batch = images (B, C, H, W).

        y              = layer_norm(mean over the last `layers` blocks of instance_norm(MLP output))    (B, L, D)
        visible, hidden = inverse_block_mask(B * masks, grid)         `masks` masks of each image, one teacher pass
        x              = backbone(patches of visible)
        p              = decoder(x at visible, noise N(0, 0.01^2) elsewhere)[hidden]
        loss           = mean over hidden patches of sum_D (p - y[hidden])^2 / sqrt(D)
                         + cls_weight * sum over all masks of sum_D (class token - mean_L y)^2 / sqrt(D)
        teacher       <- m * teacher + (1 - m) * backbone             in `after_step`, in float32; buffers copied

    The second term is a sum over the B * masks class tokens, not a mean, as in the original. The teacher sees the whole
    image, is always in evaluation mode, and its MLP outputs are taken before the residual, instance norm being over
    the patches of one image. m goes from `momentum` to `final_momentum` in equal steps over `anneal_steps`. Features
    are the mean of the backbone's patch tokens. The original's blocks are post-norm, these are the backbone's.

    Args:
        backbone: a transformer with `forward_features(images, ids, return_layers=K)` and `grid(images)`.
        decoder_depth, decoder_groups: of the `ConvolutionalDecoder`.
        layers: by default all but the first two, as the original (10 of 12).
        beta: smooth L1 that turns linear there; 0, the default, is the square above, not halved.
        ratio, block_size, adjust: of `inverse_block_mask`.

    Source: facebookresearch/fairseq `examples/data2vec/models/data2vec2.py`, `modalities/{base,images,modules}.py`,
    `config/v2/base_images_only_task.yaml`.

    Example:
        >>> method = Data2Vec(VisionTransformer(), masks=2, anneal_steps=1000)
        >>> loss, metrics = method(torch.rand(4, 3, 32, 32))
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        *,
        decoder_depth: int = 6,
        decoder_groups: int = 16,
        masks: int = 16,
        layers: int | None = None,
        ratio: float = 0.8,
        block_size: int = 3,
        adjust: float = 0.07,
        noise: float = 0.01,
        beta: float = 0.0,
        cls_weight: float = 0.01,
        momentum: float = 0.9998,
        final_momentum: float = 0.99999,
        anneal_steps: int = 100_000,
        process_group: Any = None,
    ) -> None:
        super().__init__(process_group)
        if cls_weight and backbone.num_prefix_tokens != 1:
            raise ValueError(f"the backbone must have a class token for cls_weight={cls_weight}; without one give 0")
        self.backbone = backbone
        self.decoder = ConvolutionalDecoder(backbone.dim, depth=decoder_depth, groups=decoder_groups)
        self.masks, self.noise, self.beta, self.cls_weight = masks, noise, beta, cls_weight
        self.layers = max(1, len(backbone.blocks) - 2) if layers is None else layers
        self.mask_options = {"ratio": ratio, "block_size": block_size, "adjust": adjust}
        # float32 at the least: 1 - 0.99999 is lost in 16 bits
        self.dtype = torch.promote_types(next(backbone.parameters()).dtype, torch.float32)
        self.teacher = EMA(
            backbone,
            momentum,
            schedule="linear",
            final_momentum=final_momentum,
            total_steps=anneal_steps,
            dtype=self.dtype,
        ).eval()

    def train(self, mode: bool = True) -> Data2Vec:
        """The teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """What is predicted (B, L, D), of the whole images."""
        images = images.to(self.dtype) if images.is_floating_point() else images
        teacher = cast(VisionTransformer, self.teacher.module)
        _, layers = teacher.forward_features(images, return_layers=self.layers)
        prefix = self.backbone.num_prefix_tokens
        return average_layers([layer[:, prefix:] for layer in layers], instance_norm=True, layer_norm=True)

    def predict(self, images: Tensor, visible: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """From the patches visible (B, M, K): the hidden ones (B, M, L - K, D), and the prefix tokens (B, M, P, D)."""
        prefix = self.backbone.num_prefix_tokens
        tokens = self.backbone.forward_features(images, visible)  # (B M, P + K, D)
        noise = self.draw_noise(images, tokens.new_empty(*hidden.shape, tokens.shape[-1])).flatten(0, 1)
        hidden = hidden.flatten(0, 1)
        place = torch.cat([visible.flatten(0, 1), hidden], dim=1).argsort(dim=1)  # of each patch in the next line
        x = gather_tokens(torch.cat([tokens[:, prefix:], noise], dim=1), place)
        x = self.decoder(x, self.backbone.grid(images), hidden)
        shape = visible.shape[:2]
        return x.unflatten(0, shape), tokens[:, :prefix].unflatten(0, shape)

    def draw_noise(self, images: Tensor, noise: Tensor) -> Tensor:
        """Fills noise (B, M, L - K, D), from a seed an image: ranks share the seeds, and draw their own rows alone."""
        seeds = self.draw(images, lambda rows: torch.randint(2**63 - 1, (rows,)))
        generator = torch.Generator(noise.device)
        for image, seed in zip(noise, seeds.tolist()):
            image.normal_(std=self.noise, generator=generator.manual_seed(seed))
        return noise

    def distance(self, x: Tensor, y: Tensor, ids: Tensor, *, weight: float = 1.0, reduction: str = "mean") -> Tensor:
        """Rows of x to rows ids of y: a row is the sum over D, over sqrt(D)."""
        scale = weight * x.shape[-1] ** 0.5  # the op's rows are means over D
        loss = "smooth_l1" if self.beta else "l2"
        return masked_regression(x, y, ids, loss=loss, beta=self.beta, scale=scale, reduction=reduction)

    def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.targets(batch)
        grid, options = self.backbone.grid(batch), {"device": batch.device, **self.mask_options}

        def draw(rows: int) -> list[Tensor]:
            ids = inverse_block_mask(rows * self.masks, grid, **options)  # type: ignore[arg-type]
            return [x.unflatten(0, (rows, self.masks)) for x in ids]

        visible, hidden = self.draw(batch, draw)
        prediction, prefix = self.predict(batch, visible, hidden)
        whole = self.whole(batch)
        loss = whole.weigh(self.distance(prediction, y, hidden))
        metrics = {"target_std": _std(y), "prediction_std": _std(prediction)}
        if self.cls_weight:
            mean, first = y.mean(dim=1, keepdim=True), hidden.new_zeros(hidden.shape[:2])
            summed = self.distance(prefix[:, :, 0], mean, first, weight=self.cls_weight, reduction="sum")
            loss = loss + whole.world * summed
        return loss, {"loss": loss.detach(), **metrics}

    def after_step(self, step: int) -> None:
        """Move the teacher towards the backbone; the original counts updates from 1."""
        self.teacher.update(self.backbone, step + 1)

    def encode(self, x: Tensor) -> Tensor:
        return self.backbone.forward_features(x)[:, self.backbone.num_prefix_tokens :].mean(dim=1)


@torch.no_grad()
def _std(rows: Tensor) -> Tensor:
    """The original's watch for collapse: the mean over D of the standard deviation over all rows."""
    return std_of_rows(rows.float().flatten(0, -2)).mean()
