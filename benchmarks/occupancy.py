# SPDX-License-Identifier: Apache-2.0
"""Compiles every Triton kernel ahead of time, for each architecture, dtype and launch shape. Needs no GPU.

usage: python -m benchmarks.occupancy [FAMILY ...] [--target sm_90 ...] [--jobs N] [--json FILE]

The launches of `benchmarks/launches` are recorded on meta tensors, so what is compiled is what would run. The table
shows, of the worst specialization of each kernel, registers a thread, spilled bytes and shared memory a block.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

TARGETS = {f"sm_{n}": ("cuda", n, 32) for n in (80, 90, 100)} | {"gfx942": ("hip", "gfx942", 64)}
SHARED_LIMIT = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.bool: "i1",
    torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
MATRIX_UNITS = re.compile(r"\b(wgmma|tcgen05\.mma|mma\.sync|v_mfma)")
FLOAT_ATOMICS = re.compile(r"\b(?:atom|red)\.[\w.:]*\.b?f\d+|_atomic_\w*f(?:16|32|64)\b")
LAUNCHES = Path(__file__).with_name("launches")
WHERE_SIZES_ARE_TRIED = "sm_90"  # Triton IR is the same for all
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


class Compiled(NamedTuple):
    family: str
    case: str
    dtype: str
    target: str
    kernel: str
    registers: int
    spills: int  # bytes of local memory a thread
    shared: int  # bytes a block
    matrix: str  # the tensor-core instruction, or nothing
    atomics: bool  # sums of floating numbers in the order in which they come
    constants: dict[str, Any]


def families() -> list[str]:
    return sorted(path.stem for path in LAUNCHES.glob("*.py") if path.stem != "__init__")


def calls(family: str, target: str) -> Iterator[tuple[str, torch.dtype, Any]]:
    """(case, dtype, launch) of everything that a family launches; repeats are left out."""
    from sslkernels.triton import _launch

    seen = set()
    for name, case in importlib.import_module(f"benchmarks.launches.{family}").CASES.items():
        for dtype in DTYPES:
            with _launch.record(target) as recorded:
                case(dtype)
            for call in recorded:
                key = call.kernel.__name__, repr(specialize(call))
                if key not in seen:
                    seen.add(key)
                    yield name, dtype, call


def any_size(call: Any, target: str) -> None:
    """Lower a kernel as if every integer argument were 1, which Triton makes a constant, odd, or beyond 32 bits."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    aimed = GPUTarget(*TARGETS[target])
    backend = make_backend(aimed)
    for value in (1, 33, 2**31):
        sized = [value if type(x) is int else x for x in call.arguments]
        signature, constants, _, options = specialize(call._replace(arguments=tuple(sized)))
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        parsed = backend.parse_options(options)
        implementation, modules = backend.get_codegen_implementation(parsed), backend.get_module_map()
        ASTSource(call.kernel, signature, constants).make_ir(aimed, parsed, implementation, modules, context)


def specialize(call: Any) -> tuple[dict[str, Any], dict[str, Any], dict, dict[str, Any]]:
    """Signature, constants, attributes and options, as Triton derives them from the arguments of a launch."""
    options = {name: call.constants[name] for name in OPTIONS if name in call.constants}
    given = dict(zip(call.kernel.arg_names, call.arguments)) | call.constants
    signature: dict[str, Any] = {}
    constants, attributes = {}, {}
    for i, parameter in enumerate(call.kernel.params):
        value = given.get(parameter.name, parameter.default)
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
        elif isinstance(value, tuple):
            signature[parameter.name] = ("fp32",) * len(value)
        elif isinstance(value, bool):
            signature[parameter.name] = "i1"
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        else:
            signature[parameter.name] = "fp32"
        aligned = isinstance(value, Tensor) or (type(value) is int and value % 16 == 0)
        if signature[parameter.name] != "constexpr" and aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes, options


def compile_family(family: str, target: str) -> list[Compiled]:
    """Compile all that a family launches on one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    done = []
    for case, dtype, call in calls(family, target):
        signature, constants, attributes, options = specialize(call)
        source = ASTSource(call.kernel, signature, constants, attributes)
        kernel = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
        registers, spills = _resources(kernel.asm)
        unit = MATRIX_UNITS.search(kernel.asm.get("ptx") or kernel.asm.get("amdgcn"))
        atomics = FLOAT_ATOMICS.search(kernel.asm.get("ptx") or kernel.asm.get("amdgcn")) is not None
        tile = {k: v for k, v in (constants | options).items() if isinstance(v, int | str)}
        name = call.kernel.__name__
        if target == WHERE_SIZES_ARE_TRIED:
            any_size(call, target)
        found = registers, spills, kernel.metadata.shared, unit[1] if unit else "", atomics, tile
        done.append(Compiled(family, case, str(dtype)[6:], target, name, *found))
    return done


def _resources(asm: dict[str, Any]) -> tuple[int, int]:
    """Registers and bytes of spilled registers, from the machine code."""
    if "amdgcn" in asm:
        found = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", asm["amdgcn"]))
        return int(found["vgpr_count"]), int(found["private_segment_fixed_size"])
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", said))
    return int(used["REG"]), int(used["STACK"]) + int(used["LOCAL"])


def table(results: list[Compiled]) -> str:
    """The worst specialization of each kernel and architecture, as Markdown."""
    heads = ("kernel", "target", "compiled", "registers", "spilled bytes", "shared KiB", "matrix unit")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    groups: dict[tuple[str, str, str], list[Compiled]] = {}
    for found in results:
        groups.setdefault((found.family, found.kernel, found.target), []).append(found)
    for (family, kernel, target), group in groups.items():
        registers, spills, shared = (max(getattr(x, name) for x in group) for name in ("registers", "spills", "shared"))
        units = ", ".join(sorted({x.matrix for x in group} - {""})) or "-"
        cells = (f"{family}: `{kernel}`", target, len(group), registers, spills, f"{shared / 1024:.0f}", units)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    work = [(f, t) for f in chosen.families or families() for t in chosen.target or TARGETS]
    results: list[Compiled] = []
    with ProcessPoolExecutor(chosen.jobs) as pool:
        for (family, target), done in zip(work, pool.map(compile_family, *zip(*work))):
            print(f"{family} {target}: {len(done)} kernels", file=sys.stderr, flush=True)
            results += done
    if chosen.json:
        chosen.json.write_text(json.dumps([x._asdict() for x in results], indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
