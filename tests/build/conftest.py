# SPDX-License-Identifier: Apache-2.0
"""A way to run this Python in a clean process, and to build a wheel from the working tree as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHOICES = ("SSLKERNELS_CPU", "SSLKERNELS_CUDA", "SSLKERNELS_CPU_LEVEL")
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run(*arguments of Python, check=True, cwd=..., **environment)"""
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def call(
        *arguments: str, check: bool = True, cwd: Path = elsewhere, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if name not in CHOICES}
        kept.setdefault("SSLKERNELS_CUDA_ARCHITECTURES", "80,90,100")  # as in the Makefile: nothing compiles twice
        done = subprocess.run(
            [sys.executable, *arguments], env=kept | environment, cwd=cwd, capture_output=True, text=True
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return call


@pytest.fixture(scope="session")
def build(run: Run) -> Callable[..., subprocess.CompletedProcess[str]]:
    """build(folder, **environment): pip wheel, verbose, with what the environment already has."""

    def call(folder: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        command = ("-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder), ".")
        return run(*command, check=check, cwd=ROOT, **environment)

    return call
