# SPDX-License-Identifier: Apache-2.0
"""The patch cases: a masked autoencoder around its transformers, patch 16, a quarter of the patches visible."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.case import COTANGENT, Case, Inputs, faster, within
from benchmarks.contenders import patches as contenders
from benchmarks.floors import Copy, Gemms
from benchmarks.formulas import patches as formulas

PATCH = 16
VALUES = 3 * PATCH**2  # of a patch
TUBELET = (2, PATCH, PATCH)
FRAMES = 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
FLOAT = 4  # bytes


def patches_of(pixels: int) -> int:
    return (pixels // PATCH) ** 2


def kept(length: int) -> int:
    return length // 4


def choose(generator: torch.Generator, B: int, length: int, count: int) -> Tensor:
    """`count` of `length` numbers for each sample, ascending."""
    return torch.rand(B, length, generator=generator).argsort(1)[:, :count].sort(1).values


def gather_inputs(generator: torch.Generator, B: int, pixels: int) -> Inputs:
    length = patches_of(pixels)
    images = torch.randn(B, 3, pixels, pixels, generator=generator)
    return {"images": images, "ids": choose(generator, B, length, kept(length)), "patch_size": PATCH}


def channels_last_inputs(generator: torch.Generator, B: int, pixels: int) -> Inputs:
    inputs = gather_inputs(generator, B, pixels)
    return {**inputs, "images": inputs["images"].contiguous(memory_format=torch.channels_last)}


def uint8_inputs(generator: torch.Generator, B: int, pixels: int) -> Inputs:
    """Height, width, channel in memory, as decoders write images."""
    decoded = torch.randint(256, (B, pixels, pixels, 3), generator=generator, dtype=torch.uint8)
    ids = choose(generator, B, patches_of(pixels), kept(patches_of(pixels)))
    images = decoded.permute(0, 3, 1, 2)
    return {
        "images": images, "ids": ids, "patch_size": PATCH, "mean": torch.tensor(MEAN), "std": torch.tensor(STD)
    }  # fmt: skip


def gather_bytes(B: int, pixels: int, pixel: int = FLOAT) -> dict[str, int]:
    values = B * kept(patches_of(pixels)) * VALUES
    return {"read pixels": pixel * values, "write patches": FLOAT * values}


def embed_inputs(generator: torch.Generator, B: int, pixels: int, D: int) -> Inputs:
    """The position table is fixed, as MAE's is."""
    inputs = gather_inputs(generator, B, pixels)
    weight = torch.randn(D, 3, PATCH, PATCH, generator=generator) / VALUES**0.5
    return {
        "images": inputs["images"], "ids": inputs["ids"],
        "weight": weight.requires_grad_(),
        "bias": torch.randn(D, generator=generator).requires_grad_(),
        "position": torch.randn(patches_of(pixels), D, generator=generator),
        COTANGENT: torch.randn(B, kept(patches_of(pixels)), D, generator=generator),
    }  # fmt: skip


