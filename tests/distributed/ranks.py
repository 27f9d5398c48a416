# SPDX-License-Identifier: Apache-2.0
"""Four processes in a gloo group that run what a test hands them; started once a test module, by forking."""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

WORLD = 4
# The groups that tests use; one of them does not begin with rank 0.
GROUPS = {"2": (0, 1), "3": (0, 1, 2), "4": (0, 1, 2, 3), "subgroup": (1, 3)}
TIMEOUT = 60  # seconds, of a collective


class RankError(AssertionError):
    """What a rank raised, with its traceback."""


class Ranks:
    """`run(function, "3", *arguments)` is [function(group, *arguments) on each rank of the group].

    The function must be importable from a helper module beside the tests; arguments and results are pickled.
    """

    def __init__(self) -> None:
        listener = Listener(family="AF_UNIX")
        self.launcher = subprocess.Popen([sys.executable, __file__, str(listener.address)])
        found = dict(self._greet(listener.accept()) for _ in range(WORLD))
        self.connections = [found[rank] for rank in range(WORLD)]
        listener.close()

    @staticmethod
    def _greet(connection: Any) -> tuple[int, Any]:
        return connection.recv(), connection

    def run(self, function: Callable[..., Any], group: str, *arguments: Any) -> list[Any]:
        outcomes = self.outcomes(function, group, *arguments)
        for rank, (_, error) in enumerate(outcomes):
            if error:
                raise RankError(f"rank {rank}: {error}")
        return [value for value, _ in outcomes]

    def outcomes(self, function: Callable[..., Any], group: str, *arguments: Any) -> list[tuple[Any, str]]:
        """The result of each rank, or the traceback of what it raised."""
        task = pickle.dumps((function.__module__, function.__qualname__, group, arguments))
        members = [self.connections[rank] for rank in GROUPS[group]]
        for connection in members:
            connection.send_bytes(task)
        return [pickle.loads(connection.recv_bytes()) for connection in members]

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        self.launcher.wait(timeout=30)


def _serve(rank: int, address: str, store: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    limit = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=limit)
    groups = {name: dist.new_group(list(ranks), timeout=limit) for name, ranks in GROUPS.items()}
    connection = Client(address)
    connection.send(rank)
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            break
        module, name, group, arguments = pickle.loads(task)
        try:
            outcome = getattr(importlib.import_module(module), name)(groups[group], *arguments), ""
        except Exception:
            outcome = None, traceback.format_exc()
        connection.send_bytes(pickle.dumps(outcome))
    os._exit(0)  # gloo's threads do not outlive the others' sockets gracefully


def _main(address: str) -> None:
    import tempfile

    import torch.distributed as dist

    import sslkernels  # noqa: F401  once, before the processes part

    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(WORLD):
            child = os.fork()
            if not child:
                _serve(rank, address, dist.FileStore(f"{folder}/store", WORLD))
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    _main(sys.argv[1])
