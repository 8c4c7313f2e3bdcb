"""Peak memory of the conversion tools on a random model of the shape of Llama 3.2 1B: python benchmarks/conversion_memory.py

Writes about 2.5 GB of random bfloat16 weights to a temporary folder (--folder chooses where; three copies of the model are on the disk at
most), converts them along every path, each in a process of its own, and prints each one's peak resident memory (ru_maxrss). Checks that
the way back gave the same bytes. Everything written is removed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "dtype": "bfloat16",
}
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write; the system's temporary folder when left out")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="conversion_memory_", dir=arguments.folder))
    try:
        measure(folder, {**CONFIG, "num_hidden_layers": arguments.layers})
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, config: dict) -> None:
    largest, total = apart(write_random_model, folder / "hf", config, 1 << 30)
    num_files = len(list((folder / "hf").glob("*.safetensors")))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; python {platform.python_version()}")
    print(f"model {total / MIB:,.0f} MiB in {num_files} files, largest tensor {largest / MIB:,.0f} MiB")
    print("| tool | peak MiB | above imports, MiB | s |\n|---|---|---|---|")
    hf, tp2_pp2, tp4, back = (str(folder / name) for name in ("hf", "tp2_pp2", "tp4", "back"))
    convert, inspect = ([sys.executable, str(ROOT / "tools" / f"{tool}_checkpoint.py")] for tool in ("convert", "inspect"))
    baseline, seconds = peak_mib([sys.executable, "-c", "import megatron_rema.bridge.convert"])
    print(f"| imports alone | {baseline:,.0f} | 0 | {seconds:.0f} |", flush=True)
    report("to-megatron TP2 PP2", [*convert, "to-megatron", hf, tp2_pp2, "--tensor", "2", "--pipeline", "2"], baseline)
    report("reshard to TP4 PP1", [*convert, "reshard", tp2_pp2, tp4, "--tensor", "4", "--pipeline", "1"], baseline)
    shutil.rmtree(tp2_pp2)
    report("to-hf, 512 MiB files", [*convert, "to-hf", tp4, back, "--max-shard-mib", "512"], baseline)
    shutil.rmtree(tp4)
    report("inspect", [*inspect, back], baseline)
    assert apart(same_tensors, folder / "hf", folder / "back"), "the round trip changed a tensor"
    print("the round trip is bitwise")


def report(name: str, command: list[str], baseline_mib: float) -> None:
    """Runs ``command`` and prints its row of the table."""
    peak, seconds = peak_mib(command)
    print(f"| {name} | {peak:,.0f} | {peak - baseline_mib:,.0f} | {seconds:.0f} |", flush=True)


def apart(function: Callable, *arguments: object) -> Any:
    """In a process of its own: a child's ru_maxrss begins at its parent's memory, so this process stays small."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def write_random_model(path: Path, config: dict, max_shard_bytes: int) -> tuple[int, int]:
    """Bytes of the largest tensor and of all of them."""
    import torch

    from megatron_rema.architecture import Architecture
    from megatron_rema.bridge.names import hf_shapes
    from megatron_rema.bridge.stream import TensorWriter

    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    shapes = hf_shapes(Architecture.from_pretrained(path))
    sizes = {name: torch.Size(shape).numel() * 2 for name, shape in shapes.items()}
    files: list[list[str]] = [[]]
    for name, size in sizes.items():
        if files[-1] and sum(sizes[held] for held in files[-1]) + size > max_shard_bytes:
            files.append([])
        files[-1].append(name)
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        with TensorWriter(path / file, {name: (torch.bfloat16, shapes[name]) for name in names}) as writer:
            for name in names:
                bits = torch.randint(0, 1 << 14, shapes[name], dtype=torch.int16, generator=generator)  # finite bfloat16 numbers
                writer.write(name, bits.view(torch.bfloat16))
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return max(sizes.values()), sum(sizes.values())


def peak_mib(command: list[str]) -> tuple[float, float]:
    """Peak resident memory of ``command`` and its seconds."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return usage.ru_maxrss / 1024, time.perf_counter() - begin


def same_tensors(left: Path, right: Path) -> bool:
    import torch

    from megatron_rema.bridge.stream import TensorFile

    files = [{name: file for file in map(TensorFile, path.glob("*.safetensors")) for name in file.tensors} for path in (left, right)]
    return files[0].keys() == files[1].keys() and all(
        torch.equal(file.read(name).view(torch.int16), files[1][name].read(name).view(torch.int16)) for name, file in files[0].items()
    )


if __name__ == "__main__":
    main()
