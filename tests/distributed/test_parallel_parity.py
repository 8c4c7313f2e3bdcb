"""Outputs, loss, every gradient and one optimizer step do not depend on how a model is cut over ranks, or its batch into microbatches.

The model is a policy (log-probabilities), a critic (one scalar per position) or a reward model (three scalars at the last token). The
reference is the same model on one rank (tensor 1, pipeline 1, one microbatch). float32 throughout: layouts differ in the order of sums
only, which is worth about 1e-8 where gradients are about 0.1 (policy) and some roundings of 6e-8 of the largest where they reach 3
(scalar heads). Adam's eps is 1e-3 so that the step stays a smooth function of the gradient: with a tiny eps the first step is
lr * sign(gradient), which turns rounding of a zero gradient into a full step.
"""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_rema.architecture import Architecture
from megatron_rema.models.optimizer import build_optimizer
from megatron_rema.models.policy import ParallelModel, build_policy, full_name
from megatron_rema.parallel.groups import build_groups
from megatron_rema.parallel.pipeline import broadcast_from_last_stage, reduce_stats
from megatron_rema.types import Batch

QWEN2 = Architecture(
    family="qwen2",
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=70,  # padded to 72 on one rank and to 80 on two
    rope_theta=10000.0,
    rope_scaling_factor=None,
    rms_norm_eps=1e-6,
    qkv_bias=True,
    qk_norm=False,
    tied=False,
    max_positions=64,
    eos_token_ids=(0,),
)
QWEN2_TIED = dataclasses.replace(QWEN2, tied=True)
QWEN3 = dataclasses.replace(QWEN2, family="qwen3", qkv_bias=False, qk_norm=True, head_dim=16, tied=True)  # heads wider than hidden / heads
LLAMA = dataclasses.replace(QWEN2, family="llama", qkv_bias=False, rope_scaling_factor=8.0, rope_theta=500000.0)

CRITIC = QWEN2.with_scalar_head(1)
REWARD_MODEL = QWEN2_TIED.with_scalar_head(3)

LENGTHS = (9, 4, 13, 7, 11, 3, 8, 5)
OUTPUT = 2e-6  # absolute; log-probabilities of about -4 nats, scalars of about 1
LOSS = 1e-6  # relative
GRADIENT = 1e-7  # absolute
GRADIENT_RELATIVE = 2e-6  # of the tensor's largest gradient, where that allows more: 30 roundings in sums over 60 positions; 6e-7 seen
WEIGHT = 1e-6  # absolute, after one step at lr 1e-2


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, QWEN2.vocab_size, (n + 1,), generator=generator) for n in LENGTHS]


def pack(parts: list[torch.Tensor], total: int) -> Batch:
    """Loss weights: 1 / (all labels of the step), so the loss of a step is the mean over its labels."""
    lengths = [len(part) - 1 for part in parts]
    padding = total - sum(lengths)
    assert padding >= 0
    pieces = lengths + ([padding] if padding else [])
    mask = torch.arange(total) < sum(lengths)
    return Batch(
        tokens=torch.cat([part[:-1] for part in parts] + [torch.zeros(padding, dtype=torch.long)]),
        labels=torch.cat([part[1:] for part in parts] + [torch.zeros(padding, dtype=torch.long)]),
        positions=torch.cat([torch.arange(n) for n in pieces]),
        cu_seqlens=torch.tensor([0, *pieces]).cumsum(0).int(),
        max_seqlen=max(pieces),
        loss_mask=mask,
        turn_ids=torch.where(mask, 0, -1),
        trace_ids=torch.repeat_interleave(torch.arange(len(pieces)), torch.tensor(pieces)),
        cu_turns=torch.tensor([0, len(mask)]),
        loss_weights=mask.float() / sum(LENGTHS),
    )


def microbatches(data_rank: int, data_size: int, per_rank: int, total: int) -> list[Batch]:
    """The eight sequences dealt to ``data_size * per_rank`` microbatches of ``total`` positions; those of one rank."""
    parts = sequences()
    num = data_size * per_rank
    return [pack(parts[i::num], total) for i in range(data_rank, num, data_size)]