def products(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The visible patches by the weight; the weight's gradient is as large a product."""
    patches = contenders.lean_gather(inputs["images"], inputs["ids"], PATCH)
    return patches.flatten(0, 1), inputs["weight"].detach().flatten(1)


def loss_inputs(generator: torch.Generator, B: int, pixels: int) -> Inputs:
    """A row of pred for every patch, as MAE's decoder has it."""
    length = patches_of(pixels)
    return {
        "pred": torch.randn(B, length, VALUES, generator=generator).requires_grad_(),
        "images": torch.randn(B, 3, pixels, pixels, generator=generator),
        "ids": choose(generator, B, length, length - kept(length)),
        "patch_size": PATCH,
    }


def loss_bytes(B: int, pixels: int) -> dict[str, int]:
    """The gradient is zero at visible patches, and is written there too."""
    length = patches_of(pixels)
    masked = FLOAT * B * (length - kept(length)) * VALUES
    return {"read pred": masked, "read pixels": masked, "write gradient": FLOAT * B * length * VALUES}


def tube_inputs(generator: torch.Generator, B: int, pixels: int) -> Inputs:
    """VideoMAE: nine tenths of the places masked in every frame, a row of pred for each masked patch."""
    places, depth = patches_of(pixels), FRAMES // TUBELET[0]
    masked = int(0.9 * places)
    frame = choose(generator, B, places, masked)
    ids = (frame[:, None] + places * torch.arange(depth)[:, None]).flatten(1)
    return {
        "pred": torch.randn(B, depth * masked, TUBELET[0] * VALUES, generator=generator).requires_grad_(),
        "clips": torch.randn(B, 3, FRAMES, pixels, pixels, generator=generator),
        "ids": ids, "tubelet": TUBELET, "mean": torch.tensor(MEAN), "std": torch.tensor(STD),
    }  # fmt: skip


def tube_bytes(B: int, pixels: int) -> dict[str, int]:
    masked = FLOAT * B * FRAMES // TUBELET[0] * int(0.9 * patches_of(pixels)) * TUBELET[0] * VALUES
    return {"read pred": masked, "read pixels": masked, "write gradient": masked}


def restore_inputs(generator: torch.Generator, B: int, L: int, D: int) -> Inputs:
    """One class token before the visible ones; the position table is fixed."""
    return {
        "visible": torch.randn(B, 1 + kept(L), D, generator=generator).requires_grad_(),
        "ids": choose(generator, B, L, kept(L)),
        "mask_token": torch.randn(1, 1, D, generator=generator).requires_grad_(),
        "position": torch.randn(1 + L, D, generator=generator),
        COTANGENT: torch.randn(B, 1 + L, D, generator=generator),
    }


def restore_bytes(B: int, L: int, D: int) -> dict[str, int]:
    some, every = FLOAT * B * (1 + kept(L)) * D, FLOAT * B * (1 + L) * D
    return {"read visible": some, "write tokens": every, "read their gradient": every, "write visible's": some}


IMAGES = {"B": 64, "pixels": 224}
CASES = (
    Case(
        "embed_patches", "embed_patches", {**IMAGES, "D": 768}, embed_inputs, contenders.EMBED,
        eager=("mae", "lightly"), fresh=True, formula=formulas.embed, floor=Gemms(products, 2),
        goals=(faster("eager", 5.5), faster("lean", 1.15)),
    ),
    Case(
        "gather_patches", "gather_patches", IMAGES, gather_inputs, contenders.GATHER,
        eager=("lightly",), fresh=True, formula=formulas.gather_patches, floor=Copy(gather_bytes),
        goals=(within("copy", 1.5),),
    ),
    Case(
        "gather_patches-cached", "gather_patches", IMAGES, gather_inputs, contenders.GATHER,
        eager=("lightly",), formula=formulas.gather_patches, floor=Copy(gather_bytes), variant="the same images again",
    ),
    Case(
        "gather_patches-channels_last", "gather_patches", IMAGES, channels_last_inputs, contenders.GATHER,
        eager=("lightly",), fresh=True, formula=formulas.gather_patches, floor=Copy(gather_bytes),
        goals=(within("copy", 1.5),),
        variant="channels_last",
    ),
    Case(
        "gather_patches-uint8", "gather_patches", IMAGES, uint8_inputs, contenders.GATHER_UINT8,
        eager=("lightly",), fresh=True, formula=formulas.gather_uint8,
        floor=Copy(lambda B, pixels: gather_bytes(B, pixels, 1)),
        variant="uint8, channels_last, normalised",
    ),
    Case(
        "masked_patch_loss", "masked_patch_loss", IMAGES, loss_inputs, contenders.LOSS,
        eager=("mae", "transformers"), fresh=True, formula=formulas.masked_patch_loss, floor=Copy(loss_bytes),
        goals=(
            faster("eager", 8.0), faster("mae+compile", 5.0), faster("lean", 5.0), faster("lean+compile", 5.0),
            within("copy", 2.0),
        ),
    ),
    Case(
        "masked_patch_loss-video", "masked_patch_loss", {"B": 4, "pixels": 224}, tube_inputs, contenders.TUBE_LOSS,
        eager=("videomae",), fresh=True, formula=formulas.masked_tube_loss, floor=Copy(tube_bytes),
        variant="16 frames, by channel",
    ),
    Case(
        "restore_tokens", "restore_tokens", {"B": 64, "L": 196, "D": 512}, restore_inputs, contenders.RESTORE,
        eager=("mae", "lightly"), fresh=True, formula=formulas.restore_tokens, floor=Copy(restore_bytes),
        goals=(faster("eager", 2.0),),
    ),
)  # fmt: skip
