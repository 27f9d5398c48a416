# SPDX-License-Identifier: Apache-2.0
"""Builds csrc/cpu/*.cpp and csrc/cuda/*.cu into two libraries that use LibTorch's stable ABI only.

Nothing of Python or of one torch release is linked in, so one wheel (py3-none-<platform>) serves them all. Variables:
SSLKERNELS_CPU=0 and SSLKERNELS_CUDA=0 skip a library, =1 makes what it needs mandatory (unset: built if the tools are
found); SSLKERNELS_WERROR=1 turns warnings into errors; CXX and CUDA_HOME (or PATH) name the compilers;
SSLKERNELS_CUDA_ARCHITECTURES=90 (or 80,90) compiles for fewer GPUs, in less time; SSLKERNELS_GLIBC=2.28 links for that
glibc and later ones, as the release is.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

BUILD = Path("build/kernels")
REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps ."
MINIMUM_TORCH = (2, 11)
TARGET = f"0x{MINIMUM_TORCH[0]:02x}{MINIMUM_TORCH[1]:02x}000000000000"  # the stable ABI of that release, no newer
# -fno-math-errno and -fno-trapping-math let loops vectorise and change no value; -ffast-math would change many.
CXX_FLAGS = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
STRICT = os.environ.get("SSLKERNELS_WERROR") == "1"
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra", *["-Werror"] * STRICT]
LINKER = ["--as-needed", "--no-undefined", "--exclude-libs=ALL"]
# Each serves the later minor versions too: 80 for 86 and 89, 100 for 103, 120 for 121.
CUDA_ARCHITECTURES = os.environ.get("SSLKERNELS_CUDA_ARCHITECTURES") or "75,80,90,100,120"
# What csrc/cuda takes from libtorch_cuda.so, which a CPU-only torch lacks: it is linked with a stub of that name.
CUDA_SHIM = ("aoti_torch_get_current_cuda_stream", "torch_c10_cuda_check_msg", "torch_c10_cuda_free_error_msg")
NOTES: list[str] = []


class Step(NamedTuple):
    kind: str  # "compile", or "link", which waits for every "compile"
    output: Path
    inputs: list[Path]
    command: list[str]


def find_compiler() -> list[str] | None:
    for name in [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]:
        program, *options = shlex.split(name)
        if path := shutil.which(program):
            return [path, *options]
    return None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")


def find_torch() -> Path:
    """The torch to take headers from; pip's build isolation hides the environment's own, so look there as well."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    for place in (*places, *(Path(sysconfig.get_path(kind), "torch") for kind in ("platlib", "purelib"))):
        header = place / "include/torch/headeronly/version.h"
        version = re.findall(r"VERSION_(?:MAJOR|MINOR) (\d+)", header.read_text()) if header.is_file() else []
        if tuple(map(int, version)) >= MINIMUM_TORCH:
            return place
    sys.exit(
        "sslkernels: the kernels need the headers of torch >= 2.11, and this build sees none. Install torch first, "
        f"then run: {REINSTALL}   (SSLKERNELS_CPU=0 SSLKERNELS_CUDA=0 installs without kernels: correct, but slow)"
    )


def choose_libraries() -> list[Extension]:
    """Decide what can be built here, and note what cannot and why."""
    cpu, cuda = (os.environ.get(f"SSLKERNELS_{name}") for name in ("CPU", "CUDA"))
    problem = "" if sys.platform == "linux" else "this is not Linux"
    if not find_compiler():
        problem = "no C++ compiler was found (g++, c++, clang++ or $CXX); install one, for example: apt-get install g++"
    if problem and "1" in (cpu, cuda):
        sys.exit(f"sslkernels: kernels were asked for, but {problem}")
    if problem:
        if cpu != "0":
            NOTES.append(f"{problem}. Until then the PyTorch reference serves every op, slowly. Then run: {REINSTALL}")
        return []
    if cuda == "1" and not find_nvcc():
        sys.exit(
            "sslkernels: SSLKERNELS_CUDA=1, but nvcc was not found. Install the CUDA toolkit (12.8 or later knows all "
            "architectures), and put its bin directory on PATH or set CUDA_HOME."
        )
    sources = {
        "cpu": sorted(Path("csrc/cpu").glob("*.cpp")) if cpu != "0" else [],
        "cuda": sorted(Path("csrc/cuda").glob("*.cu")) if cuda != "0" and find_nvcc() else [],
    }
    return [Extension(f"sslkernels.lib.libsslkernels_{name}", [*map(str, s)]) for name, s in sources.items() if s]


