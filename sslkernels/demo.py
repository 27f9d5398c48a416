# SPDX-License-Identifier: Apache-2.0
"""Pretrain SimCLR on real images twice from one seed, with an eager loss and with ours: `python -m sslkernels.demo`.

Same network, same images, same views in the same order; the loss alone differs. What is shown: the two loss curves are
one, what the loss costs in time and memory, and that the network has learned. `--method mae`, or any other, trains that
method instead, for a minute, and shows what its features were worth before and after.

`torchrun --nproc_per_node 2 -m sslkernels.demo` shares our training out over two processes, and the eager one stays in
one: the curves are one still. `--method` under torchrun trains that method on all of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkernels import data
from sslkernels.distributed import Batch
from sslkernels.distributed._group import span
from sslkernels.distributed._launch import launched
from sslkernels.evaluation import extract_features, knn_accuracy
from sslkernels.losses import nt_xent
from sslkernels.methods import SimCLR
from sslkernels.nn import ProjectionHead, ResidualCNN, global_batch_norm
from sslkernels.presets import PRESETS

TEMPERATURE, DIM, NEIGHBORS = 0.1, 128, 5


def eager_nt_xent(out0: Tensor, out1: Tensor, temperature: float) -> Tensor:
    """NT-Xent as lightly's `loss/ntx_ent_loss.py` computes it: four similarity matrices, two of them without their
    diagonal, concatenated and given to `cross_entropy`.

    Restated here because the package may import neither lightly nor its own benchmarks, and `sslkernels.reference`
    defines our primitives, which is not what a user migrates from.
    """
    out0, out1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
    n = len(out0)
    others = ~torch.eye(n, dtype=torch.bool, device=out0.device)
    logits_00 = torch.einsum("nc,mc->nm", out0, out0) / temperature
    logits_01 = torch.einsum("nc,mc->nm", out0, out1) / temperature
    logits_10 = torch.einsum("nc,mc->nm", out1, out0) / temperature
    logits_11 = torch.einsum("nc,mc->nm", out1, out1) / temperature
    logits_0100 = torch.cat([logits_01, logits_00[others].view(n, -1)], dim=1)
    logits_1011 = torch.cat([logits_10, logits_11[others].view(n, -1)], dim=1)
    logits = torch.cat([logits_0100, logits_1011], dim=0)  # (2N, 2N - 1)
    return F.cross_entropy(logits, torch.arange(n, device=out0.device).repeat(2))


LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"eager": eager_nt_xent, "sslkernels": nt_xent}


class Run(NamedTuple):
    curve: list[float]
    loss_seconds: float  # median over steps of the loss's forward and backward
    step_seconds: float  # median over steps of everything
    method: SimCLR


def new_method(images: Tensor, *, seed: int) -> SimCLR:
    """SimCLR whose head has GELU in place of ReLU: smooth all through, so that rounding is not amplified (nn)."""
    torch.manual_seed(seed)
    backbone = ResidualCNN(in_chans=images.shape[1])
    method = SimCLR(backbone, dim=DIM, temperature=TEMPERATURE)
    method.head = ProjectionHead(backbone.dim, DIM, num_layers=3, batch_norm=True, activation=nn.GELU)
    # channels_last takes a fifth less time in the convolutions
    return nn.utils.convert_conv2d_weight_memory_format(method, torch.channels_last)


def pretrain(
    loss: str, images: Tensor, *, steps: int, batch_size: int, seed: int = 0, process_group: Any = None
) -> Run:
    """Train SimCLR on images (N, 1, H, W), timing the loss on its own in every step.

    With process_group each rank takes its part of the batch, and our loss is of the whole of it.
    """
    from tqdm import tqdm

    ranks = ranks_of(process_group)
    options = {} if ranks.local else {"process_group": process_group}
    method = new_method(images, seed=seed)
    if not ranks.local:
        global_batch_norm(method, process_group)
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.12)
    generator = torch.Generator().manual_seed(seed)
    curve, loss_seconds, step_seconds = [], [], []
    for _ in (progress := tqdm(range(steps), desc=f"{loss:>10}", unit="step", disable=ranks.rank > 0)):
        started = time.perf_counter()
        chosen = torch.randperm(len(images), generator=generator)[:batch_size]
        views = data.two_views(images[chosen], generator=generator, **data.DIGIT_VIEWS)
        view0, view1 = (view.tensor_split(ranks.world)[ranks.rank] for view in views)
        z = method.project((view0, view1))
        # The step is cut at the loss, so that the loss's forward and backward are timed and nothing else is. SimCLR's
        # factor of two, which Adam does not see, is left out.
        out0, out1 = (part.detach().requires_grad_() for part in z)
        loss_started = time.perf_counter()
        value = LOSSES[loss](out0, out1, TEMPERATURE, **options)
        value.backward()
        loss_seconds.append(time.perf_counter() - loss_started)
        optimizer.zero_grad()
        torch.autograd.backward(z, [out0.grad, out1.grad])
        if not ranks.local:  # what DistributedDataParallel does, which the cut at the loss goes past
            for p in method.parameters():
                p.grad = None if p.grad is None else ranks.sum(p.grad) / ranks.world
        optimizer.step()
        schedule.step()
        step_seconds.append(time.perf_counter() - started)
        curve.append((ranks.sum(value.detach()) / ranks.world).item())
        progress.set_postfix(loss=f"{curve[-1]:.3f}")
    return Run(curve, _median(loss_seconds), _median(step_seconds), method)


def ranks_of(process_group: Any) -> Batch:
    """Rank and world of the group, for sums over it."""
    name, rank, world, strategy, _ = span(process_group)
    return Batch(name, rank, world, strategy, 1, None)


def peak_memory(loss: str, n: int) -> float | None:
    """Peak memory in MiB that the loss adds to its inputs and their gradients, or None where the system does not tell.

    Measured in a process of its own, as the allocator keeps what an earlier step has freed.
    """
    # this process has given the warnings already
    command = [sys.executable, "-W", "ignore", "-m", "sslkernels.demo", "--measure", loss, "--batch-size", str(n)]
    command += ["--threads", str(torch.get_num_threads())]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(loss: str, n: int) -> float | None:
    """The body of that process: high-water mark of one forward and backward, less what the gradients need."""

    def step(rows: int) -> None:
        out0, out1 = torch.randn(2, rows, DIM, generator=generator).unbind()
        out0, out1 = out0.clone().requires_grad_(), out1.clone().requires_grad_()
        Path("/proc/self/clear_refs").write_text("5")  # sets the mark back to what is resident now
        before.append(_status("VmRSS"))
        LOSSES[loss](out0, out1, TEMPERATURE).backward()

    generator = torch.Generator().manual_seed(0)
    before: list[float] = []
    try:
        step(8)  # loads what the first call loads
        step(n)
    except OSError:  # only Linux has these files, and not every container lets one write
        return None
    gradients = 2 * n * DIM * 4 / 2**20
    return max(0.0, _status("VmHWM") - before[-1] - gradients)


def _status(field: str) -> float:
    """A memory field of this process in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def table(result: dict) -> str:
    """The figures as text."""
    eager, ours = result["eager"], result["sslkernels"]
    rows = [
        ("", "eager", "sslkernels", ""),
        ("loss at the first step", *(f"{run['curve'][0]:.4f}" for run in (eager, ours)), ""),
        ("loss at the last step", *(f"{run['curve'][-1]:.4f}" for run in (eager, ours)), ""),
        ("largest difference between the curves", "", f"{result['largest_difference']:.1e}", ""),
        _compared("milliseconds in the loss, per step", eager["loss_ms"], ours["loss_ms"]),
        _compared("milliseconds in all, per step", eager["step_ms"], ours["step_ms"]),
        _compared("peak memory of the loss, MiB", eager["peak_mib"], ours["peak_mib"]),
        ("kNN accuracy, %: raw pixels", f"{result['knn_raw_pixels']:.1f}", "", ""),
        ("kNN accuracy, %: untrained network", f"{result['knn_untrained']:.1f}", "", ""),
        ("kNN accuracy, %: trained network", f"{eager['knn']:.1f}", f"{ours['knn']:.1f}", ""),
    ]
    return "\n".join(f"{name:<40}{left:>14}{right:>14}  {note}".rstrip() for name, left, right, note in rows)


