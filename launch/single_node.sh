#!/usr/bin/env bash
# One node, one rank per GPU (or NPROC ranks): launch/single_node.sh experiment=NAME key=value ...
# Sets rendezvous only; every other value comes from conf/.
set -euo pipefail
NPROC=${NPROC:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
[ "$NPROC" -gt 0 ] || { echo "error: no GPU found; set NPROC to the number of ranks." >&2; exit 2; }
exec torchrun --standalone --nproc-per-node "$NPROC" -m "megatron_rema.${DOOR:-train}" "$@"
