"""Plots and one self-contained HTML page from a run folder: python tools/report.py RUN [--out FILE]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run: holds metrics.jsonl or evaluations.jsonl")
    parser.add_argument("--out", type=Path, help="file to write; RUN/report.html when left out (plots go to RUN/plots/)")
    arguments = parser.parse_args()

    from megatron_rema.report.page import write_report

    try:
        print(write_report(arguments.run, arguments.out))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
