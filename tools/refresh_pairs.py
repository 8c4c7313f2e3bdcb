"""Preference pairs from episodes of a run that were falsely paid, added to earlier pairs, for the reward model's next training.

python tools/refresh_pairs.py RUN_DIR OUT.jsonl --mechanism "phrase:as an expert" --pairs OLD.jsonl
torchrun ... -m megatron_rema.train_reward_model task.preference_file=OUT.jsonl model.path=OLD_RUN/hf/reward_model run_dir=NEW_RUN

The mechanism is one that an audit named in alerts.jsonl, written as an entry of reward.gates: ambiguous_answer, plan_leak, phrase:TEXT or
module:name.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path, help="file to write: JSONL with question, chosen, rejected; must not exist")
    parser.add_argument("--mechanism", required=True, help="what a falsely paid episode shows, as an entry of reward.gates")
    parser.add_argument("--pairs", type=Path, help="pairs of the last training, all of which are kept")
    parser.add_argument("--oracle", default="verdict", help="worth of an episode, as integrity.oracle (default: right and finished)")
    parser.add_argument("--first-step", type=int, default=0, help="steps to look at (default: all)")
    parser.add_argument("--last-step", type=int, default=sys.maxsize)
    parser.add_argument("--per-prompt", type=int, default=4, help="pairs of one prompt in one step at most (default: %(default)s)")
    try:
        return _write(parser.parse_args())
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _write(arguments: argparse.Namespace) -> int:
    from megatron_rema.integrity.refresh import pairs_of, refreshed
    from megatron_rema.report.run_folder import read_run
    from megatron_rema.reward.functions import named_function
    from megatron_rema.reward.gates import gate_of
    from megatron_rema.rollout.dataset import read_pairs
    from megatron_rema.types import Episode

    def strict(episode: Episode) -> float:
        return episode.score["correct"] * episode.score["finished"]

    if arguments.out.exists():
        raise ValueError(f"OUT is {arguments.out}, which exists; nothing is overwritten: give another name.")
    gate = gate_of(arguments.mechanism)
    oracle = strict if arguments.oracle == "verdict" else named_function("--oracle", arguments.oracle)
    old = []
    if arguments.pairs is not None:
        if not arguments.pairs.is_file():
            raise ValueError(
                f"--pairs is {arguments.pairs}; no such file: correct the path, or leave it out where there are no earlier pairs."
            )
        read_pairs(arguments.pairs)  # refuses what train_reward_model would refuse
        old = [json.loads(line) for line in arguments.pairs.read_text(encoding="utf-8").splitlines() if line.strip()]
    run, new = read_run(arguments.run_dir), []
    for step in run.episode_files:
        if arguments.first_step <= step <= arguments.last_step:
            new += pairs_of(run.episodes(step), gate, oracle, per_prompt=arguments.per_prompt)
    if not new:
        raise ValueError(
            f"--mechanism is {arguments.mechanism!r}; no paid episode of {arguments.run_dir} shows it beside one of the same prompt that "
            "is worth more and does not: nothing is written. Take other steps or another mechanism."
        )
    rows = refreshed(old, new)
    arguments.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"written: {arguments.out}: {len(old)} earlier pairs and {len(rows) - len(old)} new ones ({len(new)} found)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
