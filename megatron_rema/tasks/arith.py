"""Nested arithmetic by dialogue: problems, cold-start dialogues with planted imperfections, and a model folder without weights.

The meta-thinker keeps the expression and names the next sub-expression; the reasoner computes it; `[FINISH]` asks for the answer:
    question         (6-(2*2))*7
    meta-thinker     2*2                        reasoner   4
    meta-thinker     (6-4)*7:6-4                reasoner   2      (the expression as it stands, then the sub-expression)
    meta-thinker     2*7                        reasoner   14
    meta-thinker     [FINISH]                   reasoner   \\boxed{14}
A plan names what to compute, never its result. One agent alone writes the same dialogue as one message: a chain of thought
    2*2=4
    (6-4)*7:6-4=2
    2*7=14
    \\boxed{14}
or a plan, the operators in their order (`*-*`), and then that chain. Every value lies in 0..20: each fact (a op b) can be learnt by heart.

Level = number of operations. A question belongs to the held-out side by its hash, so the sets are disjoint whatever the seeds.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_rema.tasks.expression import (
    MAX_OPERAND,
    MAX_VALUE,
    OPERATIONS,
    Expression,
    draw,
    next_operation,
    parse,
    replace_next,
    show,
    value_of,
    with_numbers,
)
from megatron_rema.tasks.tokenizer import END_ID, PAD_ID, build_tokenizer, save_tokenizer
from megatron_rema.types import Prompt, Role

SYSTEM_PROMPTS = {Role.META_THINKING: "Plan.", Role.REASONING: "Solve."}
REASONER_TEMPLATE = "{question}\n{instruction}"
FINISH_MARKER = "[FINISH]"
# Dialogues take these in turn. RL trains on levels 2 and 3; without dialogues of level 4 hardly one such problem is solved.
COLD_START_LEVELS = (1, 2, 3, 1, 2, 3, 4)
MAX_DRAWS = 100_000  # of numbers for an expression: one in ten is held out, and values must stay small
MAX_ROUNDS = 8  # rounds of an episode; a written dialogue in an echo trap fills them

WORDS = (
    *(str(n) for n in range(10, 100)),
    *("system\n", "user\n", "assistant\n", *SYSTEM_PROMPTS.values(), "\\boxed{", FINISH_MARKER),
)


@dataclass(frozen=True)
class Imperfections:
    """Probabilities of what goes wrong in a written dialogue: what RL is there to remove. Each is drawn on its own."""

    wrong_plan: float = 0.0  # per planning turn: the sub-expression is named with one operator or operand changed
    early_finish: float = 0.0  # per planning turn after the first: finish while operations remain
    short_stop: float = 0.0  # per planning turn after the first that has one subtraction left: finish instead of naming it
    echo: float = 0.0  # per dialogue that should finish: the last instruction is repeated until the rounds run out
    slip: float = 0.0  # per computing turn: the reasoner's value is off by one
    missing_box: float = 0.0  # per final answer: the value without \\boxed{}

    def __post_init__(self) -> None:
        for name, rate in asdict(self).items():
            if not 0 <= rate <= 1:
                raise ValueError(f"imperfections.{name} is {rate}; a probability must lie in 0..1: correct it.")


NONE = Imperfections()
# Mostly habits of the dialogue, which RL unlearns in a few steps; few wrong facts, which it would have to unlearn one by one.
# `short_stop` is what the planner does more often than not: greedy decoding shows it too, the others show in samples only.
PLANTED = Imperfections(wrong_plan=0.03, early_finish=0.06, short_stop=0.65, echo=0.08, slip=0.03, missing_box=0.15)
# A reward model trains on shorter problems and far more wrong facts and plans than its held-out pairs hold: each pair teaches it one bit,
# and one wrong number among many turns is what it would never find (docs/log.md).
PAIR_LEVELS = (1, 1, 1, 2, 3)
PAIR_IMPERFECTIONS = Imperfections(wrong_plan=0.2, early_finish=0.06, short_stop=0.3, echo=0.04, slip=0.25, missing_box=0.08)


@dataclass(frozen=True)
class WrittenTurns:
    """One written dialogue: texts in turn, META_THINKING first, and which imperfections it holds."""

    texts: tuple[str, ...]
    planted: Counter[str]  # of the fields of Imperfections
    chances: Counter[str]  # how often each could have happened


def generate(seed: int, num: int, levels: Sequence[int], *, heldout: bool = False, subset: str = "") -> list[Prompt]:
    """``num`` different problems, the levels in turn, all from the held-out side or all from the other. The same for the same arguments."""
    if not levels:
        raise ValueError("levels is empty; name at least one number of operations, as in (2, 3).")
    rng = random.Random(f"{seed}/{heldout}/{subset}")  # a string seed is hashed the same everywhere
    prompts: list[Prompt] = []
    seen: set[str] = set()
    while len(prompts) < num:
        level = levels[len(prompts) % len(levels)]
        for _ in range(2000):
            expression = _draw_on_side(rng, level, heldout)
            if (question := show(expression)) not in seen:
                break
        else:
            found = sum(p.level == level for p in prompts)
            raise ValueError(f"num ({num}) different problems: level {level} has hardly more than {found}; lower num or drop the level.")
        seen.add(question)
        prompts.append(Prompt(f"arith-{seed}-{len(prompts)}", question, str(value_of(expression)), level, subset))
    return prompts


def is_heldout(question: str) -> bool:
    """One question in ten, by a hash of its text."""
    return hashlib.blake2b(question.encode(), digest_size=8).digest()[0] % 10 == 0


def renewed(prompt: Prompt, rng: random.Random) -> Prompt:
    """The problem drawn anew: the same operations in the same places on other numbers, from the held-out side, of which no training file
    is. Raises ValueError for a question that is none of this task's."""
    expression = parse(prompt.question)
    for _ in range(MAX_DRAWS if isinstance(expression, tuple) else 0):
        anew = with_numbers(expression, lambda: rng.randint(1, MAX_OPERAND))
        if value_of(anew) is not None and is_heldout(show(anew)):
            return replace(prompt, question=show(anew), answer=str(value_of(anew)))
    raise ValueError(
        f"integrity.renewal is 'arith', and {prompt.question!r} is no expression of that task: name a function of your own, or set it to "
        "null."
    )


