#!/usr/bin/env bash
# The paper's comparison on one GPU, in calls of under ten minutes:  bash bench/paper.sh DATA OUT [SECONDS]
#
# DATA is a folder with ls_dev20.zip and, for pretraining, so762_opus10k.zip. From a bare checkout, without a network: Python
# with torch, soundfile, tqdm, filelock, jiwer and matplotlib. It runs `lcconformer reproduce --preset small`: first A and C from
# scratch and their times, then pretraining. After SECONDS (default: 540) it stops behind a checkpoint, and the same call goes on.
# OUT gets the report of what is complete and the small files of its runs; checkpoints stay in build/paper.
# LCCONFORMER_COMMIT names the commit where the sources come without their history; PYTHON names the interpreter.
set -u

refuse() {
  echo "$*usage: bash bench/paper.sh DATA OUT [SECONDS]   (DATA: the folder of ls_dev20.zip)" >&2
  exit 2
}
for argument in "$@"; do
  case $argument in -*) refuse "unknown option $argument; " ;; esac
done
[ $# -ge 2 ] && [ $# -le 3 ] && [ -f "$1/ls_dev20.zip" ] || refuse
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${PYTHON:-python3}") || { echo "no ${PYTHON:-python3} on PATH" >&2; exit 2; }
data=$(cd "$1" && pwd)
mkdir -p "$2" || exit 2
out=$(cd "$2" && pwd)
work=$repo/build/paper

# the Python parts as they are installed; Triton serves the GPU without the compiled extension
. "$repo/bench/package.sh"
package "$repo" "$work/site" || exit 2
export PYTHONPATH="$work/site" PYTHONUNBUFFERED=1 MPLBACKEND=Agg TRITON_CACHE_DIR="$work/triton"
export LCCONFORMER_COMMIT="${LCCONFORMER_COMMIT:-$(git -C "$repo" rev-parse --short=10 HEAD 2>/dev/null || echo unknown)}"
cd "$work" || exit 2  # away from the checkout, whose lcconformer/ would shadow the copy

more=()
[ -f "$data/so762_opus10k.zip" ] && more=(--pretrain-data "$data/so762_opus10k.zip")
timeout --signal=TERM --kill-after=60 "${3:-540}" "$python" -m lcconformer reproduce --preset small --out "$work/runs" \
  --data "$data/ls_dev20.zip" --test-speakers 84,422,777,2902 --validation-speakers 1673 "${more[@]}"
code=$?

"$python" -c "import pathlib, sys; from lcconformer.ssl.reproduction import write_report; write_report(pathlib.Path(sys.argv[1]))" \
  "$work/runs" || exit 1
cd "$work/runs" || exit 1
for file in report.html report.md reproduction.json *.png runs/*/result.json runs/*/times.json; do
  [ -f "$file" ] && mkdir -p "$out/$(dirname "$file")" && cp "$file" "$out/$file"
done
case $code in
  0) echo "complete: $out/report.html" ;;
  124 | 143) echo "out of time: the same call goes on; what is complete: $out/report.html" ;;
  *) exit "$code" ;;
esac
