#!/usr/bin/env bash
# Everything a GPU can tell in under ten minutes:  bash bench/gpu.sh OUT
#
# From a bare checkout, without a network: builds, runs the GPU tests, times, and writes at most 8 small files to OUT as it
# goes, the most informative part first, so that a run cut short is still of use. A part that fails or exceeds its time is
# reported and the next one starts. Then, in the repository:  python -m lcconformer bench --import OUT
#
# Without a GPU it goes through the same parts with tiny shapes on the CPU (Triton interpreted) and says what is missing.
# LCCONFORMER_COMMIT names the commit where the sources come without their history; PYTHON names the interpreter.
set -u

if [ $# -ne 1 ]; then
  echo "usage: bash bench/gpu.sh OUT" >&2
  exit 2
fi
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
python=$(command -v "${PYTHON:-python3}") || { echo "no ${PYTHON:-python3} on PATH" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
deadline=$((SECONDS + 570)) patience=1 failed=0

export PYTHONPATH="$work/site" PYTHONUNBUFFERED=1 TQDM_DISABLE=1 MPLBACKEND=Agg
export LCCONFORMER_COMMIT="${LCCONFORMER_COMMIT:-$(git -C "$repo" rev-parse --short=10 HEAD 2>/dev/null || echo unknown)}"

say() { echo "$*" | tee -a "$out/summary.txt"; }

# stage NAME SECONDS COMMAND...: run a part; stop it after its seconds, or when the time for everything is up
stage() {
  local name=$1 limit=$2 left=$((deadline - SECONDS)) begin=$SECONDS status
  shift 2
  if [ "$left" -lt 10 ]; then
    say "-- $name: no time left"
    return
  fi
  limit=$((limit * patience))
  [ "$limit" -gt "$left" ] && limit=$left
  echo "== $name (at most ${limit} s)" >>"$out/log.txt"
  (timeout -s INT -k 10 "$limit" "$@") >"$work/stage.txt" 2>&1
  status=$?
  cat "$work/stage.txt" >>"$out/log.txt"
  case $status in
    0) say "ok $name ($((SECONDS - begin)) s)" ;;
    124 | 130 | 137) say "-- $name: stopped after $((SECONDS - begin)) s; what it finished is kept" ;;
    *)
      failed=$((failed + 1))
      say "!! $name: failed with code $status after $((SECONDS - begin)) s"
      tail -n 5 "$work/stage.txt" | sed 's/^/     /' | tee -a "$out/summary.txt"
      ;;
  esac
}

build() {
  mkdir -p "$work/source" "$work/site"
  tar -C "$repo" --exclude=./.git --exclude=./build --exclude='*.so' -cf - . | tar -C "$work/source" -xf -
  "$python" -m pip install --no-deps --no-build-isolation --no-compile --target "$work/site" "$work/source" && return
  echo "pip could not build here: the Python parts alone, without the compiled extension"
  cp -r "$work/source/lcconformer" "$work/site/"
  cp -r "$work/source/kernels" "$work/source/bench" "$work/site/lcconformer/"
  return 1
}
export -f build
export python repo work

bench() {
  stage "$1" "$2" env LCCONFORMER_STRICT=1 "$python" -m lcconformer bench --device "$device" --json "$out/bench.json" "${@:3}"
}

: >"$out/summary.txt"
: >"$out/log.txt"
# leave the checkout, whose lcconformer/ would shadow the built package
cd "$work" || exit 2

say "commit $LCCONFORMER_COMMIT, $("$python" --version), $(date -u +%Y-%m-%dT%H:%MZ)"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | tee -a "$out/summary.txt"
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  device=cuda
  latency="1x100,1x400" batches="8x400,32x400" long="32x1500" train="8x400,32x400" odd="3x203"
  widths=(256 512 768) tiny=() doctor=()
else
  device=cpu
  say "missing: a GPU that torch can use. Dry run: tiny shapes on the CPU, Triton interpreted; its times mean nothing"
  export TRITON_INTERPRET=1 LCCONFORMER_CUDA=0 OMP_NUM_THREADS=1
  # the ten minutes are for a GPU; a busy laptop may take longer
  deadline=$((SECONDS + 3600)) patience=10
  latency="1x8" batches="2x8" long="1x17" train="2x8" odd="2x7"
  widths=(32) tiny=(--layers 2 --rounds 1 --threads 1) doctor=(--frames 9)
