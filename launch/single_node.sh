#!/usr/bin/env bash
# One node, one rank per GPU (or NPROC ranks). Sets rendezvous only: every other value is a Hydra argument that is passed on.
set -euo pipefail

usage() {
  cat <<'END'
usage: [VARIABLE=VALUE ...] launch/single_node.sh [key=value ...]

Starts megatron_rema on this machine under torchrun and passes every argument on to it, for example experiment=quickstart.

  NPROC          ranks; default: the number of GPUs
  MAX_RESTARTS   how often workers are started again after one died; they continue from the latest checkpoint. Default: 0
  DOOR           train (default), sft, train_reward_model or evaluate

`python -m megatron_rema.train --help` lists every key.
END
}

case "${1:-}" in -h | --help) usage && exit 0 ;; esac
NPROC=${NPROC:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
[[ "$NPROC" =~ ^[1-9][0-9]*$ ]] || { echo "error: NPROC is '$NPROC'; no GPU was found, or it is no number: set NPROC to the number of ranks." >&2 && exit 2; }
exec torchrun --standalone --nproc-per-node "$NPROC" --max-restarts "${MAX_RESTARTS:-0}" -m "megatron_rema.${DOOR:-train}" "$@"
