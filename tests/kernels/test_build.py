"""What is compiled, what is loaded, and what a user is told when something is missing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from megatron_rema.config import ConfigError
from megatron_rema.kernels import build, library

CPU = torch.device("cpu")


@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_the_cuda_source_compiles_for_every_architecture(arch, tmp_path, monkeypatch):
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc here")
    monkeypatch.setenv("MEGATRON_REMA_CUDA_ARCHS", arch)
    (command,) = build.cuda_commands(nvcc, tmp_path / "librema_cuda.so")
    result = subprocess.run([*command, "-Werror=all-warnings"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded = library.Library(tmp_path / "librema_cuda.so")  # loads without a driver
    assert loaded.build["target"] == f"sm_{arch} compute_{arch}"


def test_a_machine_without_compilers_builds_nothing_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "find_cxx", lambda: None)
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "librema_cpu.so").write_text("of an older build")
    results = build.build(tmp_path / "lib", "auto")
    assert "no C++ compiler" in results["cpu"] and "no nvcc" in results["cuda"]
    assert not (tmp_path / "lib").exists(), "a library of an older build must not be packed"
    with pytest.raises(build.BuildError, match="no nvcc"):
        build.build(tmp_path / "lib", "cuda")
    with pytest.raises(build.BuildError, match="must be auto, cpu, cuda or none"):
        build.build(tmp_path / "lib", "gpu")


def test_a_compiler_that_fails_leaves_the_library_out_unless_it_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "find_cxx", lambda: "false")
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert "false -std=c++17" in build.build(tmp_path / "lib", "auto")["cpu"]
    assert list((tmp_path / "lib").iterdir()) == []
    with pytest.raises(build.BuildError, match="false -std"):
        build.build(tmp_path / "lib", "cpu")


def test_bad_architectures_are_refused(monkeypatch):
    monkeypatch.setenv("MEGATRON_REMA_CUDA_ARCHS", "hopper")
    with pytest.raises(build.BuildError, match="'hopper'; write compute capabilities"):
        build.archs()


def test_building_needs_neither_torch_nor_the_package():
    code = f"import runpy, sys; runpy.run_path({str(build.__file__)!r}); print('torch' in sys.modules, 'megatron_rema' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_a_library_of_other_sources_is_stale(tmp_path, libraries, monkeypatch):
    path = tmp_path / "librema_cpu.so"
    path.symlink_to(libraries["cpu"].path)
    library.Library(path)
    monkeypatch.setattr(library, "sources_hash", lambda: "another")
    with pytest.raises(library.Unavailable, match="older than its sources: build them with"):
        library.Library(path)


def test_missing_libraries_auto_goes_on_in_plain_torch_and_fused_refuses(monkeypatch):
    monkeypatch.setattr(library, "_found", {"cpu": library.Unavailable("librema_cpu.so has not been built: do so")})
    monkeypatch.setattr(library, "_mode", "reference")
    assert library.select("auto", CPU) == "kernels: cpu plain torch (librema_cpu.so has not been built: do so)"
    assert not library.is_fused(torch.zeros(1))
    with pytest.raises(ConfigError, match=r"kernels is fused, and librema_cpu.so has not been built: do so, or set kernels=auto"):
        library.select("fused", CPU)
    with library.using("fused"), pytest.raises(RuntimeError, match="no fused kernels for tensors on cpu"):
        library.is_fused(torch.zeros(1))


def test_the_choice_is_said_once_and_reference_ignores_libraries(monkeypatch, libraries):
    monkeypatch.setattr(library, "_found", {"cpu": libraries["cpu"]})
    monkeypatch.setattr(library, "_mode", "reference")
    assert library.select("fused", CPU).startswith("kernels: cpu fused (")
    assert library.is_fused(torch.zeros(1))
    assert library.select("reference", CPU) == "kernels: plain torch (kernels=reference)"
    assert not library.is_fused(torch.zeros(1))


def test_an_unknown_dtype_is_an_error_with_its_name(on_cpu):
    with pytest.raises(RuntimeError, match="rema_logits_partial failed with code 1: unknown dtype"):
        labels_T = torch.zeros(1, dtype=torch.long)
        library.get(CPU).call("rema_logits_partial", CPU, labels_T, None, 7, 1, 1, 1, 0, labels_T, 0, 1.0, torch.empty(4))


def test_the_command_prints_what_there_is():
    result = subprocess.run([sys.executable, "-m", "megatron_rema.kernels"], capture_output=True, text=True, check=True, env=os.environ)
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["cpu", "cuda", "GPU", "compilers", "machine", "sources"]