def negative_logprob(model: ParallelModel):
    def loss_fn(outputs, batch):
        logprobs_T = model.statistics(outputs, batch).logprobs
        loss = -(batch.loss_weights * logprobs_T).sum()
        return loss, {"loss": loss.detach(), "labels": batch.loss_mask.sum(), "lowest": (-logprobs_T.detach()[batch.loss_mask]).max()}

    return loss_fn


def squared_error(model: ParallelModel):
    """A critic's loss: towards a number that depends on the label."""

    def loss_fn(values_TK, batch):
        error_T = (values_TK[:, 0] - batch.labels / QWEN2.vocab_size).square()
        loss = (batch.loss_weights * error_T).sum()
        return loss, {"loss": loss.detach(), "labels": batch.loss_mask.sum(), "lowest": error_T.detach()[batch.loss_mask].max()}

    return loss_fn


def preference(model: ParallelModel):
    """A reward model's loss: every head's score at a sequence's last token, against its own margin."""

    def loss_fn(values_TK, batch):
        last = batch.cu_seqlens[1:].long() - 1
        scores_NK = values_TK[last[batch.loss_mask[last]]]
        losses_NK = F.softplus(torch.tensor([0.5, -0.5, 1.0]) - scores_NK)
        loss = losses_NK.sum() / len(LENGTHS)
        return loss, {"loss": loss.detach(), "labels": batch.loss_mask.sum(), "lowest": losses_NK.detach().max()}

    return loss_fn


def objective(model: ParallelModel):
    return {0: negative_logprob, 1: squared_error, 3: preference}[model.arch.num_scalars](model)