def _compared(name: str, eager: float | None, ours: float | None) -> tuple[str, str, str, str]:
    if eager is None or ours is None:
        return name, "not measured", "not measured", ""
    return name, f"{eager:.1f}", f"{ours:.1f}", f"{eager / ours:.1f}x less" if 0 < ours < eager else ""


def plot(result: dict, path: Path) -> None:
    """Both curves on top of each other, and bars of the loss's time and memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    curves, times, memory = figure.subplots(1, 3, width_ratios=(3, 1, 1))
    curves.plot(result["eager"]["curve"], color="tab:orange", linewidth=6, alpha=0.5, label="eager")
    curves.plot(result["sslkernels"]["curve"], color="tab:blue", linewidth=1.5, label="sslkernels")
    curves.set(xlabel="step", ylabel="NT-Xent", title=f"one curve (within {result['largest_difference']:.1e})")
    curves.legend()
    for axes, key, title in (
        (times, "loss_ms", "ms in the loss, per step"),
        (memory, "peak_mib", "peak MiB of the loss"),
    ):
        values = [result[loss][key] or 0.0 for loss in LOSSES]
        axes.bar_label(axes.bar(list(LOSSES), values, color=["tab:orange", "tab:blue"]), fmt="%.1f")
        axes.margins(y=0.1)  # room for the labels
        axes.set_title(title)
    figure.suptitle(f"SimCLR on the digits, {result['batch_size']:,} pairs, dim {DIM}, {result['threads']} threads")
    figure.savefig(path, dpi=120)


def run(*, steps: int, batch_size: int, out: Path, process_group: Any = None) -> dict | None:
    """Everything: both trainings, the figures, `demo.png` and `demo.json` in `out`.

    Of several ranks all train with our loss, and the first does the rest; the others have no result.
    """
    images = data.digits()
    ranks = ranks_of(process_group)
    if ranks.rank:
        pretrain("sslkernels", images.train_images, steps=steps, batch_size=batch_size, process_group=process_group)
        return None

    def accuracy(train: Tensor, test: Tensor) -> float:
        return 100 * knn_accuracy(train, images.train_labels, test, images.test_labels, k=NEIGHBORS)

    def accuracy_of(method: SimCLR) -> float:
        return accuracy(extract_features(method, images.train_images), extract_features(method, images.test_images))

    result: dict = {"steps": steps, "batch_size": batch_size, "threads": torch.get_num_threads()}
    result["processes"] = ranks.world
    result["knn_raw_pixels"] = accuracy(images.train_images.flatten(1), images.test_images.flatten(1))
    result["knn_untrained"] = accuracy_of(new_method(images.train_images, seed=0))
    for loss in reversed(LOSSES):  # ours first, as other ranks wait for it
        group = process_group if loss == "sslkernels" else None
        trained = pretrain(loss, images.train_images, steps=steps, batch_size=batch_size, process_group=group)
        result[loss] = {
            "curve": trained.curve,
            "loss_ms": 1e3 * trained.loss_seconds,
            "step_ms": 1e3 * trained.step_seconds,
            "peak_mib": peak_memory(loss, batch_size),
            "knn": accuracy_of(trained.method),
        }
    pairs = zip(*(result[loss]["curve"] for loss in LOSSES), strict=True)
    result["largest_difference"] = max(abs(a - b) for a, b in pairs)
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, out / "demo.png")
    return result


def run_method(name: str, *, steps: int | None, seconds: float, out: Path, process_group: Any = None) -> dict | None:
    """Train one preset for `steps`, or about `seconds`; the figures, `NAME.png` and `NAME.json` in `out`.

    Of several ranks the first alone has the result.
    """
    from sslkernels.training import Training, steps_in

    steps = steps or steps_in(name, seconds, process_group=process_group)
    training = Training(name, steps=steps, process_group=process_group)
    if training.ranks.rank:
        training.run()
        return None
    before = training.accuracy()
    started = time.perf_counter()
    curve = training.run(progress=True)
    elapsed = time.perf_counter() - started
    result = {"method": name, "data": training.preset.data, "steps": len(curve), "seconds": elapsed}
    result["processes"] = training.ranks.world
    result |= {"curve": curve, "before": before, "after": training.accuracy()}
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    plot_method(result, out / f"{name}.png")
    return result


def plot_method(result: dict, path: Path) -> None:
    """The loss, and bars of each score before and after."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from sslkernels.training import TITLES

    scores = list(result["after"])
    figure = Figure(figsize=(5 + 2 * len(scores), 4), layout="constrained")
    FigureCanvasAgg(figure)
    curve, *bars = figure.subplots(1, 1 + len(scores), width_ratios=(3, *(1 for _ in scores)))
    curve.plot(result["curve"], color="tab:blue", linewidth=1)
    curve.set(xlabel="step", ylabel="loss")
    for axes, how in zip(bars, scores, strict=True):
        values = [100 * result[when][how] for when in ("before", "after")]
        axes.bar_label(axes.bar(["before", "after"], values, color=["tab:gray", "tab:blue"]), fmt="%.1f")
        axes.set(title=TITLES[how], ylim=(min(0, *values), 105))
    figure.suptitle(f"{result['method']} on the {result['data']}: {result['steps']:,} steps")
    figure.savefig(path, dpi=120)


