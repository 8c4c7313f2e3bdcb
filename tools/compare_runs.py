"""One table and one figure of several runs: python tools/compare_runs.py RUN_OR_SWEEP... [--out FOLDER]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN_OR_SWEEP", help="run folders; a sweep's folder stands for its runs")
    parser.add_argument("--out", type=Path, help="folder for comparison.md, .csv, .png and .svg; left out: the table is only printed")
    arguments = parser.parse_args()

    from rich.console import Console

    from megatron_rema.report.compare import rich_tables
    from megatron_rema.report.compare_figure import write_comparison
    from megatron_rema.sweep.comparison import comparison_of

    try:
        comparison, missing = comparison_of(arguments.folders)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    for table in rich_tables(comparison):
        console.print(table)
    if missing:
        print(f"nothing yet of {', '.join(missing)}")
    if arguments.out is not None:
        for file in write_comparison(comparison, arguments.out):
            print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