def forward(model: ParallelModel, per_rank: int, total: int) -> np.ndarray:
    """[all labels, K] what the model says of every label, in the order of `sequences`: a log-probability, or K scalars."""
    groups, arch = model.groups, model.arch

    def keep(outputs, batch):
        if not arch.num_scalars:
            outputs = model.statistics(outputs, batch).logprobs[:, None]
        return outputs.sum(), {"outputs": outputs.detach().clone()}

    batches = microbatches(groups.data_rank, groups.data_size, per_rank, total)
    results = model.forward_backward(batches, keep, forward_only=True)
    assert len(results) == (len(batches) if groups.is_last_stage else 0)
    like = [{"outputs": torch.zeros(total, max(arch.num_scalars, 1))} for _ in batches]
    mine = [stats["outputs"].numpy() for stats in broadcast_from_last_stage(results, like, groups)]
    everyone = [None] * groups.data_size
    dist.all_gather_object(everyone, mine, group=groups.dp)
    num = groups.data_size * per_rank
    by_sequence = {}
    for i in range(num):
        start = 0
        for sequence in range(i, len(LENGTHS), num):
            by_sequence[sequence] = everyone[i % groups.data_size][i // groups.data_size][start : start + LENGTHS[sequence]]
            start += LENGTHS[sequence]
    return np.concatenate([by_sequence[sequence] for sequence in range(len(LENGTHS))])


def whole(tensors: dict[str, torch.Tensor], model: ParallelModel) -> dict[str, np.ndarray]:
    """`gather` of tensors under the names of the parameters they belong to, for a model of one module."""
    name_of = {id(param): name for name, param in model.module.named_parameters()}
    return gather(model, lambda param: tensors[name_of[id(param)]])


def gather(model: ParallelModel, read: Callable[[torch.nn.Parameter], torch.Tensor]) -> dict[str, np.ndarray]:
    """What ``read`` finds for this rank's parameters -> full tensors of the whole model, by full name, without vocabulary padding."""
    groups, mine = model.groups, {}
    named = [(module, name, param) for module in model.modules for name, param in module.named_parameters()]
    for module, name, param in named:
        tensor, key = read(param), full_name(name, module, model.arch)
        if getattr(param, "tensor_model_parallel", False):
            shards = [torch.empty_like(tensor) for _ in range(groups.tensor_size)]
            dist.all_gather(shards, tensor.contiguous(), group=groups.tp)
            strides = [shard.chunk(param.partition_stride, param.partition_dim) for shard in shards]
            tensor = torch.cat([shard[i] for i in range(param.partition_stride) for shard in strides], param.partition_dim)
        if "embedding" in key or ("output_layer" in key and not model.arch.num_scalars):
            assert tensor[model.arch.vocab_size :].abs().sum() == 0, f"{key}: the vocabulary's padding rows are not zero"
            tensor = tensor[: model.arch.vocab_size]
        mine[key] = tensor.detach().numpy().copy()
    stages = [None] * groups.pipeline_size
    dist.all_gather_object(stages, mine, group=groups.pp)
    if model.arch.tied:  # the one tensor that two stages hold
        np.testing.assert_array_equal(stages[0]["embedding.word_embeddings.weight"], stages[-1]["embedding.word_embeddings.weight"])
    return {key: value for stage in stages for key, value in stage.items()}


def gather_sharded_gradients(model: ParallelModel) -> None:
    """ZeRO-1 leaves on each data-parallel rank its own piece of the summed gradients: put the pieces together."""
    groups = model.groups
    for bucket in (bucket for chunk in model.chunks for buffer in chunk.buffers for bucket in buffer.buckets):
        pieces = list(bucket.grad_data.chunk(groups.data_size))
        dist.all_gather(pieces, pieces[groups.data_rank].clone(), group=groups.dp)


def one_step(arch: Architecture, tensor: int, pipeline: int, per_rank: int = 2, total: int = 64, steps: int = 1, **options) -> dict:
    groups = build_groups(tensor=tensor, pipeline=pipeline)
    model = build_policy(arch, groups=groups, seed=7, **options)
    start, outputs = gather(model, lambda p: p.data), forward(model, per_rank, total)
    optimizer = build_optimizer(model, lr=1e-2, total_steps=10, eps=1e-3, weight_decay=0.1, grad_clip=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        results = model.forward_backward(microbatches(groups.data_rank, groups.data_size, per_rank, total), objective(model))
        stats = reduce_stats(results, groups, maxima=("lowest",))
        if options.get("distributed_optimizer"):
            gather_sharded_gradients(model)
        gradients = gather(model, lambda p: p.main_grad)
        result = optimizer.step()
    return {
        "outputs": outputs,
        "stats": stats,
        "start": start,
        "gradients": gradients,
        "grad_norm": result.grad_norm,
        "skipped": result.skipped,
        "weights": gather(model, lambda p: p.data),
    }


_REFERENCES: dict = {}


def reference(run_ranks, arch: Architecture) -> dict:
    if arch not in _REFERENCES:
        _REFERENCES[arch] = run_ranks(1, one_step, arch, 1, 1, 1)[0]
    return _REFERENCES[arch]


def per_rank(options: dict) -> int:
    """Microbatches of each rank. Four where stages are virtual: two are too few for messages between two stages to be mixed up."""
    return 4 if "virtual" in options else 2


def one_step_with(options: dict, *args) -> dict:
    return one_step(*args, **options)


def assert_same_step(found: dict, expected: dict) -> None:
    np.testing.assert_allclose(found["outputs"], expected["outputs"], rtol=0, atol=OUTPUT)
    assert found["stats"]["labels"] == sum(LENGTHS)
    assert found["stats"]["loss"] == pytest.approx(expected["stats"]["loss"], rel=LOSS)
    assert found["stats"]["lowest"] == pytest.approx(expected["stats"]["lowest"], rel=LOSS)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert not found["skipped"]
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        largest = np.abs(gradient).max()
        assert largest > 100 * GRADIENT, f"{name}: a gradient too small to compare"
        np.testing.assert_allclose(
            found["gradients"][name], gradient, rtol=0, atol=max(GRADIENT, GRADIENT_RELATIVE * largest), err_msg=name
        )
    for name, weight in expected["weights"].items():
        assert np.abs(weight - expected["start"][name]).max() > 10 * WEIGHT, f"{name} did not move"
        np.testing.assert_allclose(found["weights"][name], weight, rtol=0, atol=WEIGHT, err_msg=name)


LAYOUTS = [  # world, tensor, pipeline, options
    pytest.param(2, 2, 1, {}, id="TP2"),
    pytest.param(2, 1, 2, {}, id="PP2"),
    pytest.param(4, 2, 2, {}, id="TP2PP2"),
    pytest.param(2, 1, 2, {"virtual": 2}, id="PP2-virtual2"),
    pytest.param(2, 1, 1, {}, id="DP2"),
    pytest.param(2, 2, 1, {"sequence_parallel": True}, id="TP2-sequence-parallel"),
    pytest.param(4, 2, 2, {"sequence_parallel": True, "recompute": True}, id="TP2PP2-sequence-parallel-recompute"),
    pytest.param(2, 1, 1, {"distributed_optimizer": True}, id="DP2-zero1"),
    pytest.param(4, 2, 1, {"distributed_optimizer": True}, id="TP2DP2-zero1"),
    pytest.param(4, 1, 2, {"distributed_optimizer": True, "virtual": 2}, id="PP2DP2-virtual2-zero1"),
]


@pytest.mark.parametrize("arch", [QWEN2, CRITIC, REWARD_MODEL], ids=["policy", "critic", "reward-model"])
@pytest.mark.parametrize(("world", "tensor", "pipeline", "options"), LAYOUTS)
def test_outputs_loss_gradients_and_step_do_not_change_with_the_layout(run_ranks, arch, world, tensor, pipeline, options):
    for result in run_ranks(world, one_step_with, options, arch, tensor, pipeline, per_rank(options)):
        assert_same_step(result, reference(run_ranks, arch))


@pytest.mark.parametrize("arch", [QWEN2, QWEN2_TIED], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("world", "tensor", "pipeline", "options"),
    [
        pytest.param(1, 1, 1, {}, id="alone"),
        pytest.param(2, 2, 1, {"sequence_parallel": True}, id="TP2-sequence-parallel"),
        pytest.param(2, 1, 2, {"virtual": 2}, id="PP2-virtual2"),
        pytest.param(4, 2, 1, {"distributed_optimizer": True}, id="TP2DP2-zero1"),
        pytest.param(4, 2, 2, {}, id="TP2PP2"),
        pytest.param(4, 2, 2, {"sequence_parallel": True, "recompute": True}, id="TP2PP2-sequence-parallel-recompute"),
    ],
)
def test_logits_in_chunks_give_the_step_of_whole_logits(run_ranks, arch, world, tensor, pipeline, options):
    """Chunks of 10 of 64 positions. A tied weight's gradient comes from both ends of the model, once each."""
    for result in run_ranks(world, one_step_with, {"logits_chunk_tokens": 10, **options}, arch, tensor, pipeline, per_rank(options)):
        assert_same_step(result, reference(run_ranks, arch))


@pytest.mark.parametrize("per_rank", [1, 3, 4])  # 1 and 3 microbatches over 2 stages are filled up to 2 and 4
def test_virtual_stages_take_any_number_of_microbatches(run_ranks, per_rank):
    for result in run_ranks(2, one_step_with, {"virtual": 2}, QWEN2, 1, 2, per_rank):
        assert_same_step(result, reference(run_ranks, QWEN2))


def test_four_stages_of_two_virtual_stages_hold_one_layer_each(run_ranks):
    arch = dataclasses.replace(QWEN2_TIED, num_layers=8)
    for result in run_ranks(4, one_step_with, {"virtual": 2, "recompute": True}, arch, 1, 4, 8):
        assert_same_step(result, reference(run_ranks, arch))


@pytest.mark.parametrize("arch", [QWEN2_TIED, QWEN3, LLAMA], ids=["qwen2-tied", "qwen3", "llama"])
@pytest.mark.parametrize(
    "options",
    [{}, {"sequence_parallel": True}, {"sequence_parallel": True, "virtual": 2}],
    ids=["plain", "sequence-parallel", "sequence-parallel-virtual2"],
)
def test_every_family_trains_the_same_at_tp2_pp2(run_ranks, arch, options):
    for result in run_ranks(4, one_step_with, options, arch, 2, 2, per_rank(options)):
        assert_same_step(result, reference(run_ranks, arch))


@pytest.mark.parametrize(
    ("data", "per_rank"), [(1, 1), (1, 4), (1, 8), (2, 1), (2, 4), (4, 1), (4, 2)], ids=lambda n: str(n)
)  # 8 sequences over data x per_rank microbatches of 64 positions: from all packed together to each alone
def test_gradients_and_norm_are_the_same_for_every_split_into_ranks_and_microbatches(run_ranks, data, per_rank):
    for result in run_ranks(data, one_step, QWEN2, 1, 1, per_rank):
        assert_same_step(result, reference(run_ranks, QWEN2))


@pytest.mark.parametrize("total", [60, 72, 128])  # 60 tokens: no padding, 12 and 68 padding positions
def test_padding_does_not_move_loss_or_gradients(run_ranks, total):
    assert_same_step(run_ranks(1, one_step, QWEN2, 1, 1, 1, total)[0], reference(run_ranks, QWEN2))


def logprobs(tensor: int, pipeline: int, parts: list[list[torch.Tensor]], total: int) -> list[np.ndarray]:
    """A frozen policy's log-probabilities of each microbatch's labels, as every rank gets them."""
    groups = build_groups(tensor=tensor, pipeline=pipeline)
    model = build_policy(QWEN3, groups=groups, seed=7, trainable=False)
    assert not any(p.requires_grad for p in model.module.parameters())

    def keep(outputs, batch):
        values_T = model.statistics(outputs, batch).logprobs
        return values_T.sum(), {"logprobs": values_T.detach()}

    batches = [pack(part, total) for part in parts]
    outputs = model.forward_backward(batches, keep, forward_only=True)
    assert len(outputs) == (len(batches) if groups.is_last_stage else 0)
    like = [{"logprobs": torch.zeros(total)} for _ in batches]
    received = broadcast_from_last_stage(outputs, like, groups)
    return [stats["logprobs"][: sum(len(s) - 1 for s in part)].numpy() for stats, part in zip(received, parts, strict=True)]


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 2)])
def test_packed_sequences_score_as_each_does_alone(run_ranks, tensor, pipeline):
    alone = run_ranks(1, logprobs, 1, 1, [[part] for part in sequences()], 16)[0]
    for packed in run_ranks(tensor * pipeline, logprobs, tensor, pipeline, [sequences()], 64):
        # nats; sums in another order, over logprobs of about -4
        np.testing.assert_allclose(packed[0], np.concatenate(alone), rtol=0, atol=2e-6)


