# SPDX-License-Identifier: Apache-2.0
"""`--peers`: the real packages, where they import, against our restatements of them: same value, gradients, cost?"""

from __future__ import annotations

import importlib
import importlib.util
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.case import Case, Contender, ContenderStep, Inputs, tensors
from benchmarks.contenders import (
    contrastive,
    correlation,
    distillation,
    distillation_codes,
    ema,
    masks,
    masks_sequence,
    neighbors,
    patches,
)
from benchmarks.stats import summary
from benchmarks.worker import interleave, relative_error, worst

LARGEST = 1024  # rows; enough to see a difference in cost
AGREE = 1e-5


@dataclass(frozen=True)
class Peer:
    module: str
    call: Callable[[Any, Inputs], Any]


@dataclass(frozen=True)
class Parameters:
    """What lightly's update asks of a model."""

    values: list[Tensor]

    def parameters(self) -> list[Tensor]:
        return self.values


@dataclass(frozen=True)
class Tokenizer:
    """What the collator of transformers asks of a tokenizer."""

    mask_id: int
    vocabulary: int
    mask_token: str = "[MASK]"

    def __len__(self) -> int:
        return self.vocabulary

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.mask_id


def lightly_restore(m: ModuleType, i: Inputs) -> Tensor:
    tokens = m.repeat_token(i["mask_token"], (len(i["visible"]), len(i["position"])))
    keep = torch.nn.functional.pad(i["ids"] + 1, (1, 0))
    return m.set_at_index(tokens, keep, i["visible"]) + i["position"]


def lightly_momentum(m: ModuleType, i: Inputs) -> list[Tensor]:
    m.update_momentum(Parameters(i["sources"]), Parameters(i["targets"]), i["momentum"])
    return i["targets"]


def timm_average(m: ModuleType, i: Inputs) -> list[Tensor]:
    m._lerp_stochastic_round_bf16_(i["targets"], i["sources"], 1.0 - i["momentum"])
    return i["targets"]


def collated_tokens(m: ModuleType, i: Inputs) -> tuple[Tensor, Tensor]:
    collator = m.DataCollatorForLanguageModeling(
        tokenizer=Tokenizer(i["mask_token"], i["vocabulary"]), mlm_probability=i["ratio"]
    )
    return collator.torch_mask_tokens(i["tokens"].clone(), special_tokens_mask=i["special"])


def lightly_tico(m: ModuleType, i: Inputs) -> tuple[Tensor, Tensor]:
    loss = m.TiCoLoss(beta=i["beta"], rho=i["rho"])
    loss.C = i["covariance"]
    return loss(i["z_a"], i["z_b"]), loss.C


def lightly_dino(m: ModuleType, i: Inputs) -> tuple[Tensor, Tensor]:
    loss = m.DINOLoss(len(i["center"]), teacher_temp=i["tau_t"], student_temp=i["tau_s"], center_momentum=i["momentum"])
    loss.center.copy_(i["center"])
    return loss(list(i["teacher"].chunk(2)), list(i["student"].chunk(i["crops"]))), loss.center[0, 0]


def lightly_ibot(m: ModuleType, i: Inputs) -> tuple[Tensor, Tensor]:
    loss = m.IBOTPatchLoss(
        len(i["center"]), teacher_temp=i["tau_t"], student_temp=i["tau_s"], center_momentum=i["momentum"]
    )
    loss.center.center.copy_(i["center"])
    return loss(i["teacher"], i["student"], i["mask"]), loss.center.value[0]


def lightly_swav(m: ModuleType, i: Inputs) -> Tensor:
    views = i["scores"].chunk(i["crops"])
    return m.SwaVLoss(i["tau"], i["iterations"], i["epsilon"])(list(views[:2]), list(views[2:]))[0]


