# SPDX-License-Identifier: Apache-2.0
"""Every method in a size for a desk: network, data and optimizer, in one table for the demo, `make methods` and tests.

All figures are for two CPU cores and seconds to minutes of training; the papers' sizes are the methods' own defaults.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from sslkernels import data, methods, speech, words
from sslkernels.methods._method import Method
from sslkernels.methods.hubert import ClusterLabels
from sslkernels.nn import (
    ConvFeatureEncoder,
    PatchTokenizer,
    ResidualCNN,
    SpeechGRU,
    SpeechTransformer,
    TextTransformer,
    VisionTransformer,
)

__all__ = ["PRESETS", "Preset"]


class Preset(NamedTuple):
    """`make(total_steps, process_group=None)` builds the method; momentum schedules end with the training.

    `data` names the loader, `batch` what a step takes: "views" are two views of each image, "crops" two global and six
    local ones, "captions" one view and a caption, "images" and "clips" one view, "pairs" of words, "tokens" and
    "waveforms" as they are. `standardize`: give the network items of mean 0 and deviation 1. `scores` names what
    `Training.accuracy` tells.
    """

    make: Callable[..., Method]
    data: str = "digits"
    batch: str = "views"
    lr: float = 2e-3
    batch_size: int = 128
    weight_decay: float = 0.01
    standardize: bool = False
    scores: str = "features"


def _cnn() -> ResidualCNN:
    return ResidualCNN(in_chans=1, channels=(16, 32))


def _text_encoder() -> nn.Module:
    return nn.EmbeddingBag(len(data.CAPTION_VOCABULARY), 32, padding_idx=0)


def _vit(**options: Any) -> VisionTransformer:
    return VisionTransformer(embed_dim=64, depth=3, **options)


def _digit_vit(weight_init: str) -> VisionTransformer:
    return VisionTransformer(
        in_chans=1, patch_size=2, embed_dim=64, depth=2, class_token=False, weight_init=weight_init
    )


def _clip_vit(patch_size: tuple[int, ...], weight_init: str = "normal") -> VisionTransformer:
    return VisionTransformer(patch_size=patch_size, embed_dim=64, depth=2, class_token=False, weight_init=weight_init)


# (channels, kernel, stride) of the convolutions over the waveform: frames of 10 and of 20 ms, as the originals'
_CPC_LAYERS = ((32, 20, 10), (64, 8, 4), (64, 4, 4))
_SPEECH_LAYERS = ((32, 20, 10), (64, 8, 8), (64, 4, 4))
UNITS = 25  # clusters that HuBERT names


def _speech_transformer() -> SpeechTransformer:
    encoder = ConvFeatureEncoder(_SPEECH_LAYERS)
    return SpeechTransformer(encoder, embed_dim=64, depth=2, num_heads=4, kernel=16, groups=4, weight_init="glorot")


@functools.cache
def _units() -> ClusterLabels:
    return ClusterLabels.fit(speech.speech().train_windows, UNITS)


@functools.cache
def _codebook() -> Tensor:
    """128 centroids of the patches of a sixth of the photographs' training crops."""
    return PatchTokenizer.fit(data.photographs().train_images[::6], 128, patch_size=4, iterations=10).centroids


def _beit(steps: int, **span: Any) -> Method:
    backbone = _vit(class_token=False, weight_init="glorot", mean=(0.45, 0.43, 0.40), std=(0.27, 0.26, 0.27))
    return methods.BEiT(
        backbone, PatchTokenizer(_codebook(), 4), num_codes=len(_codebook()), mask_options={"min_patches": 4}, **span
    )


def _bert(steps: int, **span: Any) -> Method:
    """One block over 14 short pieces of words, many of them hidden: a network of this size learns for some 500 steps
    how often a token occurs, and only then to look at its neighbours, the later the more there are of both. Whether one
    passage follows another it does not learn in a minute."""
    encoder = TextTransformer(256, max_length=16, embed_dim=64, depth=1, num_heads=8, weight_init="glorot")
    return methods.BERT(encoder, ratio=0.4, next_sentence=False, **span)