def two_layouts_at_once() -> list[dict]:
    """Two policies of different layout in one process, their steps interleaved; and a third Groups that nobody uses."""
    layouts = [build_groups(tensor=2, pipeline=1), build_groups(tensor=1, pipeline=2), build_groups(tensor=1, pipeline=1)]
    models = [build_policy(QWEN2_TIED, groups=groups, seed=7) for groups in layouts[:2]]
    optimizers = [build_optimizer(model, lr=1e-2, total_steps=10, eps=1e-3, weight_decay=0.1, grad_clip=0.5) for model in models]
    outputs = [forward(model, 2, 64) for model in models]
    stats = []
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.zero_grad()
        results = model.forward_backward(microbatches(0, 1, 2, 64), negative_logprob(model))
        stats.append(reduce_stats(results, model.groups, maxima=("lowest",)))
    gradients = [gather(model, lambda p: p.main_grad) for model in models]
    results = [optimizer.step() for optimizer in optimizers]
    return [
        {
            "outputs": outputs[i],
            "stats": stats[i],
            "gradients": gradients[i],
            "grad_norm": results[i].grad_norm,
            "skipped": results[i].skipped,
            "weights": gather(models[i], lambda p: p.data),
        }
        for i in range(2)
    ]


def test_two_policies_of_different_layout_live_in_one_process(run_ranks):
    for both in run_ranks(2, two_layouts_at_once):
        for result in both:
            assert_same_step(result, reference(run_ranks, QWEN2_TIED))


