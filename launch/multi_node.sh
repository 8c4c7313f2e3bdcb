#!/usr/bin/env bash
# One node of several: run it once on every node, with the same variables. Sets rendezvous only: every other value is a Hydra argument
# that is passed on. slurm.sbatch and kubernetes.yaml run this script.
set -euo pipefail

usage() {
  cat <<'END'
usage: NNODES=N HEAD=HOST:PORT JOB_ID=NAME [VARIABLE=VALUE ...] launch/multi_node.sh [key=value ...]

Starts this node's ranks of megatron_rema under torchrun and passes every argument on to it. run_dir must lie on a file system that all
nodes share.

  NNODES         number of nodes; the run begins when all are there
  HEAD           host and free port of one of the nodes, where all meet, for example node0:29500
  JOB_ID         name of this launch, the same on every node. Starting again under the same name, with the same arguments, continues the run
                 from its latest checkpoint; a name that was not used before begins a new one
  NPROC          ranks on this node; default: the number of GPUs
  MAX_RESTARTS   how often workers are started again after one died or a node came back; they continue from the latest checkpoint. Default: 3
  NODE_ADDR      this node's address as the others see it; default: what torchrun finds. Set it where host names do not resolve
  DOOR           train (default), sft, train_reward_model or evaluate

`python -m megatron_rema.train --help` lists every key.
END
}

fail() { echo "error: $*" >&2 && exit 2; }

case "${1:-}" in -h | --help) usage && exit 0 ;; esac
for name in NNODES HEAD JOB_ID; do
  [ -n "${!name:-}" ] || fail "$name is not set. \`launch/multi_node.sh --help\` says what it means."
done
NPROC=${NPROC:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
[[ "$NNODES" =~ ^[1-9][0-9]*$ ]] || fail "NNODES is '$NNODES'; it must be a number of nodes."
[[ "$HEAD" =~ ^.+:[0-9]+$ ]] || fail "HEAD is '$HEAD'; it must be HOST:PORT."
[[ "$NPROC" =~ ^[1-9][0-9]*$ ]] || fail "NPROC is '$NPROC'; no GPU was found, or it is no number: set NPROC to the number of ranks of a node."
# torchrun keeps the address of its first round's store for good, so that a node which comes back waits for it in vain (torch 2.13); without
# sharing it every round has its own. That one lives in rank 0's process: the watchdog talks by way of HEAD instead.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1} MEGATRON_REMA_MEETING=$HEAD
exec torchrun --nnodes "$NNODES" --nproc-per-node "$NPROC" --max-restarts "${MAX_RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "$JOB_ID" ${NODE_ADDR:+--local-addr "$NODE_ADDR"} \
  -m "megatron_rema.${DOOR:-train}" "$@"
