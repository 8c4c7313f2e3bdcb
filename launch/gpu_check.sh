#!/usr/bin/env bash
# On a machine with a GPU: builds the kernels, tests and measures them, and leaves everything in one folder.
# usage: launch/gpu_check.sh [FOLDER]      (default: runs/gpu_check)        PYTHON: the interpreter, default python
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,3s/^# //p' "$0"; exit 0 ;; esac
cd "$(dirname "$0")/.."
folder=${1:-runs/gpu_check}
python=${PYTHON:-python}
if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "gpu_check: torch sees no CUDA device here: nothing was run" >&2
  exit 1
fi
mkdir -p "$folder"
{
  date -u +%FT%TZ
  git rev-parse HEAD 2>/dev/null || true
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
  "$python" -c "import torch; print('torch', torch.__version__, 'cuda', torch.version.cuda)"
} | tee "$folder/machine.txt"
MEGATRON_REMA_KERNELS=cuda "$python" -m megatron_rema.kernels.build  # without a library there is nothing to check: a failure ends here
"$python" -m megatron_rema.kernels | tee "$folder/kernels.txt"

failed=0
step() {  # NAME COMMAND...: its output in NAME.txt; a failure does not keep the others from running
  echo "gpu_check: $1"
  "${@:2}" > "$folder/$1.txt" 2>&1 || { failed=1; echo "gpu_check: $1 FAILED, see $folder/$1.txt" >&2; }
  tail -n 3 "$folder/$1.txt"
}
step tests "$python" -m pytest tests -q -m gpu
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do
    step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest tests/kernels -q -m gpu
  done
else
  echo "gpu_check: no compute-sanitizer here: memory and races were not checked" | tee "$folder/sanitizer.txt"
fi
step benchmark "$python" benchmarks/kernels.py --device cuda
exit $failed
