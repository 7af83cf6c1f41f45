#!/usr/bin/env bash
# Tests and benchmarks on a machine with a GPU and no network, in under nine minutes: correctness first, then one JSON with the
# device, versions, commit and rows, the table and the plots.
#
#   benchmarks/gpu.sh --out FOLDER [--wheels FOLDER] [--verl verl/utils/kernel/kernels.py] [--only EXPRESSION] [--dry-run]
#
# --wheels   peers as wheels (TRL 1.16, Liger 0.8.5, cut-cross-entropy, quack, nvidia-cutlass-dsl, and what they need that is not there):
#            installed without dependencies into FOLDER/site, nothing else on the machine changes
# --verl     verl's kernel file, read where it lies
# --only     benchmarks by pytest's -k, e.g. "linear_logprob_entropy and not temperature"
# --dry-run  the same lanes on the CPU at small shapes (also what happens where there is no GPU)
# Environment: PYTHON (python3), ACPO_COMMIT where the history did not travel along.
set -euo pipefail
cd "$(dirname "$0")/.."
out= wheels= verl= only= device=cuda shapes=large
while [ $# -gt 0 ]; do
  case "$1" in
    --out) out=$2; shift 2 ;;
    --wheels) wheels=$2; shift 2 ;;
    --verl) verl=$2; shift 2 ;;
    --only) only=$2; shift 2 ;;
    --dry-run) device=cpu; shift ;;
    *) sed -n '2,15p' "$0" >&2; exit 2 ;;
  esac
done
[ -n "$out" ] || { echo "--out FOLDER is missing" >&2; exit 2; }
mkdir -p "$out"; out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
begin=$SECONDS
left() { echo $(( 525 - (SECONDS - begin) )); }  # nine minutes, less what the machine takes to start and stop a process

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ -n "$wheels" ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$out/site" "$wheels"/*.whl
  export PYTHONPATH="$out/site:$PYTHONPATH"
fi
[ -z "$verl" ] || export ACPO_VERL_KERNELS=$verl
if [ "$device" = cuda ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no CUDA device: a dry run on the CPU"
  device=cpu
fi

# The CPU kernels are optional here: without them the operations run on torch, and CUDA has its own.
if ! "$python" -c 'import acpo_kernels._C' 2>/dev/null; then
  timeout 120 "$python" setup.py -q build_ext --inplace >"$out/build.log" 2>&1 || echo "no C++ extension (see build.log): the CPU falls back to torch"
fi
"$python" -c 'import torch, triton, acpo_kernels; print("torch", torch.__version__, "triton", triton.__version__)'

# 1. Correctness: every operation's tests on this device. A failure ends the run: nothing that is wrong is timed.
if [ "$device" = cuda ]; then
  timeout 200 "$python" -m pytest tests -q -x -p no:cacheprovider -k "cuda" 2>&1 | tee "$out/tests.log"
else
  timeout 200 "$python" -m pytest tests/test_segment_reduce.py -q -x -p no:cacheprovider -k "by_hand or reference" 2>&1 | tee "$out/tests.log"
  shapes=small
fi
[ "$device" = cuda ] && threads=2 || threads=1  # of the CPU lane: small shapes only tie two threads up

# 2. Benchmarks: each case is checked against float64 before it is timed; what does not fit the time is named as skipped.
status=0
limit=$(( $(left) - 60 ))
timeout "$(left)" "$python" -m pytest benchmarks -q -rs -p no:cacheprovider --benchmark --device "$device" --threads "$threads" --shapes "$shapes" --limit "$limit" \
  ${only:+-k "$only"} --benchmark-json "$out/benchmarks.json" >"$out/benchmarks.log" 2>&1 || status=$?
grep -E "^(FAILED|ERROR)|passed|failed" "$out/benchmarks.log" || true

# 3. The table and the plots.
"$python" -m benchmarks.report "$out/benchmarks.json" --out "$out" | tee "$out/table.md"
echo "$(( SECONDS - begin )) seconds; results in $out"
exit "$status"
