"""Fused kernels beside plain torch, torch.compile and public implementations: time, memory, error.

    OMP_NUM_THREADS=2 python benchmarks/kernels.py [--rounds 9] [--device cpu] [--only advantages,policy,logits] [--slime PATH]

Every method of a table gets the same tensors and must first agree with float64, masks included (measure.py). Then they take turns, in an
order that flips every round: medians, and ratios within a round to the fused kernel (above 1: fused is faster) and to a copy of the bytes
that the kernel must move. Processor time (CPU) is the one that other jobs on the machine disturb less. Memory is the peak above what was
held before, gradients and other outputs included. Opponents that are not installed here have a row that says so (opponents.py).

All traces have the same length, so that packed [B * L] and padded [B, L] are the same memory and nobody pays for padding; about half of a
trace are observations, in gaps of uneven length. Statistics of groups (GRPO, RLOO) are over thousands of numbers and not timed.
Shapes: T label positions, V columns, B traces of L tokens.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from pathlib import Path

import opponents
import torch
from measure import Method, Outputs, Row, compare
from opponents import Absent
from torch import Tensor

from megatron_rema.algorithm import losses as plain_losses
from megatron_rema.kernels.advantage import gae, masked_whiten
from megatron_rema.kernels.library import select, using
from megatron_rema.kernels.policy import policy_loss
from megatron_rema.parallel.groups import Groups, build_groups
from megatron_rema.parallel.vocab import vocab_parallel_statistics
from megatron_rema.trainer.cast import process_group

DISCOUNT, LAMBDA = 0.99, 0.95  # of tokens and of turns: others know one level
CHECKED_ROWS = 256  # of the logits, evenly spaced: float64 of all of them would take longer than everything else
# Largest difference from float64 of what computes the same. bfloat16: verl also sums in it, and its values of 10 have a spacing of 0.06
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}


def attempt(make: Callable[[], Method]) -> Method | Absent:
    try:
        return make()
    except Absent as reason:
        return reason


def difference(values: Tensor, exact: Tensor) -> float:
    """The largest, relative where values exceed 1."""
    return ((values.double() - exact).abs().max() / exact.abs().max().clamp(min=1.0)).item()


# --- advantages -------------------------------------------------------------------------------------------------------


class Rollout:
    """Columns of B traces of L tokens, [B, L]: turns and observations of 16 to 111 tokens take turns."""

    def __init__(self, traces: int, length: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        sizes_BN = torch.randint(16, 112, (traces, length // 16 + 1), generator=generator)
        stretch_BL = torch.searchsorted(sizes_BN.cumsum(1), torch.arange(length).repeat(traces, 1), right=True)
        self.mask_BL = (stretch_BL % 2 == 1).to(device)
        first_B1 = torch.arange(traces)[:, None] * (length // 16 + 1)
        self.turn_ids_BL = torch.where(stretch_BL % 2 == 1, first_B1 + stretch_BL // 2, -1).to(device)
        self.trace_ids_BL = torch.arange(traces)[:, None].repeat(1, length).to(device)
        self.rewards_BL, self.values_BL, self.advantages_BL = torch.randn(3, traces, length, generator=generator).to(device).unbind()
        self.old_logprobs_BL = -torch.rand(traces, length, generator=generator).to(device) * 4
        self.logprobs_BL = self.old_logprobs_BL + 0.3 * torch.randn(traces, length, generator=generator).to(device)

    def ids(self) -> tuple[Tensor, Tensor, Tensor]:
        """Packed, [B * L]."""
        return self.turn_ids_BL.flatten(), self.trace_ids_BL.flatten(), self.mask_BL.flatten()


def looped_gae(rewards_BL: Tensor, values_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence of algorithm/gae.py token by token, one level: what all methods must compute. 0 where nothing is own."""
    advantages_BL = torch.zeros_like(values_BL)
    next_value_B = next_advantage_B = torch.zeros_like(values_BL[:, 0])
    for t in reversed(range(values_BL.shape[1])):
        own_B, value_B = mask_BL[:, t], values_BL[:, t]
        advantage_B = rewards_BL[:, t] + DISCOUNT * next_value_B - value_B + DISCOUNT * LAMBDA * next_advantage_B
        next_value_B, next_advantage_B = torch.where(own_B, value_B, next_value_B), torch.where(own_B, advantage_B, next_advantage_B)
        advantages_BL[:, t] = torch.where(own_B, advantage_B, 0.0)
    return advantages_BL, advantages_BL + torch.where(mask_BL, values_BL, 0.0)


