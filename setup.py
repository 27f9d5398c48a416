# SPDX-License-Identifier: Apache-2.0
"""Builds csrc/cpu/*.cpp and csrc/cuda/*.cu into two libraries that use LibTorch's stable ABI only.

Nothing of Python or of one torch release is linked in, so one wheel (py3-none-<platform>) serves them all. Variables:
SSLKERNELS_CPU=0 and SSLKERNELS_CUDA=0 skip a library, =1 makes what it needs mandatory (unset: built where the tools are
found); SSLKERNELS_WERROR=1 turns warnings into errors; CXX and CUDA_HOME (or PATH) name the compilers.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
BUILD = Path("build/kernels")
MINIMUM_TORCH = (2, 11)
TARGET = f"0x{MINIMUM_TORCH[0]:02x}{MINIMUM_TORCH[1]:02x}000000000000"  # the stable ABI of that release, no newer
CUDA_ARCHITECTURES = (80, 90, 100)
# What csrc/cuda takes from libtorch_cuda.so, which a CPU-only torch does not have: linking meets a stub of that name.
CUDA_SHIM = ("aoti_torch_get_current_cuda_stream", "torch_c10_cuda_check_msg", "torch_c10_cuda_free_error_msg")
NOTES: list[str] = []


class Step(NamedTuple):
    """One compiler call: `command` turns `inputs` into `output`."""

    output: Path
    inputs: list[Path]
    command: list[str]
    depfile: bool = False


def wanted(library: str) -> bool | None:
    """True: mandatory, False: skipped, None: built if the tools are there."""
    return {"": None, "0": False, "1": True}[os.environ.get(f"SSLKERNELS_{library}", "")]


def find_compiler() -> list[str] | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    return next(
        ([path, *shlex.split(name)[1:]] for name in names if (path := shutil.which(shlex.split(name)[0]))), None
    )


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")


def find_torch() -> Path:
    """The torch to take headers from; pip's build isolation hides the environment's own, so look there as well."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(kind), "torch") for kind in ("platlib", "purelib")]
    for place in places:
        header = place / "include/torch/headeronly/version.h"
        if header.is_file():
            found = tuple(int(n) for n in re.findall(r"define TORCH_VERSION_(?:MAJOR|MINOR) (\d+)", header.read_text()))
            if found >= MINIMUM_TORCH:
                return place
    sys.exit(
        "sslkernels: building the kernels needs the headers of torch >= 2.11, and this build sees none. Install torch "
        "first, then run: pip install --no-build-isolation .   (SSLKERNELS_CPU=0 SSLKERNELS_CUDA=0 installs without "
        "kernels: correct, but slow)"
    )


def choose_libraries() -> list[Extension]:
    """Decide what can be built here, and note what cannot and why."""
    cpu, cuda = wanted("CPU"), wanted("CUDA")
    compiler, nvcc = find_compiler(), find_nvcc()
    if not compiler or sys.platform != "linux":
        problem = "no C++ compiler was found (g++, c++, clang++ or $CXX)" if not compiler else "this is not Linux"
        if cpu or cuda:
            sys.exit(
                f"sslkernels: kernels were asked for, but {problem}. Install one, for example: apt-get install g++"
            )
        if cpu is None:
            NOTES.append(
                f"{problem}: the plain PyTorch reference will serve every op, slowly. To get the kernels, install a "
                "compiler (for example: apt-get install g++), then run: pip install --no-build-isolation --force-"
                "reinstall --no-deps ."
            )
        return []
    if cuda and not nvcc:
        sys.exit(
            "sslkernels: SSLKERNELS_CUDA=1, but nvcc was not found. Install the CUDA toolkit (>= 12.8 for all "
            "architectures), and put its bin directory on PATH or set CUDA_HOME."
        )
    sources = {}
    if cpu is not False:
        sources["cpu"] = sorted(map(str, Path("csrc/cpu").glob("*.cpp")))
    if cuda is not False and nvcc:
        sources["cuda"] = sorted(map(str, Path("csrc/cuda").glob("*.cu")))
    return [Extension(f"sslkernels.lib.libsslkernels_{device}", files) for device, files in sources.items() if files]


