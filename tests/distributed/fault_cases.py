# SPDX-License-Identifier: Apache-2.0
"""What ranks do to each other in test_faults.py, and processes of their own for those that die of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

WORLD = 4
TIMEOUT = 6.0  # seconds, of the groups whose ranks die


class Outcome(NamedTuple):
    error: str  # the type, or "" where the step went well
    message: str
    seconds: float


def step(group: Any, change: str, odd: int) -> Outcome:
    """A step of NT-Xent, on the odd rank with a change to it."""
    import torch
    import torch.distributed as dist

    from sslkernels import losses
    from sslkernels.distributed import Group

    mine = change if dist.get_rank(group) == odd else ""
    function = losses.dcl if mine == "loss" else losses.nt_xent
    rows, width = 0 if "empty" in (mine, change[4:]) else 8, 5 if mine == "width" else 4
    out0, out1 = (torch.randn(rows, width, requires_grad=mine != "requires_grad") for _ in range(2))
    if mine == "dtype":
        out0, out1 = out0.double(), out1.double()
    if mine == "views":
        out1 = out1[:-1]
    options: dict[str, Any] = {"process_group": group, "strategy": "ring" if mine == "strategy" else "gather"}
    if mine == "temperature":
        options["temperature"] = 0.25
    elif mine == "learned":
        options["temperature"] = torch.tensor(0.5)
    elif mine == "weights":
        options["sample_weight"] = torch.ones(8)
    elif mine == "reduction":
        options["reduction"] = "sum"
    elif mine == "check":
        options["process_group"] = Group(group, check="first")
    if change == "parameter":
        options["temperature"] = torch.tensor(0.5, requires_grad=mine != "parameter")
    start = time.monotonic()
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=mine == "autocast"):
            function(out0, out1, **options).backward()
    except Exception as error:
        return Outcome(type(error).__name__, str(error), time.monotonic() - start)
    return Outcome("", "", time.monotonic() - start)


def other_vocabulary(group: Any) -> Outcome:
    """Rows that are not compared, and a matrix whose first dimension is none of rows."""
    import torch
    import torch.distributed as dist

    from sslkernels.losses import masked_lm_loss

    rows, classes = 4 + dist.get_rank(group), 10 + dist.get_rank(group)
    labels, start = torch.zeros(rows, dtype=torch.int64), time.monotonic()
    try:
        masked_lm_loss(torch.randn(rows, 3), torch.randn(classes, 3), labels, process_group=group)
    except Exception as error:
        return Outcome(type(error).__name__, str(error), time.monotonic() - start)
    return Outcome("", "", time.monotonic() - start)


class Death(NamedTuple):
    """The rank stops at the n-th call of one of the collectives; "" is before the step."""

    collective: str = ""
    call: int = 1
    strategy: str = "gather"
    hangs: bool = False
    rank: int = 2
    members: tuple[int, ...] = (0, 1, 2, 3)
    tcp: bool = False  # a store that rank 0 holds
    former: bool = False  # rank 0 had a fault in a group of the same name before


DEATHS = {
    "before": Death(),
    "hang": Death(hangs=True),
    "compare": Death("gather_words"),
    "gather": Death("start_gather"),
    "gather-sum": Death("start_scatter"),
    "ring-first-hop": Death("start_swap", strategy="ring"),
    "ring-later": Death("start_swap", call=2, strategy="ring"),
    "ring-backward": Death("start_swap", call=5, strategy="bidirectional_ring"),
    "ring-hang": Death("start_swap", call=2, strategy="ring", hangs=True),
    "subgroup": Death("start_swap", strategy="ring", rank=3, members=(1, 3)),
    "former": Death(former=True),
    "store": Death(rank=0, tcp=True),
}


def _stop(death: Death) -> None:
    if death.hangs:
        time.sleep(100)
    os.kill(os.getpid(), signal.SIGKILL)


def _die_in(death: Death) -> None:
    """Make this process stop in the collective, after the others have begun to wait for it."""
    from sslkernels.distributed import _agreement, _collectives

    inner: Callable[..., Any] = getattr(_collectives, death.collective)
    calls = 0

    def outer(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == death.call:
            time.sleep(0.3)
            _stop(death)
        return inner(*args)

    setattr(_collectives, death.collective, outer)
    assert _agreement.collectives is _collectives


def _former_fault() -> None:
    import torch.distributed as dist

    from sslkernels.distributed._faults import guard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with suppress(RuntimeError), guard(dist.new_group([0])):
        raise RuntimeError
    dist.destroy_process_group()


def _member(name: str, rank: int, store: Any, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    from sslkernels.losses import nt_xent

    torch.set_num_threads(1)
    death = DEATHS[name]
    if death.former and rank == 0:
        _former_fault()
    if death.tcp:
        port = int(folder.joinpath("port").read_text())
        store = dist.TCPStore(
            "127.0.0.1", port, WORLD, rank == 0, timeout=timedelta(seconds=30), wait_for_workers=False
        )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=TIMEOUT))
    group = dist.new_group(list(death.members), timeout=timedelta(seconds=TIMEOUT))
    if rank not in death.members:
        os._exit(0)
    out0, out1 = (torch.randn(8, 4, requires_grad=True) for _ in range(2))
    nt_xent(out0, out1, process_group=group, strategy=death.strategy).backward()
    dist.barrier(group)
    if rank == death.rank:
        if not death.collective:
            time.sleep(0.3)
            _stop(death)
        _die_in(death)
    start = time.monotonic()
    try:
        nt_xent(out0, out1, process_group=group, strategy=death.strategy).backward()
        outcome = Outcome("", "", time.monotonic() - start)
    except Exception as error:
        outcome = Outcome(type(error).__name__, str(error), time.monotonic() - start)
    folder.joinpath(f"{rank}.json").write_text(json.dumps(outcome))
    deadline = time.monotonic() + 3 * TIMEOUT
    while len(list(folder.glob("*.json"))) < len(death.members) - 1 and time.monotonic() < deadline:
        time.sleep(0.05)  # others must find out by themselves, not by this one's end
    os._exit(0)


def deaths() -> dict[str, dict[int, Outcome]]:
    """What each survivor of each death raised; all groups die side by side."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-W", "ignore", __file__, folder], check=True, timeout=120)
        return {
            name: {int(p.stem): Outcome(*json.loads(p.read_text())) for p in Path(folder, name).glob("*.json")}
            for name in DEATHS
        }


def _main(folder: Path) -> None:
    import socket

    import torch.distributed as dist

    import sslkernels  # noqa: F401  once, before the processes part

    children, hanging = [], []
    for name, death in DEATHS.items():
        place = folder / name
        place.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place.joinpath("port").write_text(str(free.getsockname()[1]))
        for rank in range(WORLD):
            child = os.fork()
            if not child:
                store = None if death.tcp else dist.FileStore(str(place / "store"), WORLD)
                _member(name, rank, store, place)
            (hanging if death.hangs and rank == death.rank else children).append(child)
    for child in children:
        os.waitpid(child, 0)
    for child in hanging:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    _main(Path(sys.argv[1]))