def advantage_tables(traces: int, length: int, slime_path: Path | None, **run) -> dict[str, dict[str, Row]]:
    data = Rollout(traces, length, run["device"])
    mask_BL, float_mask_BL = data.mask_BL, data.mask_BL.float()
    packed = (data.rewards_BL.flatten(), data.values_BL.flatten(), *data.ids())
    levels = {"discount": DISCOUNT, "gae_lambda": LAMBDA, "turn_discount": DISCOUNT, "turn_lambda": LAMBDA}
    exact = looped_gae(data.rewards_BL.double(), data.values_BL.double(), mask_BL)
    own = exact[0][mask_BL]
    white_BL = torch.where(mask_BL, (exact[0] - own.mean()) / own.std(correction=0), 0.0)

    def error(outputs: Outputs) -> float:
        return max(difference(v.view_as(mask_BL) * mask_BL, e) for v, e in zip(outputs, exact, strict=True))

    def white_error(outputs: Outputs) -> float:
        return max(difference(v.view_as(mask_BL) * mask_BL, e) for v, e in zip(outputs, (white_BL, exact[1]), strict=True))

    def ours(mode: str, whitened: bool = False) -> Outputs:
        with using(mode):
            advantages_T, returns_T = gae(*packed, **levels)
            return (masked_whiten(advantages_T, packed[-1]) if whitened else advantages_T), returns_T

    def chunked(compiled: bool) -> Method:
        scan = opponents.slime(slime_path).chunked_gae
        scan = opponents.over_own_tokens(torch.compile(scan, dynamic=False) if compiled else scan)
        return Method(lambda _: scan(data.rewards_BL, data.values_BL, mask_BL, DISCOUNT, LAMBDA))

    def verl() -> Method:
        function = opponents.verl("verl.trainer.ppo.core_algos").compute_gae_advantage_return
        return Method(lambda _: function(data.rewards_BL, data.values_BL, float_mask_BL, DISCOUNT, LAMBDA))

    shape, tokens = f"{traces} x {length}", traces * length
    scan = compare(
        f"Generalised advantages and returns, {shape}",
        {
            "fused": Method(lambda _: ours("fused")),
            "algorithm/gae.py": Method(lambda _: ours("reference")),
            "torch, token by token": Method(lambda _: looped_gae(data.rewards_BL, data.values_BL, mask_BL)),
            "torch.compile": Absent("unrolls the loop over tokens: minutes for 256 of them"),
            "slime chunked_gae, gather and scatter": attempt(lambda: chunked(False)),
            "the same, scan under torch.compile": attempt(lambda: chunked(True)),
        },
        error,
        tolerance=1e-4,
        num_bytes=tokens * (4 + 4 + 8 + 8 + 1 + 4 + 4),  # rewards, values, turn ids, trace ids, mask; advantages, returns
        **run,
    )
    whitened = compare(
        f"Generalised advantages, whitened, and returns, {shape}",
        {
            "fused": Method(lambda _: ours("fused", whitened=True)),
            "algorithm/": Method(lambda _: ours("reference", whitened=True)),
            "verl compute_gae_advantage_return": attempt(verl),
        },
        white_error,
        tolerance=1e-4,
        num_bytes=tokens * (33 + 5 + 5 + 4),  # and advantages and mask twice: all moments come before the first whitened value
        **run,
    )
    return {f"scan {shape}": scan, f"whitened {shape}": whitened}


# --- policy loss ------------------------------------------------------------------------------------------------------


