"""Prints what a folder of weights holds: Hugging Face, Megatron or training checkpoint. python tools/inspect_checkpoint.py FOLDER"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="Hugging Face folder, Megatron folder or RUN/checkpoints/step_NNNNNN")
    parser.add_argument("--only", metavar="TEXT", default="", help="only tensors whose name contains TEXT")
    arguments = parser.parse_args()

    from rich.console import Console
    from rich.table import Column, Table

    from megatron_rema.bridge.listing import list_folder

    try:
        listing = list_folder(arguments.folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [row for row in listing.rows if arguments.only in row.name]
    table = Table("name", "shape", "dtype", Column("bytes", justify="right"), "shard")
    for row in rows:
        table.add_row(row.name, " x ".join(map(str, row.shape)), row.dtype, f"{row.num_bytes:,}", row.shard)
    # a table that is piped must not be cut to 80 columns
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    about = "  ".join(f"{key} {value}" for key, value in listing.about.items())
    console.print(f"{listing.kind} {arguments.folder}  {about}", soft_wrap=True)
    console.print(table)
    console.print(f"{len(rows)} tensors, {sum(row.num_bytes for row in rows):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