PEERS: dict[Callable[..., Tensor], Peer] = {
    contrastive.lightly_nt_xent: Peer(
        "lightly.loss", lambda m, i: m.NTXentLoss(temperature=i["temperature"])(i["out0"], i["out1"])
    ),
    contrastive.info_nce_in_batch: Peer(
        "info_nce", lambda m, i: m.info_nce(i["query"], i["key"], temperature=i["temperature"])
    ),
    contrastive.info_nce_queue: Peer(
        "info_nce", lambda m, i: m.info_nce(i["query"], i["key"], i["queue"], temperature=i["temperature"])
    ),
    contrastive.open_clip_clip: Peer(
        "open_clip.loss", lambda m, i: m.ClipLoss()(i["image"], i["text"], i["logit_scale"])
    ),
    contrastive.open_clip_siglip: Peer(
        "open_clip.loss", lambda m, i: m.SigLipLoss()(i["image"], i["text"], i["logit_scale"], i["logit_bias"])
    ),
    contrastive.open_clip_siglip_chunked: Peer(
        "open_clip.loss",
        lambda m, i: m.SigLipLoss(chunk_size=1024)(i["image"], i["text"], i["logit_scale"], i["logit_bias"]),
    ),
    contrastive.metric_learning_supcon: Peer(
        "pytorch_metric_learning.losses",
        lambda m, i: m.SupConLoss(temperature=i["temperature"])(i["features"], i["labels"]),
    ),
    correlation.lightly_barlow: Peer(
        "lightly.loss.barlow_twins_loss", lambda m, i: m.BarlowTwinsLoss(i["lambda_param"])(i["z_a"], i["z_b"])
    ),
    correlation.lightly_vicreg: Peer("lightly.loss.vicreg_loss", lambda m, i: m.VICRegLoss()(i["z_a"], i["z_b"])),
    correlation.lightly_tico: Peer("lightly.loss.tico_loss", lightly_tico),
    correlation.lightly_frossl: Peer("lightly.loss.frossl_loss", lambda m, i: m.FroSSLLoss()([i["z_a"], i["z_b"]])),
    distillation.lightly_dino: Peer("lightly.loss.dino_loss", lightly_dino),
    distillation.lightly_patches: Peer("lightly.loss.ibot_loss", lightly_ibot),
    distillation_codes.lightly_swav: Peer("lightly.loss.swav_loss", lightly_swav),
    distillation_codes.lightly_sinkhorn: Peer(
        "lightly.loss.swav_loss", lambda m, i: m.sinkhorn(i["scores"], i["iterations"], i["epsilon"])
    ),
    patches.lightly_gather: Peer(
        "lightly.models.utils",
        lambda m, i: patches.channels_first(m.get_at_index(m.patchify(i["images"], i["patch_size"]), i["ids"])),
    ),
    patches.lightly_restore: Peer("lightly.models.utils", lightly_restore),
    masks.lightly_random: Peer(
        "lightly.models.utils",
        lambda m, i: m.random_token_mask((i["B"], i["L"]), mask_ratio=0.75, mask_class_token=True),
    ),
    masks_sequence.transformers_spans: Peer(
        "transformers.models.wav2vec2.modeling_wav2vec2",
        lambda m, i: torch.from_numpy(m._compute_mask_indices((i["B"], i["T"]), i["ratio"], i["span"])),
    ),
    masks_sequence.transformers_tokens: Peer("transformers.data.data_collator", collated_tokens),
    neighbors.lightly_koleo: Peer("lightly.loss.koleo_loss", lambda m, i: m.KoLeoLoss(eps=i["eps"])(i["x"])),
    ema.lightly: Peer("lightly.models.utils", lightly_momentum),
    ema.timm: Peer("timm.utils.model_ema", timm_average),
}  # fmt: skip


def load(name: str) -> ModuleType:
    """Import a module; where its package does not import, the module's own file, if that is enough."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package, _, rest = name.partition(".")
        spec = importlib.util.find_spec(package)
        if not rest or spec is None or not spec.submodule_search_locations:
            raise
        file = Path(spec.submodule_search_locations[0], *rest.split(".")).with_suffix(".py")
        alone = importlib.util.spec_from_file_location(f"_peer_{package}_{rest}", file) if file.exists() else None
        if alone is None or alone.loader is None:
            raise error
        module = importlib.util.module_from_spec(alone)
        alone.loader.exec_module(module)
        return module


def run(case: Case, contender: Contender) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Result and gradients; every generator starts anew, so that whoever draws alike returns the same masks."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    step = ContenderStep(contender, case.make_inputs(), case.changes, attached=True)
    output = step.forward()
    return [x.detach() for x in tensors(contender.result(output))], step.backward(output)


def difference(case: Case, restated: Contender, peer: Peer, module: ModuleType) -> tuple[float, float, float]:
    """Largest relative difference in values and in gradients, and the restatement's time over the real one's."""
    real = Contender("real", lambda **inputs: peer.call(module, inputs), "")
    (values, gradients), (real_values, real_gradients) = run(case, restated), run(case, real)
    both = replace(case, contenders=(restated, real))
    inputs = case.make_inputs()
    times = interleave({c.name: both.step(c.name, inputs) for c in both.contenders}, 7, 0.02)
    first, second = (times[c.name] for c in both.contenders)
    ratio = summary([
        (f + b) / (g + c)
        for f, b, g, c in zip(first["forward"], first["backward"], second["forward"], second["backward"], strict=True)
    ]).median  # fmt: skip
    value_error, gradient_error = (
        worst(relative_error(a, b.double()) for a, b in zip(ours, theirs, strict=True))
        for ours, theirs in ((values, real_values), (gradients, real_gradients))
    )
    return value_error, gradient_error, ratio


def compare(cases: list[Case], say: Callable[[str], None] = print) -> bool:
    """Print one line for each restatement in `cases`; False if one differs from the package it restates."""
    agree, seen = True, set()
    for case in cases:
        small = case.sized(N=min(case.shape["N"], LARGEST)) if "N" in case.shape else case
        for contender in case.contenders:
            key = (contender.call, *small.shape.values())
            if contender.name not in case.eager or contender.real or contender.compile or key in seen:
                continue
            seen.add(key)
            label = f"{case.op} {small.shape}: {contender.name}"
            peer = PEERS.get(contender.call)
            if peer is None:
                say(f"{label}: no package to import; restated from its source")
                continue
            try:
                module = load(peer.module)
            except ImportError as error:
                say(f"{label}: {peer.module} does not import ({error})")
                continue
            try:
                value, gradient, ratio = difference(small, contender, peer, module)
            except (AttributeError, TypeError) as error:  # a release without this option
                say(f"{label}: the installed {peer.module} can't run it ({error})")
                continue
            same = value <= AGREE and gradient <= AGREE
            agree &= same
            say(
                f"{label}: {'same' if same else 'DIFFERENT'}; value {value:.1e}, gradients {gradient:.1e}, "
                f"restated / real time {ratio:.2f}"
            )
    return agree
