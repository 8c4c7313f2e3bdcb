"""Writes the arith task: problems, cold-start dialogues with planted imperfections, and a model folder with config and tokenizer.

python tools/make_arith.py data/arith
"""

import argparse
import json
import sys
from dataclasses import asdict

from megatron_rema.tasks.arith import COLD_START_LEVELS, PLANTED, Imperfections, write_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("out_dir", help="folder to write; must not exist or be empty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-train", type=int, default=2000, help="problems to train on")
    parser.add_argument("--num-heldout", type=int, default=200, help="problems of the same levels that no other file holds")
    parser.add_argument("--num-ood", type=int, default=200, help="harder problems")
    parser.add_argument("--num-dialogues", type=int, default=10000, help="written dialogues of the cold start")
    parser.add_argument("--num-pairs", type=int, default=30000, help="preference pairs for train_reward_model")
    parser.add_argument(
        "--num-heldout-pairs",
        type=int,
        default=1000,
        help="preference pairs about held-out problems, with the imperfections of the dialogues",
    )
    parser.add_argument("--levels", type=int, nargs="+", default=[2, 3], help="operations per problem, train and held-out")
    parser.add_argument("--ood-levels", type=int, nargs="+", default=[4], help="operations per harder problem")
    parser.add_argument(
        "--cold-start-levels", type=int, nargs="+", default=COLD_START_LEVELS, help="operations per written dialogue, in turn"
    )
    for name, rate in asdict(PLANTED).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=rate, help="rate of this planted imperfection")
    arguments = vars(parser.parse_args())
    out_dir = arguments.pop("out_dir")
    try:
        imperfections = Imperfections(**{name: arguments.pop(name) for name in asdict(PLANTED)})
        manifest = write_task(out_dir, imperfections=imperfections, **arguments)
    except ValueError as error:
        sys.exit(f"make_arith: {error}")
    print(json.dumps(manifest, indent=2))
    print(f"written: {out_dir}")


if __name__ == "__main__":
    main()