def policy_tables(traces: int, length: int, **run) -> dict[str, dict[str, Row]]:
    """Loss and its gradient, mean over own tokens, clip and dual clip; log ratios are not capped below verl's 20."""
    data = Rollout(traces, length, run["device"])
    turn_ids_T, trace_ids_T, mask_T = data.ids()
    turns_K, turn_ids_T = torch.unique(turn_ids_T, return_inverse=True)  # dense; the observations' -1 comes first
    turn_ids_T, num_turns = turn_ids_T - 1, len(turns_K) - 1
    starts_K = torch.searchsorted(turn_ids_T.cummax(0).values, torch.arange(1, num_turns, device=mask_T.device))
    ends = [torch.tensor([at], device=mask_T.device) for at in (0, traces * length)]
    cu_turns, cu_seqlens = torch.cat([ends[0], starts_K, ends[1]]), torch.arange(0, traces * length + 1, length, device=mask_T.device)
    weights_T = mask_T / mask_T.sum()
    columns = (data.old_logprobs_BL.flatten(), data.advantages_BL.flatten(), weights_T, turn_ids_T, trace_ids_T, mask_T)
    clip = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0, "log_ratio_cap": 20.0}
    plain = functools.partial(plain_losses.policy_loss, num_turns=num_turns, **clip)

    def leaf() -> Tensor:
        return data.logprobs_BL.flatten().requires_grad_()

    def with_gradient(loss_of: Callable[[Tensor], Tensor], leaf_T: Tensor) -> Outputs:
        loss = loss_of(leaf_T)
        return loss.detach(), torch.autograd.grad(loss, leaf_T)[0]

    def table(level: str, others: dict[str, Method | Absent]) -> dict[str, Row]:
        compiled = torch.compile(lambda leaf_T: plain(leaf_T, *columns, level=level)[0], dynamic=False)
        doubles = tuple(column.double() if column.is_floating_point() else column for column in columns)
        exact = with_gradient(lambda leaf_T: plain(leaf_T, *doubles, level=level)[0], leaf().detach().double().requires_grad_())

        def error(outputs: Outputs) -> float:
            scale = exact[1].abs().max()
            return max(difference(outputs[0], exact[0]), difference(outputs[1] / scale, exact[1] / scale))

        def fused(leaf_T: Tensor) -> Tensor:
            with using("fused"):
                return policy_loss(leaf_T, *columns, cu_turns=cu_turns, cu_seqlens=cu_seqlens, level=level, **clip)[0]

        return compare(
            f"Policy loss and gradient, {level} ratios, {traces} x {length}",
            {
                "fused": Method(lambda leaf_T: with_gradient(fused, leaf_T), leaf),
                "algorithm/losses.py": Method(lambda leaf_T: with_gradient(lambda x_T: plain(x_T, *columns, level=level)[0], leaf_T), leaf),
                "the same under torch.compile": Method(lambda leaf_T: with_gradient(compiled, leaf_T), leaf),
                **others,
            },
            error,
            tolerance=1e-4,
            num_bytes=traces * length * (4 * 4 + 1 + 4),  # log-probabilities, old ones, advantages, weights, mask; gradient
            **run,
        )

    def verl() -> Method:
        config = opponents.verl("verl.workers.config").ActorConfig(
            strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0
        )
        function = opponents.verl("verl.trainer.ppo.core_algos").compute_policy_loss_vanilla
        mask_BL = data.mask_BL.float()

        def loss(leaf_T: Tensor) -> Tensor:
            return function(data.old_logprobs_BL, leaf_T.view_as(mask_BL), data.advantages_BL, mask_BL, "token-mean", config)[0]

        return Method(lambda leaf_T: with_gradient(loss, leaf_T), leaf)

    return {
        "policy token": table("token", {"verl compute_policy_loss_vanilla": attempt(verl)}),
        "policy turn": table("turn", {}),
    }


# --- statistics of logits ---------------------------------------------------------------------------------------------


def naive_logp(logits_TV: Tensor) -> Tensor:
    return torch.log_softmax(logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)), -1)


def naive_statistics(logits_TV: Tensor, labels_T: Tensor) -> Outputs:
    logp_TV = naive_logp(logits_TV)
    return logp_TV.gather(1, labels_T[:, None])[:, 0], -(logp_TV.exp() * logp_TV).sum(-1)


def naive_kl(logits_TV: Tensor, ref_TV: Tensor, labels_T: Tensor) -> Outputs:
    logp_TV = naive_logp(logits_TV)
    return logp_TV.gather(1, labels_T[:, None])[:, 0], (logp_TV.exp() * (logp_TV - naive_logp(ref_TV))).sum(-1)


def our_statistics(logits_TV: Tensor, labels_T: Tensor, mode: str, *, entropy: bool = True, overwrite: bool = False) -> Outputs:
    with using(mode):
        logprobs_T, entropy_T, _ = vocab_parallel_statistics(
            logits_TV, labels_T, None, with_entropy=entropy, vocab_size=logits_TV.shape[1], overwrite_logits=overwrite
        )
    return (logprobs_T, entropy_T) if entropy else (logprobs_T,)


def our_kl(logits_TV: Tensor, ref_TV: Tensor, labels_T: Tensor, mode: str) -> Outputs:
    with using(mode):
        return vocab_parallel_statistics(logits_TV, labels_T, None, local_ref_logits_TV=ref_TV, vocab_size=logits_TV.shape[1])[::2]