def main_method(name: str, *, steps: int | None, seconds: float, out: Path, process_group: Any = None) -> None:
    """Train, and say in words what came of it."""
    from sslkernels.training import TITLES

    ranks = ranks_of(process_group)
    if ranks.rank == 0:
        length = f"{steps:,} steps" if steps else f"about {seconds:.0f} seconds"
        print(f"{name} on the {PRESETS[name].data}, {length}{_in_processes(ranks.world)}\n")
    result = run_method(name, steps=steps, seconds=seconds, out=out, process_group=process_group)
    if result is None:
        return
    print(f"\n{'held-out':<20}{'untrained':>12}{'trained':>12}")
    for how in result["after"]:
        print(f"{TITLES[how]:<20}{100 * result['before'][how]:>12.1f}{100 * result['after'][how]:>12.1f}")
    print(f"\nThe plot is {out / f'{name}.png'}, the figures are {out / f'{name}.json'}.")
    next_command = (
        "`python -m sslkernels show mae` draws what it fills in" if name == "mae" else "`make methods` trains all"
    )
    print(f"Next: {next_command}; docs/methods.md trains on your own data.")


def _in_processes(world: int) -> str:
    return f" in {world} processes" if world > 1 else ""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sslkernels.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--method", choices=PRESETS, help="train this method instead of comparing the losses of SimCLR")
    parser.add_argument("--seconds", type=float, default=60, help="with --method: of training (default: 60)")
    parser.add_argument("--steps", type=int, help="default: 100; with --method: as many as --seconds allow")
    parser.add_argument("--batch-size", type=int, default=1024, help="pairs of views in a step (default: 1024)")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for demo.png and demo.json")
    parser.add_argument("--quick", action="store_true", help="8 steps of 64 pairs: does it run, no more")
    parser.add_argument("--measure", choices=LOSSES, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's choice)")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.measure:
        print(json.dumps(measure(args.measure, args.batch_size)))
        return
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if args.method:
        if not args.seconds > 0:
            parser.error(f"--seconds must be positive, got {args.seconds}")
        steps = 8 if args.quick else args.steps
        with launched() as group:
            main_method(args.method, steps=steps, seconds=args.seconds, out=args.out, process_group=group)
        return
    steps, batch_size = (8, 64) if args.quick else (args.steps or 100, args.batch_size)
    most = len(data.digits().train_images)
    if not 2 <= batch_size <= most:
        parser.error(f"--batch-size must be between 2 and the {most:,} training images, got {batch_size}")
    with launched() as group:
        ranks = ranks_of(group)
        if ranks.rank == 0:
            print(f"SimCLR on scikit-learn's digits: {steps} steps of {batch_size:,} pairs, twice from one seed")
            print(f"eager in one process, ours{_in_processes(ranks.world)}\n" if ranks.world > 1 else "")
        result = run(steps=steps, batch_size=batch_size, out=args.out, process_group=group)
    if result is None:
        return
    print("\n" + table(result))
    print(f"\nThe plot is {args.out / 'demo.png'}, the figures are {args.out / 'demo.json'}.")
    print("Next: `make bench` times every loss against what others ship; docs/methods.md trains on your own images.")


if __name__ == "__main__":
    main()