def step_with_poisoned_gradient(options: dict, pipeline: int) -> tuple:
    """The gradient of one parameter on one rank becomes inf; then a sound step follows."""
    groups = build_groups(tensor=1, pipeline=pipeline)
    model = build_policy(QWEN2, groups=groups, seed=7, **options)
    optimizer = build_optimizer(model, lr=1e-2, warmup_steps=4, total_steps=10)
    before = [p.detach().clone() for p in model.module.parameters()]
    optimizer.zero_grad()
    model.forward_backward(microbatches(groups.data_rank, groups.data_size, 1, 64), negative_logprob(model))
    if dist.get_rank() == 0:
        model.module.decoder.layers[0].mlp.linear_fc2.weight.main_grad[3, 5] = float("inf")
    bad = optimizer.step()
    unchanged = all(torch.equal(a, p) for a, p in zip(before, model.module.parameters(), strict=True))
    optimizer.zero_grad()
    model.forward_backward(microbatches(groups.data_rank, groups.data_size, 1, 64), negative_logprob(model))
    good = optimizer.step()
    finite = all(p.isfinite().all().item() for p in model.module.parameters())
    return bad, unchanged, good, finite


@pytest.mark.parametrize(
    ("options", "pipeline"),
    [
        pytest.param({}, 2, id="plain"),
        pytest.param({"distributed_optimizer": True}, 2, id="zero1"),
        pytest.param({}, 1, id="one-replica-alone"),
    ],
)
def test_a_step_with_a_non_finite_gradient_is_skipped_on_every_rank(run_ranks, options, pipeline):
    for bad, unchanged, good, finite in run_ranks(2, step_with_poisoned_gradient, options, pipeline):
        assert bad.skipped and not np.isfinite(bad.grad_norm) and unchanged
        assert not good.skipped and finite
        assert good.lr == pytest.approx(1e-2 / 4)  # the first step that counts uses the first value of a warm-up over 4 steps