def cuda_tools(nvcc: str, compiler: list[str]) -> tuple[list[str], list[str], Step]:
    """How to compile and how to link CUDA, and the step that makes the stub of libtorch_cuda.so."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
    chosen = [arch for arch in re.findall(r"\d+", CUDA_ARCHITECTURES) if f"compute_{arch}" in known]
    if not chosen:
        sys.exit(f"sslkernels: {nvcc} knows none of the architectures {CUDA_ARCHITECTURES}; it knows {' '.join(known)}")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in chosen]
    codes.append(f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}")  # PTX, for what comes later
    base = [nvcc, "-ccbin", compiler[0]]
    # compressed, five architectures take an eighth of the space
    compile_ = [*base, "-DUSE_CUDA", *codes, "-Xfatbin=-compress-all", "--threads=0", "-MD"]
    compile_ += [f"-Xcompiler={','.join(HOST_FLAGS)}"]
    compile_ += ["-Werror=all-warnings"] * STRICT
    stub = stub_step(BUILD / "stub/libtorch_cuda.so", "libtorch_cuda.so", CUDA_SHIM, compiler)
    link = [*base, "-shared", "--cudart=static", "--no-device-link", *(f"-Xlinker={flag}" for flag in LINKER)]
    return compile_, [*link, f"-L{stub.output.parent}", "-ltorch_cuda"], stub


def stub_step(output: Path, soname: str, names: Iterable[str], compiler: list[str], *flags: str) -> Step:
    """A library with functions of these names, to link with."""
    source = output.with_suffix(".c")
    write_if_changed(source, "".join(f"void {name}(void) {{}}\n" for name in names))
    flags = ("-w", "-fno-builtin", "-nostdlib", f"-Wl,-soname,{soname}", *flags)
    command = [*compiler, "-shared", "-fPIC", "-x", "c", *flags, str(source), "-o", str(output)]
    return Step("compile", output, [source], command)


def glibc_stub(newest: str, output: Path, compiler: list[str]) -> Step:
    """A stub of glibc, linked before it: each function that changed after `newest`, in the version that it had then.

    It goes by the name of one of glibc's libraries; the loader looks a name with its version up in all of them.
    """
    limit, older = numbers(newest), dict[str, tuple[int, ...]]()
    for library in ("libc.so.6", "libm.so.6"):
        path = subprocess.run([*compiler, f"-print-file-name={library}"], check=True, capture_output=True, text=True)
        command = ["nm", "--dynamic", "--defined-only", "--with-symbol-versions", path.stdout.strip()]
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        symbols = re.findall(r" [TWi] (\w+)(@@?)GLIBC_([\d.]+)$", listed, re.MULTILINE)
        changed = {name for name, mark, version in symbols if mark == "@@" and numbers(version) > limit}
        for name, _, version in symbols:
            if name in changed and numbers(version) <= limit:
                older[name] = max(older.get(name, ()), numbers(version))
    script = output.with_suffix(".map")
    versions = {version: [name for name in older if older[name] == version] for version in older.values()}
    texts = [f"GLIBC_{'.'.join(map(str, version))} {{ {'; '.join(names)}; }};\n" for version, names in versions.items()]
    write_if_changed(script, "".join(texts))
    return stub_step(output, "libpthread.so.0", older, compiler, f"-Wl,--version-script={script}")


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def steps_for(extension: Extension, torch: Path, compiler: list[str]) -> list[Step]:
    """The compile steps of one library, then its link step."""
    steps = []
    if extension.name.endswith("_cuda"):
        compile_, link, stub = cuda_tools(find_nvcc() or "nvcc", compiler)
        steps.append(stub)
    else:
        compile_ = [*compiler, *CXX_FLAGS, *HOST_FLAGS, "-MMD"]
        link = [*compiler, "-shared", *(f"-Wl,{flag}" for flag in LINKER)]
    if newest := os.environ.get("SSLKERNELS_GLIBC"):
        steps.append(glibc_stub(newest, BUILD / f"stub/{extension.name}.so", compiler))
        link.append(str(steps[-1].output))
    headers = ["-Icsrc", "-isystem", f"{torch}/include"]
    for source in map(Path, extension.sources):
        output = BUILD / f"{source}.o"
        options = ["-O3", "-std=c++17", f"-DTORCH_TARGET_VERSION={TARGET}", *headers, "-MF", f"{output}.d"]
        command = [*compile_, *options, "-c", str(source), "-o", str(output)]
        steps.append(Step("compile", output, [source], command))
    output, outputs = BUILD / f"{extension.name.rpartition('.')[2]}.so", [step.output for step in steps]
    objects = [str(path) for path in outputs if path.suffix == ".o"]
    # libstdc++ first: torch's libraries export copies of its templates, which must not become dependencies
    libraries = ["-lstdc++", f"-L{torch}/lib", "-ltorch_cpu", "-lc10"]
    command = [link[0], *objects, *link[1:], *libraries, "-o", str(output)]
    return [*steps, Step("link", output, outputs, command)]


def write_if_changed(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def run_steps(steps: list[Step]) -> None:
    """Bring every output up to date: with ninja only what changed, else everything, in threads."""
    for step in steps:
        step.output.parent.mkdir(parents=True, exist_ok=True)
    # the scripts of a virtual environment that is not activated are not on PATH
    if ninja := shutil.which("ninja", path=f"{sysconfig.get_path('scripts')}:{os.environ.get('PATH', '')}"):
        text = f"builddir = {BUILD}\nrule link\n  command = $cmd\n"
        text += "rule compile\n  command = $cmd\n  deps = gcc\n  depfile = $out.d\n"
        for step in steps:
            output, *inputs = (re.sub(r"([$ :])", r"$\1", str(path)) for path in (step.output, *step.inputs))
            text += f"build {output}: {step.kind} {' '.join(inputs)}\n"
            text += f"  cmd = {shlex.join(step.command).replace('$', '$$')}\n"
        write_if_changed(BUILD / "build.ninja", text)
        subprocess.run([ninja, "-f", str(BUILD / "build.ninja")], check=True)
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for kind in ("compile", "link"):
            commands = [step.command for step in steps if step.kind == kind]
            list(pool.map(lambda command: subprocess.run(command, check=True), commands))


class BuildKernels(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"  # no interpreter tag: these are no Python modules

    def build_extensions(self) -> None:
        torch, compiler = find_torch(), find_compiler() or []
        try:
            run_steps([step for extension in self.extensions for step in steps_for(extension, torch, compiler)])
        except subprocess.CalledProcessError:
            sys.exit(
                "sslkernels: a kernel did not compile (see above); SSLKERNELS_CPU=0 or SSLKERNELS_CUDA=0 skips them"
            )
        self.mkpath("sslkernels/lib")  # where an editable build copies to
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            self.mkpath(str(target.parent))
            self.copy_file(str(BUILD / target.name), str(target))


class BuildPython(build_py):
    def run(self) -> None:
        for note in NOTES:
            print(f"sslkernels: warning: {note}", file=sys.stderr)
        if not self.editable_mode:  # what an earlier build left there would go into the wheel
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]  # any Python: the libraries have no Python symbol


setup(
    ext_modules=choose_libraries(), cmdclass={"build_ext": BuildKernels, "build_py": BuildPython, "bdist_wheel": Wheel}
)