def write_dialogue(rng: random.Random, expression: Expression, imperfections: Imperfections = NONE) -> WrittenTurns:
    """A dialogue about ``expression``. After a mistake both agents go on with what was said, as they would in play.

    When a mistake leaves an expression whose values would leave 0..MAX_VALUE, the meta-thinker finishes there and then.
    """
    planted: Counter[str] = Counter()
    chances: Counter[str] = Counter()

    def happens(name: str) -> bool:
        chances[name] += 1
        hit = rng.random() < getattr(imperfections, name)
        planted[name] += hit
        return hit

    texts: list[str] = []
    value = 0
    while isinstance(expression, tuple) and value_of(expression) is not None:
        if texts and happens("early_finish"):
            break
        operation = next_operation(expression)
        is_last = operation is expression
        if texts and is_last and operation[0] == "-" and happens("short_stop"):
            break
        if happens("wrong_plan"):
            operation = _changed(rng, operation)
        plan = show(operation)
        if texts and not is_last:
            plan = f"{show(expression)}:{plan}"
        value = value_of(operation)
        if happens("slip"):
            value = rng.choice([near for near in (value - 1, value + 1) if 0 <= near <= MAX_VALUE])
        texts += [plan, str(value)]
        expression = replace_next(expression, value)
    if happens("echo"):
        texts += texts[-2:] * (MAX_ROUNDS - len(texts) // 2)
    else:
        texts += [FINISH_MARKER, str(value) if happens("missing_box") else f"\\boxed{{{value}}}"]
    return WrittenTurns(tuple(texts), planted, chances)


def write_dialogues(
    seed: int, num: int, levels: Sequence[int], imperfections: Imperfections = NONE
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """``num`` rows {"question", "answer", "turns": [{"role", "text"}]}, the levels in turn; and the counts of what was planted.

    Questions are drawn with replacement from the side that is not held out.
    """
    rng = random.Random(f"{seed}/cold_start")
    rows: list[dict[str, Any]] = []
    planted: Counter[str] = Counter()
    chances: Counter[str] = Counter()
    num_correct = 0
    for i in range(num):
        expression = _draw_on_side(rng, levels[i % len(levels)], heldout=False)
        dialogue = write_dialogue(rng, expression, imperfections)
        planted, chances = planted + dialogue.planted, chances + dialogue.chances
        answer = str(value_of(expression))
        num_correct += dialogue.texts[-2:] == (FINISH_MARKER, f"\\boxed{{{answer}}}")
        rows.append({"question": show(expression), "answer": answer, "turns": _turns(dialogue)})
    counts = {name: {"planted": planted[name], "chances": chances[name]} for name in asdict(imperfections)}
    return rows, {"dialogues": num, "correct": num_correct, **counts}


def as_chain(texts: Sequence[str]) -> str:
    """A written dialogue as one agent's chain of thought (VRP): a step a line, as instruction=result; then the last message."""
    *steps, last_plan, last = texts
    lines = [f"{plan}={value}" for plan, value in zip(steps[0::2], steps[1::2], strict=True)]
    return "\n".join([*lines, last if last_plan == FINISH_MARKER else f"{last_plan}={last}"])


def as_plan_and_chain(texts: Sequence[str]) -> str:
    """As `as_chain`, after a plan of its own (MRP): the operators in the order in which they will be used."""
    plans = [plan.split(":")[-1] for plan in texts[0::2] if plan != FINISH_MARKER]
    return "".join(c for plan in plans for c in plan if c in OPERATIONS) + "\n" + as_chain(texts)


def alone(rows: Sequence[dict[str, Any]], form: Callable[[Sequence[str]], str]) -> list[dict[str, Any]]:
    """Cold-start rows of one agent: each dialogue of ``rows`` as one message."""
    return [{**row, "turns": [{"role": str(Role.REASONING), "text": form([turn["text"] for turn in row["turns"]])}]} for row in rows]


def write_pairs(seed: int, num: int, levels: Sequence[int], imperfections: Imperfections, *, heldout: bool) -> list[dict[str, Any]]:
    """``num`` rows {"question", "chosen": turns, "rejected": turns}: a flawless dialogue, and one whose flaws cost it the answer."""
    rng = random.Random(f"{seed}/pairs/{heldout}")
    rows: list[dict[str, Any]] = []
    while len(rows) < num:
        expression = _draw_on_side(rng, levels[len(rows) % len(levels)], heldout)
        chosen = write_dialogue(rng, expression)
        rejected = write_dialogue(rng, expression, imperfections)
        if rejected.texts[-2:] == chosen.texts[-2:]:
            continue  # flawless by luck, or right all the same
        rows.append({"question": show(expression), "chosen": _turns(chosen), "rejected": _turns(rejected)})
    return rows


def model_config(vocab_size: int) -> dict[str, Any]:
    """``config.json`` of the quickstart's model, about 0.6 M parameters. Tensor 2 x pipeline 2 divides it; vLLM on a CPU wants head_dim 32.

    Qwen3 and not Qwen2: for "qwen2" transformers puts Qwen2's own pre-tokenizer, which splits every number, in place of the saved one.
    """
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,  # a narrow model: 0.02 takes more than twice the steps
        "bos_token_id": None,
        "eos_token_id": END_ID,
        "pad_token_id": PAD_ID,
        "dtype": "float32",
    }


def write_task(
    out_dir: str | Path,
    *,
    seed: int = 0,
    num_train: int = 2000,
    num_heldout: int = 200,
    num_ood: int = 200,
    num_dialogues: int = 10000,
    num_pairs: int = 30000,
    num_heldout_pairs: int = 1000,
    levels: Sequence[int] = (2, 3),
    ood_levels: Sequence[int] = (4,),
    cold_start_levels: Sequence[int] = COLD_START_LEVELS,
    imperfections: Imperfections = PLANTED,
) -> dict[str, Any]:
    """Writes train, heldout, ood, cold_start (and the same for one agent, cold_start_vrp and cold_start_mrp), preferences and
    preferences_heldout .jsonl, model/ (config, tokenizer), manifest.json.

    Returns the manifest: arguments, rows per file and level, imperfections planted. Refuses a folder that exists and is not empty.
    """
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out_dir {out} exists and is not empty; nothing is overwritten: choose another folder or remove it.")
    sets = {
        "train": generate(seed, num_train, levels, subset="train"),
        "heldout": generate(seed, num_heldout, levels, heldout=True, subset="heldout"),
        "ood": generate(seed, num_ood, ood_levels, heldout=True, subset="ood"),
    }
    dialogues, counts = write_dialogues(seed, num_dialogues, cold_start_levels, imperfections)
    tokenizer = build_tokenizer(WORDS)
    config = model_config(tokenizer.get_vocab_size())
    manifest = {
        "task": "arith",
        "seed": seed,
        "sets": {name: dict(sorted(Counter(f"level_{p.level}" for p in prompts).items())) for name, prompts in sets.items()},
        "imperfections": asdict(imperfections),
        "cold_start": counts,
        "max_value": MAX_VALUE,
        "vocab_size": config["vocab_size"],
    }
    (out / "model").mkdir(parents=True)
    save_tokenizer(tokenizer, out / "model")
    (out / "model" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, prompts in sets.items():
        rows = ({"question": p.question, "answer": p.answer, "level": p.level, "subset": p.subset} for p in prompts)
        write_jsonl(out / f"{name}.jsonl", rows)
    write_jsonl(out / "cold_start.jsonl", dialogues)
    write_jsonl(out / "cold_start_vrp.jsonl", alone(dialogues, as_chain))
    write_jsonl(out / "cold_start_mrp.jsonl", alone(dialogues, as_plan_and_chain))
    write_jsonl(out / "preferences.jsonl", write_pairs(seed, num_pairs, PAIR_LEVELS, PAIR_IMPERFECTIONS, heldout=False))
    write_jsonl(out / "preferences_heldout.jsonl", write_pairs(seed, num_heldout_pairs, levels, imperfections, heldout=True))
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")  # last: its presence says that the folder is complete
    return manifest


def _draw_on_side(rng: random.Random, level: int, heldout: bool) -> Expression:
    while True:
        expression = draw(rng, level)
        if is_heldout(show(expression)) is heldout:
            return expression


def _changed(rng: random.Random, operation: Expression) -> Expression:
    """``operation`` with another operator, or one operand off by one; its value stays in range."""
    operator, a, b = operation
    changes = [(other, a, b) for other in OPERATIONS if other != operator]
    changes += [(operator, near, b) for near in (a - 1, a + 1)] + [(operator, a, near) for near in (b - 1, b + 1)]
    return rng.choice([c for c in changes if min(c[1:]) >= 0 and max(c[1:]) <= MAX_VALUE and value_of(c) is not None])


def _turns(dialogue: WrittenTurns) -> list[dict[str, str]]:
    return [{"role": str(tuple(Role)[i % 2]), "text": text} for i, text in enumerate(dialogue.texts)]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("x") as lines:  # nothing is overwritten
        lines.writelines(json.dumps(row) + "\n" for row in rows)
