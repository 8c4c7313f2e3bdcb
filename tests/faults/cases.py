"""Which faults strike where: drawn case by case from the case's number, so that any one can be run again alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from tests.faults.injection import Point

STEPS = 4
SHARED = [
    f"trainer.steps={STEPS}",
    "trainer.checkpoint_every=1",
    "trainer.keep_checkpoints=2",
    "optimizer.lr=0.001",
]
RL = [
    "engine=transformers",  # in place of vLLM, whose start alone takes longer than a whole case
    "trainer.evaluate_every=2",
    "trainer.evaluation_problems=2",
    "trainer.minibatches_per_step=2",
    "rollout.prompts_per_step=4",
    "reward.verifier_processes=1",
    "reward.verifier_timeout_s=100",  # a verdict must not depend on how busy the machine is
]
SFT = ["trainer.global_batch_dialogues=8"]
_PPO = [
    "algorithm=ppo",
    "parallel.actor.tensor=2",
    "parallel.critic={tensor:1,pipeline:2,distributed_optimizer:true}",
    "critic.lr=0.002",
    "critic.warmup_steps=1",
]
ASYNCHRONOUS = "trainer.asynchronous_checkpoints=true"
LAYOUTS: dict[str, tuple[str, list[str]]] = {  # name -> front door and overrides, on two ranks
    "TP2": ("train", [*RL, "parallel.actor.tensor=2"]),
    "PP2": ("train", [*RL, "parallel.actor.pipeline=2"]),
    "DP2 ZeRO-1": ("train", [*RL, "parallel.actor.distributed_optimizer=true"]),
    "DP2": ("train", RL),
    "PPO TP2+PP2": ("train", [*RL, *_PPO]),
    "TP2 async": ("train", [*RL, "parallel.actor.tensor=2", ASYNCHRONOUS]),
    "PPO async": ("train", [*RL, *_PPO, ASYNCHRONOUS]),
    "sft TP2": ("sft", [*SFT, "parallel.actor.tensor=2"]),
    "sft DP2 async": ("sft", [*SFT, ASYNCHRONOUS]),
}
_RL_LAYOUTS = [name for name, (door, _) in LAYOUTS.items() if door == "train"]
_ONLY_RL = {"engines", "generate", "verify", "score", "sync", "episodes", "evaluate", "evaluation"}
_BEFORE_STEPS = ("preflight", "build", "restore", "engines")
_IN_STEPS = ("generate", "verify", "score", "update", "optimizer", "sync", "episodes", "metrics", "checkpoint")
_WRITING = ("restore", "episodes", "metrics", "evaluation", "disk", "export", "report")
DAMAGES = ("flipped byte", "truncated", "missing file", "missing manifest", "damaged manifest", "leftover partial", "torn pointer")

COUNTS = {  # fault -> cases of the full campaign
    "SIGKILL in a phase": 50,
    "SIGKILL in a checkpoint write": 26,
    "SIGKILL at a random moment": 12,
    "SIGKILL, nobody ends the others": 9,
    "SIGTERM": 10,
    "exception on one rank": 9,
    "exception on one rank, nobody ends the others": 9,
    "out of memory": 12,
    "full disk": 22,
    "read-only folder": 10,
    "damaged checkpoint": 14,
    "damaged data file": 7,
    "non-finite gradients once": 6,
    "non-finite gradients for good": 5,
    "verifier process": 8,
    "clock jump": 7,
}


@dataclass(frozen=True)
class Case:
    """One injected fault."""

    number: int
    fault: str
    layout: str
    point: Point
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        point, options = self.point, " ".join(f"{key}={value}" for key, value in self.options.items())
        where = f"{'after' if point.after else 'in'} {point.place}, call {point.call}, step {point.step}, rank {point.rank}"
        return f"{self.fault}: {self.layout}, {where} {options}".strip()


def short_suite() -> list[Case]:
    """One or two of every class, at two layouts: what CI pays for. Numbers from 1000."""
    sft, rl = "sft TP2", "TP2"
    chosen = [
        ("SIGKILL in a phase", rl, Point("sync", 3, 0), {}),
        ("SIGKILL in a checkpoint write", sft, Point("disk", 3, 0, 9), {}),
        ("SIGKILL in a phase", sft, Point("export", STEPS, 0, after=True), {}),
        ("SIGTERM", sft, Point("optimizer", 2, 1), {}),
        ("exception on one rank, nobody ends the others", sft, Point("update", 3, 1), {}),
        ("out of memory", rl, Point("generate", 3, 1, 5), {"kind": "host", "supervised": False}),
        ("full disk", sft, Point("disk", 2, 0, 3), {"spare_pages": 5}),
        ("full disk", sft, Point("export", STEPS, 0), {"spare_pages": 0}),
        ("read-only folder", sft, Point("metrics", 3, 0), {}),
        ("damaged checkpoint", sft, Point("start", 0, 0), {"damage": "flipped byte"}),
        ("damaged data file", sft, Point("start", 0, 0), {"damage": "rows gone"}),
        ("non-finite gradients for good", sft, Point("update", 2, 1), {"value": "nan"}),
        ("verifier process", rl, Point("generate", 2, 0), {"what": "forks"}),
        ("clock jump", sft, Point("update", 2, 0), {"hours": -3}),
    ]
    return [Case(1000 + number, *rest) for number, rest in enumerate(chosen)]


def all_cases() -> list[Case]:
    """The full campaign, the faults mixed: whatever part of it was run has seen every kind."""
    faults = [fault for fault, count in COUNTS.items() for _ in range(count)]
    random.Random("order of faults").shuffle(faults)
    return [draw(number, fault) for number, fault in enumerate(faults)]


def draw(number: int, fault: str) -> Case:
    rng = random.Random(f"{number} {fault}")
    layout = rng.choice(list(LAYOUTS))
    rank = rng.randrange(2)
    options: dict[str, Any] = {}
    if fault in ("full disk", "read-only folder"):
        place = rng.choice(_WRITING)
        options = {"spare_pages": rng.choice([0, 0, 1, 2, 5, 20, 60])} if fault == "full disk" else {}
    elif fault == "SIGKILL in a checkpoint write":
        place = "disk"
    elif fault == "out of memory":
        place = rng.choice(["generate", "generate", "generate", "score", "update"])
        options = {"kind": rng.choice(["host", "device", "python"]), "supervised": rng.random() < 0.5}
    elif fault.startswith("non-finite"):
        place = "update"
        options = {"value": rng.choice(["nan", "inf"])}
    elif fault == "verifier process":
        place = rng.choice(["generate", "verify"])
        options = {"what": rng.choice(["killed", "stopped", "hangs", "dies", "forks"])}
    elif fault == "damaged checkpoint":
        place, options = "start", {"damage": DAMAGES[number % len(DAMAGES)]}
    elif fault == "damaged data file":
        place, options = "start", {"damage": rng.choice(["torn row", "rows gone", "while it runs"])}
    elif fault == "SIGKILL at a random moment":
        place, options = "any", {"after_s": round(rng.uniform(0.2, 7.0), 2)}
    elif fault == "clock jump":
        place = rng.choice(["build", *_IN_STEPS, "report"])
        options = {"hours": rng.choice([-30, -3, -1, 1, 5, 100])}
    else:
        place = rng.choice([*_BEFORE_STEPS, *_IN_STEPS, *_IN_STEPS, "evaluate", "export", "report"])
    if place in _ONLY_RL or fault in ("verifier process", "damaged data file"):
        layout = rng.choice(_RL_LAYOUTS)
    if place in ("episodes", "report") or fault in ("full disk", "read-only folder"):
        rank = 0  # the one that writes
    if place == "disk" and "DP2" in layout:
        rank = 0  # of replicas only the first writes
    if fault.startswith("non-finite") and "PP2" in layout:
        rank = 1  # the loss lives on the last stage
    step = {
        "evaluate": rng.choice([0, 2, 4]),
        "evaluation": rng.choice([0, 2, 4]),
        "export": STEPS,
        "report": STEPS,
        **dict.fromkeys(_BEFORE_STEPS, 0),
        **dict.fromkeys(("start", "any"), 0),
    }.get(place, rng.randint(2, STEPS) if fault.startswith(("non-finite", "verifier")) else rng.randint(1, STEPS))
    calls = {"generate": 12, "disk": 18 if rank == 0 else 1, "update": 2, "optimizer": 2}.get(place, 1)
    if fault in ("full disk", "read-only folder") and place == "disk":
        calls = 4
    if fault.startswith("verifier"):
        calls = 1
    after = place not in ("disk", "start", "any") and rng.random() < 0.4
    return Case(number, fault, layout, Point(place, step, rank, rng.randint(1, calls), after), options)
