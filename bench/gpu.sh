#!/usr/bin/env bash
# Everything a GPU can tell, in calls of under ten minutes:  bash bench/gpu.sh OUT [PHASES]
#
# From a bare checkout, without a network. Phases 1-5 (the default) are the first call and 6-8 the second; each begins with
# what tells most, and whatever is finished is in OUT, in at most 8 small files that are whole at any time. A call with an OUT
# that has results goes on where they end. Then, in the repository:  python -m lcconformer bench --import OUT
# bash bench/gpu.sh --plan [PHASES] prints the phases with the seconds that they are expected to take.
#
# Without a GPU it goes through the same phases with tiny shapes on the CPU (Triton interpreted) and says what is missing.
# LCCONFORMER_COMMIT names the commit where the sources come without their history; PYTHON names the interpreter.
set -u

refuse() {
  echo "$*usage: bash bench/gpu.sh OUT [PHASES]   or   bash bench/gpu.sh --plan [PHASES]" >&2
  exit 2
}
[ $# -ge 1 ] && [ $# -le 2 ] || refuse
case $1 in --plan) ;; -*) refuse "unknown option $1; " ;; esac
case ${2:-} in -*) refuse "unknown option $2; " ;; esac
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${PYTHON:-python3}") || { echo "no ${PYTHON:-python3} on PATH" >&2; exit 2; }
if [ "$1" = --plan ]; then
  exec "$python" "$repo/bench/gpu/driver.py" --plan OUT "${2:-1-8}"
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)

# what was built and compiled serves the next call too, unless the checkout is read-only
work=$repo/build/gpu
mkdir -p "$work" 2>/dev/null && [ -w "$work" ] || { work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT; }
# the Python parts as they are installed; the driver compiles the extension beside them
. "$repo/bench/package.sh"
package "$repo" "$work/site" || exit 2

export PYTHONPATH="$work/site" PYTHONUNBUFFERED=1 TQDM_DISABLE=1 MPLBACKEND=Agg LCCONFORMER_STRICT=1
export TRITON_CACHE_DIR="$work/triton" TORCHINDUCTOR_CACHE_DIR="$work/inductor"
export LCCONFORMER_COMMIT="${LCCONFORMER_COMMIT:-$(git -C "$repo" rev-parse --short=10 HEAD 2>/dev/null || echo unknown)}"
# tells this call from an earlier one with the same OUT
export LCCONFORMER_GPU_CALL="$$ $(date -u +%Y-%m-%dT%H:%M:%SZ)"

say() { echo "$*" | tee -a "$out/summary.txt"; }

say "commit $LCCONFORMER_COMMIT, $("$python" --version), $(date -u +%Y-%m-%dT%H:%MZ)"
gpu=0
if nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | tee -a "$out/summary.txt" |
  grep . && "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  gpu=1
else
  say "missing: a GPU that torch can use. Dry run: tiny shapes on the CPU, Triton interpreted; its times mean nothing"
  export TRITON_INTERPRET=1 LCCONFORMER_CUDA=0 OMP_NUM_THREADS=1
fi
for tool in nvcc compute-sanitizer ncu; do
  PATH=$PATH:/usr/local/cuda/bin command -v "$tool" >/dev/null || say "missing: $tool on PATH"
done
for package in triton pytest torchaudio transformers; do
  "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$package') is None)" ||
    say "missing: the Python package $package"
done

# away from the checkout, whose lcconformer/ would shadow the built package
cd "$work" || exit 2
"$python" "$work/site/lcconformer/bench/gpu/driver.py" --gpu "$gpu" --repo "$repo" --work "$work" "$out" "${2:-1-5}"