def schedule(**options) -> list[float]:
    groups = build_groups(tensor=1, pipeline=1)
    model = build_policy(QWEN2, groups=groups, seed=7)
    optimizer = build_optimizer(model, lr=1.0, total_steps=6, **options)
    optimizer.zero_grad()
    return [optimizer.step().lr for _ in range(7)]


def schedule_with(options: dict) -> list[float]:
    return schedule(**options)


def test_learning_rate_warms_up_then_decays_to_its_minimum(run_ranks):
    # warm-up over 2 steps: 1/2, 1; then linear from 1 to 0.2 over the remaining 4 steps; 0.2 ever after
    assert run_ranks(1, schedule_with, {"schedule": "linear", "warmup_steps": 2, "min_lr": 0.2})[0] == pytest.approx(
        [0.5, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]
    )
    assert run_ranks(1, schedule_with, {})[0] == [1.0] * 7


def decayed_names() -> tuple[set[str], set[str]]:
    """Names that a step with zero gradients moves, and those that it leaves."""
    groups = build_groups(tensor=1, pipeline=1)
    model = build_policy(QWEN3, groups=groups, seed=7)
    with torch.no_grad():
        for param in model.module.parameters():
            param.add_(1.0)
    before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    optimizer = build_optimizer(model, lr=1e-2, total_steps=10, weight_decay=0.1)
    optimizer.zero_grad()
    optimizer.step()
    moved = {name for name, p in model.module.named_parameters() if not torch.equal(p, before[name])}
    return moved, set(before) - moved


def test_weight_decay_spares_norms(run_ranks):
    moved, spared = run_ranks(1, decayed_names)[0]
    assert all("layernorm" in name for name in spared) and len(spared) == 4 * 4 + 1  # per layer input, post-attention, q, k; final
    assert not any("layernorm" in name for name in moved)


def bfloat16_run(options: dict) -> tuple[float, float, float]:
    """12 small steps. Returns first and last loss, and the largest move of a norm weight."""
    groups = build_groups(tensor=1, pipeline=1)
    model = build_policy(QWEN2, groups=groups, seed=7, dtype=torch.bfloat16, **options)
    weight = model.module.decoder.layers[0].input_layernorm.weight
    optimizer = build_optimizer(model, lr=5e-4, total_steps=100)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        outputs = model.forward_backward(microbatches(groups.data_rank, groups.data_size, 2, 64), negative_logprob(model))
        losses.append(reduce_stats(outputs, groups, maxima=("lowest",))["loss"])
        optimizer.step()
    assert weight.dtype is torch.bfloat16
    return losses[0], losses[-1], (weight.float() - 1.0).abs().max().item()


@pytest.mark.parametrize("options", [{}, {"distributed_optimizer": True}], ids=["plain", "zero1"])
def test_bfloat16_weights_add_up_updates_too_small_for_bfloat16(run_ranks, options):
    for first, last, moved in run_ranks(2, bfloat16_run, options):
        assert last < first
        # a bfloat16 1.0 has neighbours at 1 - 2^-8 = 0.9961 and 1.0078: one step of 5e-4 rounds away, twelve make up to 6e-3
        assert moved >= 2**-8


