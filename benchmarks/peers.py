# SPDX-License-Identifier: Apache-2.0
"""`--peers`: the real packages, where they import, against our restatements of them: same value, gradients, cost?"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case, Contender, Inputs, leaves
from benchmarks.contenders import contrastive as ours
from benchmarks.stats import summary
from benchmarks.worker import interleave, relative_error

LARGEST = 1024  # rows; enough to see a difference in cost
AGREE = 1e-5


@dataclass(frozen=True)
class Peer:
    module: str
    call: Callable[[Any, Inputs], Tensor]


PEERS: dict[Callable[..., Tensor], Peer] = {
    ours.lightly_nt_xent: Peer(
        "lightly.loss", lambda m, i: m.NTXentLoss(temperature=i["temperature"])(i["out0"], i["out1"])
    ),
    ours.info_nce_in_batch: Peer(
        "info_nce", lambda m, i: m.info_nce(i["query"], i["key"], temperature=i["temperature"])
    ),
    ours.info_nce_queue: Peer(
        "info_nce", lambda m, i: m.info_nce(i["query"], i["key"], i["queue"], temperature=i["temperature"])
    ),
    ours.open_clip_clip: Peer("open_clip.loss", lambda m, i: m.ClipLoss()(i["image"], i["text"], i["logit_scale"])),
    ours.open_clip_siglip: Peer(
        "open_clip.loss", lambda m, i: m.SigLipLoss()(i["image"], i["text"], i["logit_scale"], i["logit_bias"])
    ),
    ours.open_clip_siglip_chunked: Peer(
        "open_clip.loss",
        lambda m, i: m.SigLipLoss(chunk_size=1024)(i["image"], i["text"], i["logit_scale"], i["logit_bias"]),
    ),
    ours.metric_learning_supcon: Peer(
        "pytorch_metric_learning.losses",
        lambda m, i: m.SupConLoss(temperature=i["temperature"])(i["features"], i["labels"]),
    ),
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


def difference(case: Case, restated: Contender, peer: Peer, module: ModuleType) -> tuple[float, float, float]:
    """Relative difference in value, the largest in gradients, and the restatement's time over the real one's."""
    real = Contender("real", lambda **inputs: peer.call(module, inputs), "")
    inputs = case.make_inputs()
    wanted = tuple(leaves(inputs).values())
    values = [contender.call(**contender.prepare(inputs)) for contender in (restated, real)]
    gradients = [torch.autograd.grad(value, wanted) for value in values]
    both = Case(**{**vars(case), "contenders": (restated, real)})
    times = interleave({c.name: both.step(c.name, inputs) for c in both.contenders}, 7, 0.02)
    first, second = (times[c.name] for c in both.contenders)
    ratio = summary([
        (f + b) / (g + c)
        for f, b, g, c in zip(first["forward"], first["backward"], second["forward"], second["backward"], strict=True)
    ]).median  # fmt: skip
    worst = max(relative_error(a, b.double()) for a, b in zip(*gradients, strict=True))
    return relative_error(values[0].detach(), values[1].detach().double()), worst, ratio


def compare(cases: list[Case], say: Callable[[str], None] = print) -> bool:
    """Print one line for each restatement in `cases`; False if one differs from the package it restates."""
    agree, seen = True, set()
    for case in cases:
        small = case.sized(N=min(case.shape["N"], LARGEST))
        for contender in case.contenders:
            key = (contender.call, small.shape["N"], small.shape["D"])
            if contender.name not in case.eager or key in seen:
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
