"""Compiles the kernel libraries with whatever compilers the machine has. Knows neither torch nor the rest of the package.

``setup.py`` and ``python -m megatron_rema.kernels.build`` use it. Both libraries have a plain C interface, so that one binary serves every
Python and every torch; nothing is ever compiled while a run is going on.

Environment: MEGATRON_REMA_KERNELS  auto (default: what can be built is built, the rest is said), cpu, cuda (a failure is an error), none
             MEGATRON_REMA_CUDA_ARCHS  compute capabilities, "80;90;100" by default; machine code for each, PTX of the last for later ones
             CXX, CUDA_HOME  compilers other than the first one found
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "csrc"
LIBRARIES = Path(__file__).resolve().parent / "lib"
DEFAULT_ARCHS = "80;90;100"
COMMON = ["-std=c++17", "-O3"]
# Not -ffast-math: NaN and infinity have a meaning here. OpenMP's threads are optional, its vector loops are not.
CPU_FLAGS = [*COMMON, "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-fvisibility=hidden"]
CUDA_FLAGS = [*COMMON, "-Xcompiler=-fPIC,-fvisibility=hidden", "-shared", "-cudart=static", "--threads=0"]


class BuildError(RuntimeError):
    """A library that was asked for by name could not be built."""


def file_name(kind: str) -> str:
    return f"librema_{kind}.so"


def sources_hash(sources: Path = SOURCES) -> str:
    """Of what both libraries are made from: a library of other sources is stale and is not loaded."""
    digest = hashlib.sha256()
    for path in sorted(sources.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def find_cxx() -> str | None:
    return os.environ.get("CXX") or next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)


def find_nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and os.access(Path(home, "bin", "nvcc"), os.X_OK):
            return str(Path(home, "bin", "nvcc"))
    return shutil.which("nvcc")


def archs() -> list[str]:
    listed = [arch.strip() for arch in os.environ.get("MEGATRON_REMA_CUDA_ARCHS", DEFAULT_ARCHS).split(";") if arch.strip()]
    if not listed or not all(arch.rstrip("af").isdigit() for arch in listed):
        raise BuildError(f"MEGATRON_REMA_CUDA_ARCHS is {';'.join(listed)!r}; write compute capabilities like {DEFAULT_ARCHS!r}.")
    return listed


def _define(target: str) -> str:
    return f'-DREMA_BUILD="sources={sources_hash()};target={target}"'


def cpu_commands(cxx: str, out: Path) -> list[list[str]]:
    """In order of preference: with threads, and without for a compiler that has no OpenMP library."""
    tail = [str(SOURCES / "cpu.cpp"), "-o", str(out)]
    return [
        [cxx, *CPU_FLAGS, flag, _define(f"{Path(cxx).name} {how}"), *tail]
        for flag, how in (("-fopenmp", "OpenMP"), ("-fopenmp-simd", "one thread"))
    ]


def cuda_commands(nvcc: str, out: Path) -> list[list[str]]:
    listed = archs()
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in listed]
    code.append(f"-gencode=arch=compute_{listed[-1]},code=compute_{listed[-1]}")
    target = " ".join([*(f"sm_{arch}" for arch in listed), f"compute_{listed[-1]}"])
    return [[nvcc, *CUDA_FLAGS, *code, _define(target), str(SOURCES / "cuda.cu"), "-o", str(out)]]


def _compile(kind: str, commands: list[list[str]], folder: Path) -> None:
    """Into a file beside it first: a process that has the old library open keeps it, and a failure leaves nothing behind."""
    said = []
    for command in commands:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch, file_name(kind))
            command = [*command[:-1], str(made)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode == 0:
                made.replace(folder / file_name(kind))
                return
            said.append(f"{' '.join(command)}\n{result.stderr.strip()}")
    raise BuildError("\n".join(said))


def build(folder: Path = LIBRARIES, want: str | None = None) -> dict[str, str]:
    """Libraries in ``folder``, made anew. Returns kind -> "built" or why not. Raises BuildError for a kind asked for by name."""
    want = want or os.environ.get("MEGATRON_REMA_KERNELS", "auto")
    if want not in ("auto", "cpu", "cuda", "none"):
        raise BuildError(f"MEGATRON_REMA_KERNELS is {want!r}; it must be auto, cpu, cuda or none.")
    shutil.rmtree(folder, ignore_errors=True)  # pip keeps its build folder: a library of another build would be packed with this one
    results = {}
    for kind, find, commands, missing in (
        ("cpu", find_cxx, cpu_commands, "no C++ compiler (CXX, g++, clang++, c++)"),
        (
            "cuda",
            find_nvcc,
            cuda_commands,
            "no nvcc (CUDA_HOME, CUDA_PATH, /usr/local/cuda, PATH): install the CUDA toolkit and build again",
        ),
    ):
        if want == "none" or (want == "cpu" and kind == "cuda"):
            results[kind] = "not asked for"
            continue
        compiler = find()
        try:
            if compiler is None:
                raise BuildError(missing)
            folder.mkdir(parents=True, exist_ok=True)
            _compile(kind, commands(compiler, folder / file_name(kind)), folder)
            results[kind] = "built"
        except BuildError as error:
            if want == kind:
                raise
            results[kind] = str(error)
    return results


def main() -> None:
    try:
        results = build()
    except BuildError as error:
        sys.exit(f"error: {error}")
    for kind, result in results.items():
        print(f"kernels: {kind}: {result}", flush=True)


if __name__ == "__main__":
    main()
