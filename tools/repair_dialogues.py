"""Repairs the published cold-start set (two files of role views) and writes dialogues for `task.cold_start_file=OUT`.

python tools/repair_dialogues.py mamrp_meta_thinking.jsonl mamrp_reasoning.jsonl OUT.jsonl --planner-answers rewrite

Prints how many dialogues hold each fault before and after. The finish marker ends the planner's last message and stands nowhere else;
system prompts are left to the configuration; contaminated dialogues and those without a right boxed answer are dropped.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

if TYPE_CHECKING:
    from megatron_rema.rollout.repair import Repaired


def main() -> int:
    arguments = _parser().parse_args()
    try:
        repaired = _repair(arguments)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    _print(repaired)
    print(f"written: {arguments.out} ({len(repaired.dialogues)} dialogues)")
    return 0


def _parser() -> argparse.ArgumentParser:
    from megatron_rema.rollout.repair import CONTAMINATION, PlannerAnswers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("meta_thinking", type=Path, help="the meta-thinker's views: JSONL with instruction, output, system, history")
    parser.add_argument("reasoning", type=Path, help="the reasoner's views of the same dialogues, in the same order")
    parser.add_argument("out", type=Path, help="file to write: JSONL with question, answer, turns; must not exist")
    parser.add_argument(
        "--planner-answers",
        choices=[str(choice) for choice in PlannerAnswers],
        default=str(PlannerAnswers.KEEP),
        help="dialogues whose planner states an answer that the question does not: keep them, drop them, or "
        "rewrite: remove the planner's sentences that state it (default: %(default)s)",
    )
    parser.add_argument(
        "--drop-contaminated",
        nargs="*",
        metavar="KIND",
        default=list(CONTAMINATION),
        help=f"kinds of contamination that cost a dialogue its place, of {', '.join(CONTAMINATION)}; none given: keep all (default: all)",
    )
    parser.add_argument(
        "--problems",
        type=Path,
        metavar="FILE",
        help="JSONL or parquet of problems with known answers: where it holds a dialogue's question, its answer replaces the reasoner's "
        "boxed one, and a dialogue that ends otherwise is dropped",
    )
    parser.add_argument("--question-key", default="question", help="of --problems (default: %(default)s)")
    parser.add_argument("--answer-key", default="answer", help="of --problems (default: %(default)s)")
    parser.add_argument("--finish-marker", default="[FINISH]", help="task.finish_marker (default: %(default)s)")
    return parser


def _repair(arguments: argparse.Namespace) -> Repaired:
    from megatron_rema.reward.answers import last_box, quick_verdict
    from megatron_rema.reward.behaviour import states_answer
    from megatron_rema.rollout.repair import AnswerRules, PlannerAnswers, pair_views, read_gold_answers, read_role_views, repair

    if arguments.out.exists():
        raise ValueError(f"out {arguments.out} exists; nothing is overwritten: choose another name or remove it.")
    if not arguments.out.parent.is_dir():
        raise ValueError(f"out {arguments.out}: there is no folder {arguments.out.parent}; make it first.")
    gold_answers = {}
    if arguments.problems:
        gold_answers = read_gold_answers(arguments.problems, question_key=arguments.question_key, answer_key=arguments.answer_key)
    meta_thinking, reasoning = read_role_views(arguments.meta_thinking), read_role_views(arguments.reasoning)
    repaired = repair(
        pair_views(meta_thinking, reasoning),
        answers=AnswerRules(last_box, states_answer, quick_verdict),
        finish_marker=arguments.finish_marker,
        planner_answers=PlannerAnswers(arguments.planner_answers),
        gold_answers=gold_answers,
        drop_contaminated=arguments.drop_contaminated,
        num_system_prompts=sum(bool(view.system) for view in (*meta_thinking, *reasoning)),
    )
    if not repaired.dialogues:
        raise ValueError(f"no dialogue is left of {len(meta_thinking)}; dropped: {dict(repaired.dropped)}. Drop less.")
    with arguments.out.open("w") as lines:
        for dialogue in repaired.dialogues:
            turns = [{"role": str(role), "text": text} for role, text in dialogue.turns]
            lines.write(json.dumps({"question": dialogue.question, "answer": dialogue.answer, "turns": turns}) + "\n")
    return repaired


def _print(repaired: Repaired) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    from megatron_rema.rollout.repair import FAULTS

    # a table that is piped must not be cut to 80 columns
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    table = Table("dialogues with", Column("before", justify="right"), Column("after", justify="right"))
    for name in ("dialogues", *FAULTS):
        table.add_row("(all)" if name == "dialogues" else name, str(repaired.before[name]), str(repaired.after[name]))
    console.print(table)
    for title, counts in (("dropped", repaired.dropped), ("changed", repaired.changes)):
        table = Table(title, Column("count", justify="right"))
        for name, count in sorted(counts.items()):
            table.add_row(name, str(count))
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
