"""Weights between Hugging Face and Megatron at any TP x PP, in one process, one tensor in memory at a time.

convert_checkpoint.py to-megatron HF OUT --tensor 2 --pipeline 2
convert_checkpoint.py to-hf IN OUT
convert_checkpoint.py reshard IN OUT --tensor 4 --pipeline 1
convert_checkpoint.py verify HF IN

IN is a Megatron folder (layout.json) or a training checkpoint (RUN/checkpoints/step_NNNNNN, with --config HF --model NAME).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

if TYPE_CHECKING:
    from megatron_rema.bridge.convert import Source


def main() -> int:
    arguments = _parser().parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)  # megatron-core on what is not installed
    try:
        return arguments.run(arguments)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, help: str, first: str, second: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        made.add_argument("first", metavar=first, type=Path)
        made.add_argument("second", metavar=second, type=Path)
        made.set_defaults(run=run)
        return made

    to_megatron = command("to-megatron", _to_megatron, "Hugging Face folder -> Megatron folder", "HF", "OUT")
    reshard = command("reshard", _to_megatron, "Megatron folder or training checkpoint -> Megatron folder at another TP x PP", "IN", "OUT")
    for made in (to_megatron, reshard):
        made.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks of OUT")
        made.add_argument("--pipeline", type=int, default=1, help="pipeline stages of OUT")
    to_hf = command("to-hf", _to_hf, "Megatron folder or training checkpoint -> Hugging Face folder", "IN", "OUT")
    to_hf.add_argument("--max-shard-mib", type=int, default=1024, help="largest safetensors file; one is held in memory")
    verify = command("verify", _verify, "logits of IN (by our models) beside those of HF (by transformers)", "HF", "IN")
    verify.add_argument("--sequences", type=int, default=4, help="random sequences to compare")
    verify.add_argument("--tokens", type=int, default=128, help="tokens of each")
    verify.add_argument("--seed", type=int, default=0, help="of the tokens")
    verify.add_argument("--tolerance", type=float, default=1e-4, help="largest difference allowed, relative to the largest logit")
    for made in (reshard, to_hf, verify):
        made.add_argument("--config", type=Path, metavar="HF", help="of a training checkpoint: the Hugging Face folder it was trained from")
        made.add_argument("--model", metavar="NAME", help="of a training checkpoint that holds several models: which")
    return parser


def _to_megatron(arguments: argparse.Namespace) -> int:
    from megatron_rema.bridge.convert import to_megatron_folder

    return _convert(arguments, to_megatron_folder, tensor=arguments.tensor, pipeline=arguments.pipeline)


def _to_hf(arguments: argparse.Namespace) -> int:
    from megatron_rema.bridge.convert import to_hf_folder

    return _convert(arguments, to_hf_folder, max_shard_bytes=arguments.max_shard_mib << 20)


def _convert(arguments: argparse.Namespace, write, **settings: int) -> int:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from megatron_rema.bridge.convert import num_bytes

    source = _open(arguments, arguments.first)
    total = num_bytes(source)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("reading", total=total)
        write(source, arguments.second, advance=lambda name, count: progress.update(task, advance=count, description=name), **settings)
        progress.update(task, description="done")
    print(f"{arguments.second}: {total:,} bytes of {source.arch.family} weights, {str(source.dtype).removeprefix('torch.')}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from megatron_rema.trainer.verify import compare_logits

    source = _open(arguments, arguments.second)
    found = compare_logits(arguments.first, source, num_sequences=arguments.sequences, num_tokens=arguments.tokens, seed=arguments.seed)
    allowed = arguments.tolerance * found.largest
    print(
        f"max difference {found.maximum:.3e} on {found.num_tokens} tokens (largest logit {found.largest:.3f}, allowed {allowed:.3e}); "
        f"same highest logit at {found.same_choice:.2%}"
    )
    if found.maximum <= allowed:
        return 0
    print(f"error: {arguments.second} is not the model of {arguments.first}", file=sys.stderr)
    return 1


def _open(arguments: argparse.Namespace, path: Path) -> Source:
    from megatron_rema.bridge.convert import open_source

    return open_source(path, config_dir=getattr(arguments, "config", None), model=getattr(arguments, "model", None))


if __name__ == "__main__":
    sys.exit(main())