_DIGITS: dict[str, Any] = {"batch": "images", "standardize": True, "lr": 3e-3}
_CLIPS: dict[str, Any] = {"data": "clips", "batch": "clips", "standardize": True, "lr": 3e-3, "batch_size": 32}
_PHOTOGRAPHS: dict[str, Any] = {"data": "photographs", "batch": "images", "standardize": True}
_PHOTO_CROPS: dict[str, Any] = {**_PHOTOGRAPHS, "batch": "crops", "batch_size": 16}
# Half of the frames are hidden, in spans of 40 and 80 ms: in a minute so small a network learns nothing of the
# originals' 200 ms.
_SPEECH: dict[str, Any] = {
    "data": "conversation", "batch": "waveforms", "lr": 3e-3, "batch_size": 16, "scores": "speech"
}  # fmt: skip


def _head(bottleneck_dim: int, **options: Any) -> dict[str, Any]:
    """With batch norm: without it the rows of a small untrained network are so alike that a teacher soon centres all
    of it away."""
    return {"hidden_dim": 128, "bottleneck_dim": bottleneck_dim, "use_bn": True, **options}


def _teacher(steps: int) -> float:
    """Momentum of a JEPA's teacher, which averages an eighth of the training, 33 to 100 steps: with a faster one a long
    training collapses, with a slower one a short training does not begin."""
    return 1 - 1 / min(max(steps // 8, 33), 100)


PRESETS: dict[str, Preset] = {
    "simclr": Preset(lambda steps, **span: methods.SimCLR(_cnn(), dim=32, **span)),
    "moco": Preset(lambda steps, **span: methods.MoCo(_cnn(), dim=32, queue_size=512, momentum=0.99, **span)),
    "nnclr": Preset(
        lambda steps, **span: methods.NNCLR(_cnn(), dim=32, hidden_dim=64, predictor_dim=128, queue_size=512, **span),
        lr=4e-3,
    ),
    "clip": Preset(lambda steps, **span: methods.CLIP(_cnn(), _text_encoder(), dim=32, **span), batch="captions"),
    "siglip": Preset(
        lambda steps, **span: methods.SigLIP(_cnn(), _text_encoder(), dim=32, **span), batch="captions", lr=4e-3
    ),
    "byol": Preset(
        lambda steps, **span: methods.BYOL(_cnn(), dim=64, hidden_dim=256, momentum=0.99, total_steps=steps, **span),
        lr=4e-3,
    ),
    "simsiam": Preset(lambda steps, **span: methods.SimSiam(_cnn(), dim=64, predictor_dim=16, **span), lr=4e-3),
    "barlow_twins": Preset(lambda steps, **span: methods.BarlowTwins(_cnn(), dim=512, hidden_dim=256, **span), lr=4e-3),
    "vicreg": Preset(lambda steps, **span: methods.VICReg(_cnn(), dim=256, hidden_dim=256, **span), lr=4e-3),
    "swav": Preset(
        lambda steps, **span: methods.SwAV(
            _cnn(), dim=64, hidden_dim=256, prototypes=300, freeze_prototypes_steps=steps // 10, **span
        ),
        batch="crops",
        batch_size=64,
        lr=4e-3,
    ),
    "dino": Preset(
        lambda steps, **span: methods.DINO(
            _cnn(),
            out_dim=256,
            head_options=_head(64),
            teacher_temp=0.02,
            warmup_teacher_temp=0.02,
            momentum=0.95,
            total_steps=steps,
            **span,
        ),
        batch="crops",
        batch_size=64,
    ),
    "ibot": Preset(
        lambda steps, **span: methods.IBOT(
            _vit(weight_init="glorot"),
            out_dim=256,
            head_options=_head(32),
            patch_temp=0.04,
            momentum=0.95,
            total_steps=steps,
            center_mode="sinkhorn_knopp",  # moving centers learn less in as many steps
            **span,
        ),
        **_PHOTO_CROPS,
    ),
    "dinov2": Preset(
        lambda steps, **span: methods.DINOv2(
            _vit(weight_init="glorot"),
            out_dim=256,
            head_options=_head(32, norm_last_layer=True),
            teacher_temp=0.04,
            momentum=0.95,
            total_steps=steps,
            centering="sinkhorn_knopp",
            **span,
        ),
        **_PHOTO_CROPS,
    ),
    "mae": Preset(
        lambda steps, **span: methods.MAE(
            _digit_vit("glorot"), decoder_dim=32, decoder_depth=1, decoder_heads=4, **span
        ),
        **_DIGITS,
    ),
    "simmim": Preset(lambda steps, **span: methods.SimMIM(_digit_vit("normal"), mask_patch_size=2, **span), **_DIGITS),
    "videomae": Preset(
        lambda steps, **span: methods.VideoMAE(
            _clip_vit((4, 8, 8), "glorot"),
            mask_ratio=0.5,
            norm_pix_loss=False,
            decoder_dim=32,
            decoder_depth=1,
            decoder_heads=4,
            **span,
        ),
        **_CLIPS,
    ),
    "vjepa": Preset(
        lambda steps, **span: methods.VJEPA(
            _clip_vit((4, 4, 4)),
            predictor_dim=32,
            predictor_depth=2,
            predictor_heads=4,
            momentum=_teacher(steps),
            final_momentum=1.0,
            total_steps=steps,
            **span,
        ),
        **{**_CLIPS, "lr": 1e-3, "batch_size": 16},
    ),
    "ijepa": Preset(
        lambda steps, **span: methods.IJEPA(
            _vit(class_token=False),
            predictor_dim=32,
            predictor_depth=2,
            predictor_heads=4,
            momentum=_teacher(steps),
            total_steps=steps,
            **span,
        ),
        **_PHOTOGRAPHS,
        batch_size=32,
        lr=1e-3,
    ),
    "data2vec": Preset(
        lambda steps, **span: methods.Data2Vec(
            _vit(), decoder_depth=2, masks=2, momentum=0.999, final_momentum=0.9999, anneal_steps=steps, **span
        ),
        **_PHOTOGRAPHS,
        batch_size=32,
    ),
    "word2vec": Preset(
        lambda steps, **span: methods.Word2Vec(words.word_pairs().vocabulary.counts, dim=64, **span),
        data="words",
        batch="pairs",
        batch_size=2048,
        lr=2e-2,
        scores="contexts",
    ),
    "cpc": Preset(
        lambda steps, **span: methods.CPC(SpeechGRU(ConvFeatureEncoder(_CPC_LAYERS, norm="layer"), dim=64), **span),
        **{**_SPEECH, "batch_size": 8},
    ),
    "wav2vec2": Preset(
        lambda steps, **span: methods.Wav2Vec2(
            _speech_transformer(),
            dim=64,
            num_vars=16,  # two frames of one code are no distractors: few codes make an easier start
            quantizer_temp=(2.0, 0.5, 0.25 ** (1 / steps)),
            penalty_weight=0.1,
            mask_ratio=0.5,
            mask_length=2,
            **span,
        ),
        **_SPEECH,
    ),
    "hubert": Preset(
        lambda steps, **span: methods.HuBERT(
            _speech_transformer(), copy.deepcopy(_units()), UNITS, dim=32, mask_ratio=0.5, mask_length=4, **span
        ),
        **_SPEECH,
    ),
    "beit": Preset(_beit, data="photographs", batch="images", batch_size=32, lr=4e-3),
    "bert": Preset(_bert, data="news", batch="tokens", batch_size=96, lr=6e-3, scores="masked"),
}
