"""Every kernel test runs on the CPU library, on cuda.cu in an emulator, and (marked gpu) on a real CUDA device: ``device`` says where."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_rema.kernels import build
from megatron_rema.kernels.library import Library, using

EMULATOR = Path(__file__).parent / "cuda_emulator.h"


@pytest.fixture(scope="session")
def libraries(tmp_path_factory) -> dict[str, Library]:
    """The CPU library and the emulated CUDA one, compiled from the sources of this tree whatever is installed."""
    cxx = build.find_cxx()
    if cxx is None:
        pytest.skip("no C++ compiler here")
    folder = tmp_path_factory.mktemp("kernels")
    emulated = folder / "librema_emulated.so"
    warnings = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
    emulate = ["-x", "c++", "-include", str(EMULATOR), "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    commands = [
        [*build.cpu_commands(cxx, folder / build.file_name("cpu"))[0], *warnings],
        [
            cxx,
            "-std=c++17",
            "-O1",
            *warnings,
            *emulate,
            "-fPIC",
            "-shared",
            "-fvisibility=hidden",
            str(build.SOURCES / "cuda.cu"),
            "-o",
            str(emulated),
        ],
    ]
    for process, command in [(subprocess.Popen(command, stderr=subprocess.PIPE, text=True), command) for command in commands]:
        _, errors = process.communicate()
        assert process.returncode == 0, f"{' '.join(command)}\n{errors}"
    return {"cpu": Library(folder / build.file_name("cpu")), "emulator": Library(emulated, check_sources=False)}


@pytest.fixture(params=["cpu", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> Iterator[torch.device]:
    """Where tensors must lie; kernels are on (``fused``), so nothing can fall back to plain torch."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device here")
        with using("fused"):
            yield torch.device("cuda")
    else:
        with using("fused", cpu=request.getfixturevalue("libraries")[request.param]):
            yield torch.device("cpu")


@pytest.fixture
def on_cpu(libraries) -> Iterator[None]:
    """The CPU library alone, for what does not depend on the device."""
    with using("fused", cpu=libraries["cpu"]):
        yield