def cuda_architectures(nvcc: str) -> list[str]:
    """Machine code for each architecture that this nvcc knows, and PTX of the last for what comes later."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
    chosen = [arch for arch in CUDA_ARCHITECTURES if f"compute_{arch}" in known]
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in chosen]
    return [*codes, f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}"]


def steps_for(extension: Extension, torch: Path, compiler: list[str]) -> list[Step]:
    """The compile steps of one library, then its link step."""
    nvcc = find_nvcc() or "" if extension.name.endswith("_cuda") else ""
    warnings = ["-Wall", "-Wextra", *(["-Werror"] if os.environ.get("SSLKERNELS_WERROR") == "1" else [])]
    hidden = ["-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", f"-fmacro-prefix-map={torch}/include/="]
    common = ["-O3", "-std=c++17", f"-DTORCH_TARGET_VERSION={TARGET}", "-Icsrc", "-isystem", f"{torch}/include"]
    # libstdc++ first: torch's libraries export copies of some of its templates, which must not become dependencies.
    libraries = ["-lstdc++", f"-L{torch}/lib", "-ltorch_cpu", "-lc10"]
    linker = ["--as-needed", "--no-undefined", "--exclude-libs=ALL"]
    steps = []
    if nvcc:
        stub, source = BUILD / "stub/libtorch_cuda.so", BUILD / "stub/libtorch_cuda.c"
        source.parent.mkdir(parents=True, exist_ok=True)
        write_if_changed(source, "".join(f"void {name}(void) {{}}\n" for name in CUDA_SHIM))
        command = [*compiler, "-shared", "-fPIC", "-x", "c", "-Wl,-soname,libtorch_cuda.so"]
        steps.append(Step(stub, [source], [*command, str(source), "-o", str(stub)]))
        host = ",".join([*warnings, *hidden])
        strict = ["-Werror=all-warnings"] if "-Werror" in warnings else []
        compile_ = [
            nvcc,
            "-ccbin",
            compiler[0],
            "-DUSE_CUDA",
            *common,
            *cuda_architectures(nvcc),
            "--threads=0",
            *strict,
        ]
        compile_ += [f"-Xcompiler={host}", "-MD"]
        link = [nvcc, "-ccbin", compiler[0], "-shared", "--no-device-link", *(f"-Xlinker={flag}" for flag in linker)]
        libraries = [libraries[0], f"-L{stub.parent}", "-ltorch_cuda", *libraries[1:]]
    else:
        # -fno-math-errno and -fno-trapping-math let loops vectorise and change no value; -ffast-math would.
        math = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
        compile_ = [*compiler, *common, *math, *hidden, *warnings, "-MMD"]
        link = [*compiler, "-shared", *(f"-Wl,{flag}" for flag in linker)]
    objects = []
    for source in map(Path, extension.sources):
        output = BUILD / source.with_suffix(source.suffix + ".o")
        command = [*compile_, "-MF", f"{output}.d", "-c", str(source), "-o", str(output)]
        steps.append(Step(output, [source], command, depfile=True))
        objects.append(output)
    output = BUILD / f"{extension.name.rpartition('.')[2]}.so"
    needed = objects + [step.output for step in steps if step.output.suffix == ".so"]
    steps.append(Step(output, needed, [*link, *map(str, objects), *libraries, "-o", str(output)]))
    return steps


def write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def find_ninja() -> str | None:
    if importlib.util.find_spec("ninja"):  # a pip-installed ninja may lie outside PATH
        import ninja

        return str(Path(ninja.BIN_DIR, "ninja"))
    return shutil.which("ninja")


def run_steps(steps: list[Step]) -> None:
    """Bring every output up to date: by ninja, which recompiles only what changed, or else all of it, in threads."""
    for step in steps:
        step.output.parent.mkdir(parents=True, exist_ok=True)
    ninja = find_ninja()
    if ninja:
        lines = [
            f"builddir = {BUILD}",
            "rule link",
            "  command = $cmd",
            "rule compile",
            "  command = $cmd",
            "  deps = gcc",
            "  depfile = $out.d",
        ]
        for step in steps:
            paths = [re.sub(r"([$ :])", r"$\1", str(path)) for path in (step.output, *step.inputs)]
            lines.append(f"build {paths[0]}: {'compile' if step.depfile else 'link'} {' '.join(paths[1:])}")
            lines.append(f"  cmd = {shlex.join(step.command).replace('$', '$$')}")
        write_if_changed(BUILD / "build.ninja", "\n".join(lines) + "\n")
        subprocess.run([ninja, "-f", str(BUILD / "build.ninja")], check=True)
        return
    links = [step for step in steps if len(step.inputs) != 1 or step.output.parent == BUILD]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda step: subprocess.run(step.command, check=True), [s for s in steps if s not in links]))
        list(pool.map(lambda step: subprocess.run(step.command, check=True), links))


class BuildKernels(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"  # no interpreter tag: these are no Python modules

    def build_extensions(self) -> None:
        torch, compiler = find_torch(), find_compiler()
        steps = [step for extension in self.extensions for step in steps_for(extension, torch, compiler)]
        try:
            run_steps(steps)
        except subprocess.CalledProcessError:
            sys.exit(
                "sslkernels: the kernels did not compile (see above). SSLKERNELS_CPU=0 or SSLKERNELS_CUDA=0 skips them."
            )
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(BUILD / target.name), str(target))


class BuildPython(build_py):
    def run(self) -> None:
        for note in NOTES:
            print(f"sslkernels: warning: {note}", file=sys.stderr)
        super().run()


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]  # any Python: the libraries have no Python symbol


if __name__ == "__main__":
    os.chdir(ROOT)
    setup(
        ext_modules=choose_libraries(),
        cmdclass={"build_ext": BuildKernels, "build_py": BuildPython, "bdist_wheel": Wheel},
    )