def logits_tables(tokens: int, width: int, dtype: torch.dtype, slime_path: Path | None, groups: Groups, **run) -> dict[str, dict[str, Row]]:
    """Gradients of log-probabilities and entropies that come in are random, a tenth as large for entropies."""
    device = run["device"]
    generator = torch.Generator(device).manual_seed(0)
    logits_TV = torch.randn(tokens, width, generator=generator, device=device, dtype=torch.float32).mul_(3).to(dtype)
    labels_T = torch.randint(0, width, (tokens,), generator=generator, device=device)
    incoming_2T = torch.randn(2, tokens, generator=generator, device=device) * torch.tensor([[1.0], [0.1]], device=device)
    rows_R = torch.arange(0, tokens, max(tokens // CHECKED_ROWS, 1), device=device)
    compiled = torch.compile(naive_statistics, dynamic=False)

    def leaf() -> Tensor:
        return logits_TV.detach().requires_grad_()

    def own_leaf() -> Tensor:
        """For what writes over its input."""
        return logits_TV.clone().requires_grad_()

    def gradient(values: Outputs, leaf_TV: Tensor) -> Outputs:
        # the sum is taken in float32: what is compared is the gradient, not the loss
        loss = sum((value.float() * incoming_T).sum() for value, incoming_T in zip(values, incoming_2T, strict=False))
        return *(value.detach() for value in values), torch.autograd.grad(loss, leaf_TV)[0]

    def checked(num_values: int) -> Callable[[Outputs], float]:
        """Error of [T] values and, where it is there, of the [T, V] gradient, on the checked rows."""
        exact_RV = logits_TV[rows_R].double().requires_grad_()
        exact = naive_statistics(exact_RV, labels_T[rows_R])[:num_values]
        loss = sum((value * incoming_T).sum() for value, incoming_T in zip(exact, incoming_2T[:, rows_R].double(), strict=False))
        exact = *(value.detach() for value in exact), torch.autograd.grad(loss, exact_RV)[0]
        return lambda outputs: max(difference(value[rows_R], e) for value, e in zip(outputs, exact, strict=False))

    def verl() -> Callable[[Tensor], Outputs]:
        module = opponents.verl("verl.utils.torch_functional")
        return lambda x_TV: (module.logprobs_from_logits(x_TV, labels_T), module.entropy_from_logits(x_TV))

    def slime() -> Callable[[Tensor], Outputs]:
        function = opponents.slime(slime_path).calculate_log_probs_and_entropy

        def statistics(x_TV: Tensor) -> Outputs:
            logprobs, entropy = function(x_TV, labels_T, groups.tp, with_entropy=True)
            return logprobs.view(-1), entropy

        return statistics

    def forward(statistics: Callable[[Tensor], Outputs]) -> Method:
        def run_without_gradient(x_TV: Tensor) -> Outputs:
            with torch.no_grad():
                return statistics(x_TV)

        return Method(run_without_gradient, lambda: logits_TV)

    def both(statistics: Callable[[Tensor], Outputs], prepare: Callable[[], Tensor] = leaf) -> Method:
        return Method(lambda leaf_TV: gradient(statistics(leaf_TV), leaf_TV), prepare)

    def methods(kind: Callable[[Callable[[Tensor], Outputs]], Method]) -> dict[str, Method | Absent]:
        return {
            "fused": kind(lambda x_TV: our_statistics(x_TV, labels_T, "fused")),
            "parallel/vocab.py": kind(lambda x_TV: our_statistics(x_TV, labels_T, "reference")),
            "naive torch": kind(lambda x_TV: naive_statistics(x_TV, labels_T)),
            "naive torch under torch.compile": kind(lambda x_TV: compiled(x_TV, labels_T)),
            "verl logprobs_from_logits, entropy_from_logits": attempt(lambda: kind(verl())),
            "slime calculate_log_probs_and_entropy": attempt(lambda: kind(slime())),
        }

    def liger() -> Method:
        function = opponents.liger_cross_entropy(device)
        return both(lambda x_TV: (function(x_TV, labels_T),), own_leaf)

    name = str(dtype).removeprefix("torch.")
    shape, size = f"{tokens} x {width}, {name}", logits_TV.numel() * logits_TV.element_size()
    run = {**run, "tolerance": TOLERANCE[dtype]}
    results = {
        f"statistics {shape}": compare(f"Log-probability and entropy, {shape}", methods(forward), checked(2), num_bytes=size, **run),
        f"gradient {shape}": compare(
            f"Log-probability and entropy with gradient, {shape}",
            methods(both) | {"fused, over the logits": both(lambda x: our_statistics(x, labels_T, "fused", overwrite=True), own_leaf)},
            checked(2),
            num_bytes=3 * size,  # read forward, read and written backward
            **run,
        ),
        f"cross entropy {shape}": compare(
            f"Log-probability alone with gradient, {shape}",
            {
                "fused": both(lambda x_TV: our_statistics(x_TV, labels_T, "fused", entropy=False)),
                "torch cross_entropy": both(lambda x_TV: (-torch.nn.functional.cross_entropy(x_TV, labels_T, reduction="none"),)),
                **{
                    # the softmax of float32 logits is written over them
                    title: both(lambda x_TV, function=function: (function(x_TV, labels_T),), own_leaf)
                    for title, function in opponents.megatron_cross_entropies(groups).items()
                },
                "Liger cross_entropy": attempt(liger),
            },
            checked(1),
            num_bytes=3 * size,
            **run | {"tolerance": max(TOLERANCE[dtype], 1e-2)},  # megatron-core's fused one makes its gradient in bfloat16
        ),
    }
    ref_TV = (logits_TV + torch.randn(logits_TV.shape, generator=generator, device=device, dtype=dtype)).detach()
    compiled_kl = torch.compile(naive_kl, dynamic=False)
    exact = naive_kl(logits_TV[rows_R].double(), ref_TV[rows_R].double(), labels_T[rows_R])
    results[f"kl {shape}"] = compare(
        f"Log-probability and exact KL, {shape}",
        {
            "fused": forward(lambda x_TV: our_kl(x_TV, ref_TV, labels_T, "fused")),
            "parallel/vocab.py": forward(lambda x_TV: our_kl(x_TV, ref_TV, labels_T, "reference")),
            "naive torch": forward(lambda x_TV: naive_kl(x_TV, ref_TV, labels_T)),
            "naive torch under torch.compile": forward(lambda x_TV: compiled_kl(x_TV, ref_TV, labels_T)),
        },
        lambda outputs: max(difference(value[rows_R], e) for value, e in zip(outputs, exact, strict=True)),
        num_bytes=2 * size,
        **run,
    )
    return results


# --- goals ------------------------------------------------------------------------------------------------------------


def print_goals(results: dict[str, dict[str, Row]]) -> None:
    """What the CPU library is meant to reach on two cores. By processor time, and by the wall clock."""
    print("\n| goal | wall | processor | |\n|---|---|---|---|")
    for shape in ("64 x 2048", "64 x 8192"):
        _goal(results, f"whitened {shape}", "verl compute_gae_advantage_return", 30.0)
        _goal(results, f"scan {shape}", "slime chunked_gae, gather and scatter", 1.0)
    for dtype in ("float32", "bfloat16"):
        table = f"statistics 2048 x 32768, {dtype}"
        _goal(results, table, "naive torch", 10.0)
        _goal(results, table, "naive torch under torch.compile", 1.0)
        if table in results:
            ours, naive = (results[table][name].extra_mib for name in ("fused", "naive torch"))
            verdict = "met" if ours < 0.02 * naive else "MISSED"
            print(f"| {table}: under 2% of naive torch's extra memory | {ours:.1f} of {naive:.0f} MiB | | {verdict} |")


def _goal(results: dict[str, dict[str, Row]], table: str, opponent: str, times: float) -> None:
    row = results.get(table, {}).get(opponent)
    if row is not None:
        verdict = "met" if min(row.wall_x_fused, row.processor_x_fused) >= times else "MISSED"
        what = f"{table}: {times:g} times as fast as {opponent}"
        print(f"| {what} | {row.wall_x_fused:.1f} | {row.processor_x_fused:.1f} | {verdict} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="advantages,policy,logits", help="which tables, separated by commas")
    parser.add_argument("--slime", type=Path, default=os.environ.get("MEGATRON_REMA_SLIME"), help="a check-out of github.com/THUDM/slime")
    arguments = parser.parse_args()
    device, slime_path = torch.device(arguments.device), arguments.slime and Path(arguments.slime)
    run = {"rounds": arguments.rounds, "device": device}
    wanted = arguments.only.split(",")
    print(f"{select('fused', device)}; {torch.get_num_threads()} thread(s), torch {torch.__version__}, {arguments.rounds} rounds")
    results: dict[str, dict[str, Row]] = {}
    with process_group():
        groups = build_groups(tensor=1, pipeline=1)  # megatron-core's functions want a group, of one rank
        for length in (2048, 8192):
            if "advantages" in wanted:
                results |= advantage_tables(64, length, slime_path, **run)
            if "policy" in wanted:
                results |= policy_tables(64, length, **run)
        if "logits" in wanted:
            for dtype in (torch.float32, torch.bfloat16):
                results |= logits_tables(2048, 32768, dtype, slime_path, groups, **run)
            if device.type == "cuda":
                results |= logits_tables(32768, 151936, torch.bfloat16, slime_path, groups, **run)
    if device.type == "cpu":
        print_goals(results)


if __name__ == "__main__":
    main()