def resume(arch: Architecture, tensor: int, pipeline: int, options: dict, path: str, *, is_first: bool) -> list[float]:
    """Two steps, save, three more; or load and take those three. Returns the losses of the three."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.SimpleQueue()  # a synchronous save needs no manager process
    groups = build_groups(tensor=tensor, pipeline=pipeline)
    model = build_policy(arch, groups=groups, seed=7 if is_first else 8, **options)
    optimizer = build_optimizer(model, lr=1e-2, total_steps=10, schedule="linear", warmup_steps=3, eps=1e-3)

    def steps(count: int) -> list[float]:
        losses = []
        for _ in range(count):
            optimizer.zero_grad()
            outputs = model.forward_backward(microbatches(groups.data_rank, groups.data_size, 4 // groups.data_size, 64), objective(model))
            losses.append(reduce_stats(outputs, groups, maxima=("lowest",))["loss"])
            optimizer.step()
        return losses

    def state(is_loading: bool) -> dict:
        with groups.megatron_globals():
            weights = {f"model{i}": module.sharded_state_dict() for i, module in enumerate(model.modules)}
            return {"model": weights, "optimizer": optimizer.sharded_state_dict(weights, is_loading=is_loading)}

    if is_first:
        steps(2)
        dist_checkpointing.save(state(is_loading=False), path)
    else:
        loaded = dist_checkpointing.load(state(is_loading=True), path)
        for i, module in enumerate(model.modules):
            module.load_state_dict(loaded["model"][f"model{i}"])
        optimizer.load_state_dict(loaded["optimizer"])
    return steps(3)


def resume_first(*args) -> list[float]:
    return resume(*args, is_first=True)


def resume_later(*args) -> list[float]:
    return resume(*args, is_first=False)


@pytest.mark.parametrize("options", [{}, {"distributed_optimizer": True}], ids=["plain", "zero1"])
@pytest.mark.parametrize(
    ("arch", "world", "tensor", "pipeline", "virtual"),
    [
        pytest.param(QWEN2_TIED, 2, 1, 1, 1, id="DP2"),
        pytest.param(QWEN2_TIED, 4, 2, 2, 1, id="TP2PP2"),
        pytest.param(QWEN2_TIED, 4, 1, 2, 1, id="PP2DP2"),
        pytest.param(QWEN2_TIED, 4, 1, 2, 2, id="PP2DP2-virtual2"),
        pytest.param(REWARD_MODEL, 4, 2, 2, 2, id="reward-model-TP2PP2-virtual2"),
    ],
)
def test_training_resumes_where_it_was_at_another_layout(run_ranks, tmp_path, options, arch, world, tensor, pipeline, virtual):
    path = tmp_path / "checkpoint"
    path.mkdir()
    uninterrupted = run_ranks(2, resume_first, arch, 1, 1, options, str(path))[0]
    for losses in run_ranks(world, resume_later, arch, tensor, pipeline, {**options, "virtual": virtual}, str(path)):
        assert losses == pytest.approx(uninterrupted, rel=1e-5)  # 5 steps of float32 rounding; a lost Adam step counter is worth 1e-2


def refusals() -> dict[str, str]:
    groups = build_groups(tensor=2, pipeline=1)
    model = build_policy(QWEN2, groups=groups, seed=7, sequence_parallel=True)
    loss_fn = negative_logprob(model)
    parts = sequences()
    cases = {
        "layout": lambda: build_groups(tensor=2, pipeline=3),
        "heads": lambda: build_policy(dataclasses.replace(QWEN2, num_kv_heads=1), groups=groups),
        "virtual": lambda: build_policy(QWEN2, groups=groups, virtual=2),
        "lengths": lambda: model.forward_backward([pack(parts, 64), pack(parts, 72)], loss_fn),
        "multiple": lambda: model.forward_backward([pack(parts, 61)], loss_fn),
        "none": lambda: model.forward_backward([], loss_fn),
    }
    messages = {}
    for name, case in cases.items():
        try:
            case()
        except ValueError as error:
            messages[name] = str(error)
    return messages


def test_what_cannot_run_is_refused_with_field_value_rule_and_remedy(run_ranks):
    for messages in run_ranks(2, refusals):
        assert "parallel.tensor (2) * parallel.pipeline (3) = 6 must divide world_size (2); got remainder 2" in messages["layout"]
        assert "parallel.tensor (2) must divide num_key_value_heads (1)" in messages["heads"]
        assert "parallel.virtual_pipeline is 2 with parallel.pipeline 1; virtual stages need at least 2 stages" in messages["virtual"]
        assert "microbatches of one step have [64, 72] tokens" in messages["lengths"]
        assert "multiple of 2 tokens; got 61" in messages["multiple"]
        assert "needs at least one" in messages["none"]
