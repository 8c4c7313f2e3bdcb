#!/usr/bin/env bash
# The whole story on a CPU: make the arith task, cold start a tiny model from scratch, train it by ReMA RL with TP=2 x PP=2, report.
# Cold start runs on 2 data-parallel ranks (the fastest layout for a model this small); RL on 4 ranks, tensor 2 x pipeline 2.
# A second run continues where the first one stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

DATA=${DATA:-data/arith}
RUNS=${RUNS:-runs}
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
begin=$(date +%s)

say() { printf '\n== %s (%d s)\n' "$*" $(($(date +%s) - begin)); }
resume() { [ -e "$1/checkpoints/latest" ] && echo true || echo false; }

if [ ! -e "$DATA/manifest.json" ]; then
  say "1/3 task: problems, cold-start dialogues and tokenizer in $DATA"
  python tools/make_arith.py "$DATA"
fi

if [ ! -e "$RUNS/cold_start/hf/shared/config.json" ]; then
  say "2/3 cold start: a tiny model learns both roles from imperfect dialogues (2 ranks, data parallel)"
  torchrun --nproc-per-node 2 -m megatron_rema.sft experiment=quickstart_cold_start \
    run_dir="$RUNS/cold_start" resume="$(resume "$RUNS/cold_start")"
fi

say "3/3 ReMA RL: two agents on megatron-core, tensor 2 x pipeline 2, a vLLM engine in each of 4 ranks"
torchrun --nproc-per-node 4 -m megatron_rema.train experiment=quickstart \
  run_dir="$RUNS/quickstart" resume="$(resume "$RUNS/quickstart")"

say "done: open $RUNS/quickstart/report.html"