fi
for tool in nvcc compute-sanitizer; do
  command -v "$tool" >/dev/null || say "missing: $tool on PATH"
done
for package in triton pytest torchaudio transformers; do
  "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$package') is None)" ||
    say "missing: the Python package $package"
done

plain="eager,sdpa,torchaudio,transformers,lcconformer"
compiled="eager,compile,lcconformer"
width=${widths[0]}
small=(${tiny[@]+"${tiny[@]}"} --d-model "$width")

stage "build" 150 bash -c build
stage "info" 30 "$python" -m lcconformer info
bench "inference, latency, d=$width" 45 --shapes "$latency" --providers "$plain" "${small[@]}"
bench "training, d=$width" 60 --mode training --shapes "$train" --providers "$plain" "${small[@]}"
bench "inference, batches, d=$width" 45 --shapes "$batches,$long" --providers "$plain" "${small[@]}"
stage "GPU tests" 180 "$python" -m lcconformer.bench.gpu.gpu_tests "$out/gpu_tests.xml" "$repo" --seconds 165
stage "errors against float64" 60 "$python" -m lcconformer doctor --device "$device" ${doctor[@]+"${doctor[@]}"}
bench "ops, d=$width" 60 --mode ops --shapes "$batches,$long" --providers eager,sdpa,lcconformer "${small[@]}"
bench "inference against torch.compile, d=$width" 90 --shapes "$latency,$batches" --providers "$compiled" "${small[@]}"
bench "training against torch.compile, d=$width" 120 --mode training --shapes "$train" --providers "$compiled" "${small[@]}"
bench "training, long, d=$width" 45 --mode training --shapes "$long" --providers "$plain" "${small[@]}"
if [ "$device" = cuda ]; then
  # choose between cuBLAS with pointwise kernels around it and GEMMs with those steps inside; the choice goes to OUT
  for shape in "32 400" "1 100" "8 400"; do
    : >"$work/stage.txt"
    stage "tune the feed-forward, ${shape/ /x}, d=$width" 100 "$python" -m lcconformer tune --op feed_forward \
      --batch "${shape% *}" --frames "${shape#* }" --d-model "$width" --folder "$out"
    grep -h '^feed_forward' "$work/stage.txt" >>"$out/summary.txt"
  done
fi
for wide in "${widths[@]:1}"; do
  bench "inference, d=$wide" 30 --shapes "$latency,$batches" --providers "$plain" --d-model "$wide"
  bench "training, d=$wide" 40 --mode training --shapes "$train" --providers "$plain" --d-model "$wide"
done
constants=(--device "$device")
[ "$device" = cpu ] && constants+=(--small)
stage "constants of the machine" 60 "$python" -m lcconformer.bench.gpu.constants "$out/machine.json" "${constants[@]}"
sanitizer=()
command -v compute-sanitizer >/dev/null && sanitizer=(compute-sanitizer --tool memcheck --error-exitcode 9)
stage "ops under compute-sanitizer" 60 ${sanitizer[@]+"${sanitizer[@]}"} "$python" -m lcconformer bench --mode ops \
  --device "$device" --shapes "$odd" --d-model 64 --rounds 1 --providers lcconformer:triton,lcconformer:cuda
bench "training under autocast, d=$width" 40 --mode training --shapes "$train" --providers "$plain" --dtype amp "${small[@]}"
stage "ladder, inference" 30 "$python" -m lcconformer bench --ladder --device "$device" --shapes "$latency" "${small[@]}"
stage "ladder, training" 30 "$python" -m lcconformer bench --ladder --mode training --device "$device" --shapes "$train" \
  "${small[@]}"

"$python" -m lcconformer.bench.reports.goals "$out/bench.json" | tee -a "$out/summary.txt"
say "$((SECONDS)) s, $failed parts failed; $(find "$out" -type f | wc -l) files in $out"
grep -h -A 200 '^step ' "$out/log.txt" | head -n 60
exit 0
