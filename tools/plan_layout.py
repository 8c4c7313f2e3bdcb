"""Which layouts of a pair of agents fit on a cluster, and how long a step would take: a plan before a single GPU is rented.

    python tools/plan_layout.py --model qwen2.5-32b --gpus 64                      the fastest layouts, memory phase by phase
    python tools/plan_layout.py --model qwen2.5-7b qwen2.5-32b llama-3.3-70b --gpus 8 64 512      the best of each
    python tools/plan_layout.py --model llama-3.3-70b --gpus 16 --why "t8 p2 sp"   what does not fit, and what would help

Memory is counted from shapes and held against the allocator on CPU (docs/planning.md has the errors); times rest on the assumptions that
--assumptions lists, and no GPU has been timed. A layout's words: t tensor, p pipeline, v virtual stages, sp sequence parallel, zero1
distributed optimizer, recompute, offload, mb microbatch tokens, chunk logits chunk tokens, e engine tensor, kv GiB of cache per agent.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from megatron_rema.config import LayoutConfig, ParallelConfig
from megatron_rema.planning.advice import advice, explain_why
from megatron_rema.planning.batch import BatchShape
from megatron_rema.planning.hardware import GIB, GPUS, WHERE, Assumptions, Cluster, with_settings
from megatron_rema.planning.job import PHASES, Agent, EngineShape, Job
from megatron_rema.planning.memory import total
from megatron_rema.planning.search import Plan, price, search, with_label
from megatron_rema.planning.shapes import BUILT_IN, architecture


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = made.add_argument_group("models")
    names = ", ".join(BUILT_IN)
    models.add_argument("--model", nargs="+", required=True, metavar="NAME", help=f"of every agent: {names}, or a folder with config.json")
    models.add_argument("--agents", type=int, default=2, help="sets of weights; 1: both roles share one (default: %(default)s)")
    models.add_argument("--critic", action="store_true", help="each agent has a critic (PPO)")
    models.add_argument("--reference", choices=["none", "k3", "exact"], default="none", help="KL to a frozen copy (default: %(default)s)")
    models.add_argument("--reward-model", metavar="NAME", help="a reward model of this shape")
    models.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    machines = made.add_argument_group("machines")
    machines.add_argument("--gpu", choices=sorted(GPUS), default="h100")
    machines.add_argument("--gpus", type=int, nargs="+", required=True, help="how many, all nodes together; several: one line for each")
    machines.add_argument("--gpus-per-node", type=int, default=8)
    machines.add_argument("--gpu-memory-gib", type=float, help="instead of the device's own")
    machines.add_argument("--intra-node-gb-per-s", type=float, help="one direction, instead of the device's own")
    machines.add_argument("--inter-node-gb-per-s", type=float, help="one direction and GPU, instead of the device's own")
    machines.add_argument("--node-memory-gib", type=float, default=2048.0, help="host memory of a node (default: %(default)g)")
    batch = made.add_argument_group("batch")
    for name, default, words in (
        ("prompts", 128, "per step"),
        ("episodes", 8, "per prompt"),
        ("rounds", 3, "turns of each role per episode"),
        ("turn-tokens", 2048, "at most"),
        ("episode-tokens", 8192, "at most, of all turns"),
        ("context-tokens", 8192, "at most, problem and answers included"),
        ("minibatches", 1, "optimizer steps per rollout"),
        ("max-num-seqs", 256, "of an engine"),
    ):
        batch.add_argument(f"--{name}", type=int, default=default, help=f"{words} (default: %(default)s)")
    made.add_argument("--assume", nargs="+", default=[], metavar="NAME=VALUE", help="replace assumptions")
    made.add_argument("--assumptions", action="store_true", help="list assumptions, device figures and where they come from, first")
    made.add_argument("--why", metavar="LAYOUT", help="price this layout: what fills each phase, and what would help")
    made.add_argument("--top", type=int, default=5, help="layouts to list (default: %(default)s)")
    made.add_argument("--json", action="store_true", help="print JSON instead of text")
    return made


def job_of(arguments: argparse.Namespace, model: str) -> Job:
    if arguments.agents not in (1, 2):
        raise ValueError(f"--agents is {arguments.agents}; there are two roles, so 1 or 2 sets of weights: correct it.")
    arch = architecture(model)
    size = 4 if arguments.dtype == "float32" else 2
    batch = BatchShape(
        prompts=arguments.prompts,
        episodes_per_prompt=arguments.episodes,
        rounds=arguments.rounds,
        turn_tokens=arguments.turn_tokens,
        episode_tokens=arguments.episode_tokens,
        context_tokens=arguments.context_tokens,
        minibatches=arguments.minibatches,
        microbatch_tokens=arguments.context_tokens,
    )
    for name, value in {"prompts": batch.prompts, "episodes": batch.episodes_per_prompt, **vars(batch)}.items():
        if name.endswith(("tokens", "prompts", "episodes", "rounds", "minibatches")) and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1: correct it.")
    if arch.max_positions < batch.context_tokens:
        raise ValueError(f"--context-tokens ({batch.context_tokens}) exceeds the {arch.max_positions} positions of {model}: lower it.")
    names = ["shared"] if arguments.agents == 1 else ["meta_thinker", "reasoner"]
    return Job(
        agents={name: Agent(arch, roles=2 // len(names)) for name in names},
        parallel=ParallelConfig(actor=LayoutConfig()),
        engine=EngineShape(element_bytes=size, max_num_seqs=arguments.max_num_seqs),
        batch=batch,
        element_bytes=size,
        critic=arguments.critic,
        reference=arguments.reference != "none",
        exact_kl=arguments.reference == "exact",
        reward_model=architecture(arguments.reward_model).with_scalar_head(1) if arguments.reward_model else None,
        assumptions=with_settings(Assumptions(), dict(_setting(text) for text in arguments.assume)),
    )


def _setting(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ValueError(f"--assume {text!r} must be NAME=NUMBER: correct it.") from None


def cluster_of(arguments: argparse.Namespace, gpus: int) -> Cluster:
    gpu = GPUS[arguments.gpu]
    given = {
        "memory_gib": arguments.gpu_memory_gib,
        "intra_node_gb_per_s": arguments.intra_node_gb_per_s,
        "inter_node_gb_per_s": arguments.inter_node_gb_per_s,
    }
    for name, value in given.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}; it must be positive: correct it.")
    gpu = replace(gpu, **{name: value for name, value in given.items() if value is not None})
    return Cluster(gpu, gpus, arguments.gpus_per_node, arguments.node_memory_gib)


def show_assumptions(arguments: argparse.Namespace, assumptions: Assumptions) -> None:
    gpu = cluster_of(arguments, arguments.gpus[0]).gpu
    print(
        f"{gpu.name}: {gpu.memory_gib:g} GiB at {gpu.memory_gb_per_s:g} GB/s, {gpu.tflops:g} TFLOPS, {gpu.intra_node_gb_per_s:g} GB/s in a "
        f"node and {gpu.inter_node_gb_per_s:g} GB/s between nodes, one way ({gpu.source})"
    )
    for name, value in vars(assumptions).items():
        print(f"{name} = {value:g} ({WHERE[name]})")
    print()


_HEADER = (
    "model           | GPUs | step s | generate  score update   sync | GiB: generate  score update   sync | binding  | host GiB | layout"
)


def row(model: str, plan: Plan) -> str:
    seconds = " ".join(f"{plan.seconds[phase]:6.0f}" for phase in PHASES)
    held = " ".join(f"{total(plan.phases[phase]) / GIB:6.1f}" for phase in PHASES)
    ends = f"{plan.binding:8} | {plan.host_bytes / GIB:8.0f} | {plan.label}"
    return f"{model:15} | {plan.cluster.gpus:4} | {plan.step_seconds:6.0f} |   {seconds} |        {held} | {ends}"


def main() -> int:
    arguments = parser().parse_args()
    try:
        return _run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    jobs = {model: job_of(arguments, model) for model in arguments.model}
    clusters = [cluster_of(arguments, gpus) for gpus in arguments.gpus]
    if arguments.assumptions and not arguments.json:
        show_assumptions(arguments, next(iter(jobs.values())).assumptions)
    if not arguments.why and not arguments.json:
        print(_HEADER)
    several = len(jobs) * len(clusters) > 1
    found, all_fit = [], True
    for model, job in jobs.items():
        for cluster in clusters:
            if arguments.why:
                plan = price(with_label(job, arguments.why, cluster), cluster)
                all_fit &= plan.fits
                lines = explain_why(plan)
                plans: list[Plan] = [plan]
            else:
                fitting, nearest = search(job, cluster)
                all_fit &= bool(fitting)
                plans = fitting[: 1 if several else arguments.top] or ([nearest] if nearest else [])
                lines = [row(model, plan) for plan in plans] if fitting else _nothing_fits(model, cluster, nearest, brief=several)
            found += [{"model": model, **plan.as_json()} for plan in plans]
            if not arguments.json:
                print("\n".join(lines), flush=True)
    if arguments.json:
        print(json.dumps({"assumptions": vars(next(iter(jobs.values())).assumptions), "plans": found}, indent=1))
    return 0 if all_fit else 1


def _nothing_fits(model: str, cluster: Cluster, nearest: Plan | None, *, brief: bool) -> list[str]:
    if nearest is None:
        return [f"{model:15} | {cluster.gpus:4} | no cut of this model has {cluster.gpus} ranks"]
    if not brief:
        return [f"no layout fits; the nearest: {line}" if number == 0 else line for number, line in enumerate(explain_why(nearest))]
    over = max(nearest.peak - nearest.capacity, 0) / GIB
    text = f"{model:15} | {cluster.gpus:4} | none fits: {nearest.label} is {over:.0f} GiB over in {nearest.binding}"
    for change, after in advice(nearest)[:1]:
        text += f"; {change} {'would do' if after.fits else 'would help most'}"
    return [text]


if __name__ == "__main__":
    sys.exit(main())
