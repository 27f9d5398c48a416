# SPDX-License-Identifier: Apache-2.0
"""The processes of an audit, and what they found."""

from __future__ import annotations

import importlib
import math
import multiprocessing as mp
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from sslkernels import _checks as check
from sslkernels.audit._inputs import INPUTS, Inputs
from sslkernels.audit._measure import Measured, Task, measure
from sslkernels.audit._verdict import Finding, find
from sslkernels.distributed._launch import place

TIMEOUT = 60  # seconds, of a collective; a rank that waits as long is stuck


@dataclass(frozen=True)
class Audit:
    """What `check_dist` found, a `Finding` for each number of processes; `print` it for the table."""

    findings: tuple[Finding, ...]

    @property
    def exact(self) -> bool:
        return all(finding.exact for finding in self.findings)

    def __str__(self) -> str:
        head = ("rows", "loss", "true loss", "cosine", "norm ratio", "features", "verdict")
        rows = [head] + [
            (
                "+".join(map(str, f.sizes)),
                *(f"{x:.6g}" for x in (f.loss, f.true_loss, f.cosine, f.ratio, f.features_cosine)),
                f.verdict,
            )
            for f in self.findings
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
        return "\n".join("  ".join([*(cell.rjust(w) for cell, w in zip(row, widths)), row[-1]]) for row in rows)


def check_dist(
    target: Any,
    inputs: str | Inputs = "auto",
    *,
    arguments: dict[str, Any] | None = None,
    processes: Sequence[int] = (2, 4),
    rows: int = 8,
    dim: int = 16,
    uneven: bool = False,
    steps: int = 2,
    tolerance: float = 1e-6,
) -> Audit:
    """Whether a loss over several processes is that of one process on all rows, in value and gradients, in float64.

        true      the loss of one process on all rows, and its gradient in the parameters of a small encoder
        found     the mean over the ranks of their losses, and of their gradients, as DistributedDataParallel takes it

    The ranks' rows differ, also in magnitude, so that statistics of the own batch are not those of all. Processes are
    started with a gloo group; those of torchrun are used where there are any. Called before `init_process_group`: a
    loss is made once where there is no group, as the true one, and again where there is one.

    Args:
        target: a class or function that makes the loss when called with `arguments` (and with `rank` and `world_size`,
            if it has such); a loss that is a function or nn.Module; or "module:name" of one of those. Processes must be
            able to import it.
        inputs: what to call the loss with: a key of `audit.INPUTS`, an `audit.Inputs`, or "auto", by its arguments.
        arguments: keyword arguments of `target`.
        processes: numbers of ranks, each an own finding; under torchrun there is one, with the ranks there are.
        rows, dim: of a rank's data. uneven: every other rank has 3 rows more.
        steps: of a loss that has a state; the first that is not exact is told.
        tolerance: relative, of what is called exact.

    Raises:
        ValueError, TypeError: an argument out of range; a target that processes cannot import.
        RuntimeError: called where a process group exists already, or outside of `if __name__ == "__main__":`.

    Example:
        >>> from sslkernels import check_dist, losses
        >>> audit = check_dist(losses.NTXentLoss, arguments={"gather_distributed": True}, processes=[2])
        >>> audit.exact, audit.findings[0].verdict
        (True, 'exact')
    """
    import torch.distributed as dist

    if dist.is_initialized():
        raise RuntimeError("check_dist must be called before init_process_group: it makes groups of its own")
    if isinstance(inputs, str):
        check.choice("inputs", inputs, ("auto", *INPUTS))
    for name, x, low in (("rows", rows, 2), ("dim", dim, 2), ("steps", steps, 1)):
        check.integer(name, x, low)
    check.positive("tolerance", tolerance)
    target = load(target) if isinstance(target, str) else target
    if not callable(target):
        raise TypeError(f"target must be a loss or make one, got {type(target).__name__}")

    def task(world: int) -> Task:
        sizes = [rows + 3 * (uneven and rank % 2) for rank in range(world)]
        return Task(target, arguments or {}, inputs, sizes, dim, steps)

    if launch := place():
        rank, world = launch
        if world < 2:
            raise ValueError(f"torchrun must start at least 2 processes, got {world}")
        return Audit((_among(task(world), rank, tolerance),))
    if not isinstance(processes, Sequence) or isinstance(processes, str):
        raise TypeError(f"processes must be a sequence of integers, got {processes!r}")
    if not processes:
        raise ValueError("processes must not be empty")
    for world in processes:
        check.integer("processes", world, 2)
    return Audit(tuple(_started(task(world), tolerance) for world in processes))


def load(name: str) -> Any:
    """What "module:name" names."""
    module, _, path = name.partition(":")
    if not path:
        raise ValueError(f"a target must be written module:name, got {name!r}")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _among(task: Task, rank: int, tolerance: float) -> Finding:
    """The finding of the processes that torchrun started, on each of them."""
    import torch.distributed as dist

    limit = timedelta(seconds=TIMEOUT)
    measured = measure(task, rank, len(task.sizes), lambda: dist.init_process_group("gloo", timeout=limit))
    found: list[Any] = [find(measured, tolerance) if measured else None]
    dist.broadcast_object_list(found, src=0)
    dist.destroy_process_group()
    return found[0]


def _serve(task: bytes, rank: int, world: int, path: str, connection: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    limit = timedelta(seconds=TIMEOUT)

    def join() -> None:
        store = dist.FileStore(path, world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)

    connection.send_bytes(b"")  # it has begun
    found: tuple[bool, Any]
    try:
        found = True, measure(pickle.loads(task), rank, world, join)
    except BaseException as error:
        found = False, f"{type(error).__name__}: {error}"
    connection.send_bytes(pickle.dumps(found))  # whole, where `send` would share tensors' memory with this process
    os._exit(0)  # gloo's threads do not outlive the others' sockets gracefully


def _started(task: Task, tolerance: float) -> Finding:
    """The finding of as many new processes as ranks."""
    try:
        sent = pickle.dumps(task)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(f"target and inputs must be what another process can import, got: {error}") from error
    context, world = mp.get_context("forkserver"), len(task.sizes)
    context.set_forkserver_preload(["sslkernels.audit"])
    with tempfile.TemporaryDirectory() as folder:
        connections, ranks = [], []
        for rank in range(world):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(sent, rank, world, str(Path(folder, "store")), there))
            process.start()
            there.close()
            connections.append(here)
            ranks.append(process)
        try:
            found = _outcome(connections, ranks)
        finally:
            for process in ranks:
                process.kill()
                process.join()
    if isinstance(found, Measured):
        return find(found, tolerance)
    return Finding(tuple(task.sizes), math.nan, math.nan, math.nan, math.nan, math.nan, "", found)


def _outcome(connections: Sequence[Any], processes: Sequence[Any]) -> Measured | str:
    """What rank 0 measured, or why a rank stopped."""
    left, begun, measured = dict(zip(connections, range(len(connections)))), set(), None
    deadline, raised = time.monotonic() + 3 * TIMEOUT, ""
    while left:
        ready: Any = wait(list(left), timeout=max(0.0, deadline - time.monotonic()))
        if not ready and raised:
            return raised
        if not ready:
            return f"stopped: ranks {', '.join(map(str, left.values()))} did not finish within {3 * TIMEOUT} s"
        for connection in ready:
            rank = left[connection]
            try:
                message = connection.recv_bytes()
            except EOFError:
                return _death(rank, processes[rank], rank in begun)
            if not message:
                begun.add(rank)
                continue
            del left[connection]
            good, found = pickle.loads(message)
            if not good and not raised:
                raised = f"stopped: rank {rank} raised {found}"
                deadline = time.monotonic() + 0.5  # another rank's death may be the cause
            measured = found if good and rank == 0 else measured
    if raised:
        return raised
    assert measured is not None
    return measured


def _death(rank: int, process: Any, begun: bool) -> str:
    """How a process ended that sent nothing."""
    process.join()
    if not begun:
        raise RuntimeError(
            f"the process of rank {rank} ended with code {process.exitcode} before it began: check_dist must be called "
            'under `if __name__ == "__main__":`, from a file that a process can import'
        )
    if process.exitcode == -signal.SIGABRT:
        return f"stopped: rank {rank} was aborted, as by gloo where ranks bring tensors of different sizes"
    return f"stopped: rank {rank} ended with code {process.exitcode}"
