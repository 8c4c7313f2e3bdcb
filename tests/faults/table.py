"""The campaign's cases as a table: ``python -m tests.faults.table CASES.jsonl ...``"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from statistics import median

from tests.faults.cases import COUNTS
from tests.faults.oracle import rows


def table(cases: list[dict]) -> str:
    """Markdown, a line a kind of fault."""
    lines = ["| fault | cases | wrong | what happened | s to the end of the job | s to resume | finished steps done again |"]
    lines.append("|---|---|---|---|---|---|---|")
    for fault in COUNTS:
        own = [case for case in cases if case["fault"] == fault]
        if not own:
            continue
        outcomes = Counter(case["outcome"] or "-" for case in own)
        happened = "; ".join(f"{outcome} ({count})" for outcome, count in outcomes.most_common())
        again = Counter(case["steps_again"] for case in own if case["steps_again"] is not None)
        lost = ", ".join(f"{steps} ({count})" for steps, count in sorted(again.items()))
        wrong = sum(bool(case["wrong"]) for case in own)
        lines.append(
            f"| {fault} | {len(own)} | {wrong} | {happened} | {_spread(own, 'detected_s')} | {_spread(own, 'resumed_s')} | {lost or '-'} |"
        )
    wrong = sum(bool(case["wrong"]) for case in cases)
    lines.append(f"| all | {len(cases)} | {wrong} | | {_spread(cases, 'detected_s')} | {_spread(cases, 'resumed_s')} | |")
    return "\n".join(lines)


def _spread(cases: list[dict], name: str) -> str:
    """Median and largest."""
    seconds = [case[name] for case in cases if case[name] is not None]
    return f"{median(seconds):.1f} ({max(seconds):.1f})" if seconds else "-"


if __name__ == "__main__":
    # a case that was run again counts as it ended last
    latest = {case["number"]: case for file in sys.argv[1:] for case in rows(Path(file))}
    print(table(list(latest.values())))
