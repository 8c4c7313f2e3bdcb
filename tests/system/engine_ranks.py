"""One rank of ``test_two_engines_of_two_ranks_each_live_among_four_ranks``: writes what it saw to rank_N.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rema.engine.start import build_engine
from tests.engine_contract import ask, gap, request, weights


def main(old: str, new: str, out: str) -> None:
    dist.init_process_group("gloo")
    rank, tensor, shape = dist.get_rank(), 2, {"max_model_len": 256, "kv_cache_gib": 0.02}
    paths = [Path(old), Path(new)]
    engines = [build_engine("vllm", path, tensor=tensor, **shape) for path in paths]
    contexts = [request(f"r_{i}", length=10 + 9 * i).token_ids for i in range(4)]
    requests = [request(f"r_{i}", context=c, seed=i + 100 * (rank // tensor), temperature=0.7) for i, c in enumerate(contexts)]
    gaps, tokens = [], []

    def play(engine, path) -> None:
        completions = ask(engine, *requests)
        tokens.append([c.token_ids for c in completions])
        gaps.extend(gap(path, r, c) for r, c in zip(requests, completions, strict=True))

    play(engines[0], paths[0])
    play(engines[1], paths[1])
    engines[0].load_weights(iter(weights(paths[1]).items()), weight_version=1)
    play(engines[0], paths[1])
    try:
        build_engine("vllm", paths[0], tensor=1, **shape)
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    engines[0].close()
    play(engines[1], paths[1])
    engines[1].close()
    last = build_engine("vllm", paths[0], tensor=1, **shape)  # no engine is left, so another size may start
    play(last, paths[0])
    last.close()
    value = torch.ones(1)
    dist.all_reduce(value)
    seen = {"gap": max(gaps), "tokens": tokens, "refusal": refusal, "sum_after_close": value.item()}
    (Path(out) / f"rank_{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
