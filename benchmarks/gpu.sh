#!/usr/bin/env bash
# The tests on CUDA and the benchmarks with peers, on a machine with a GPU and without network, in under nine minutes.
#
#   python -m benchmarks.peers.fetch PEERS        # first, where there is a network: peers as wheels and single files (4 MB; see there)
#   benchmarks/gpu.sh --out FOLDER [--wheels PEERS]... [--only EXPRESSION] [--no-tests] [--seconds 525] [--dry-run]
#
# --out      benchmarks.json (device, versions, commit, rows), written anew after EVERY case, so that a time-out loses nothing; table.md,
#            ratios.png, roofline.png, tests.log, rehearsal.log, benchmarks.log, build.log
# --wheels   installed without dependencies into a temporary folder: nothing else on the machine changes. Again for a second folder.
# --only     benchmarks by pytest's -k, in one part, and no tests; e.g. "linear_logprob_entropy and size3"
# --no-tests the benchmarks alone, and nothing compiled beforehand
# --seconds  all in all. Parts have budgets of their own; what does not fit is named as skipped.
# --dry-run  the same lanes on the CPU at small shapes (also what happens where there is no GPU)
# Environment: PYTHON (python3), ACPO_COMMIT where the history did not travel along.
#
# A failing test does not stop the benchmarks: every case holds each provider against float64 before it is timed, and ours stops its case
# there. The exit status is that of the worst of them. Parts run in processes of their own: a fault on the device ends one of them.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out= only= tests=1 seconds=525 device=cuda shapes=large threads=2 wheels=()
while [ $# -gt 0 ]; do
  case "$1" in
    --out) out=$2; shift 2 ;;
    --wheels) wheels+=("$(cd "$2" && pwd)") || exit 2; shift 2 ;;
    --only) only=$2 tests=; shift 2 ;;
    --no-tests) tests=; shift ;;
    --seconds) seconds=$2; shift 2 ;;
    --dry-run) device=cpu; shift ;;
    *) sed -n '2,21p' "$0" >&2; exit 2 ;;
  esac
done
[ -n "$out" ] || { echo "--out FOLDER is missing" >&2; exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$root" || exit 2  # behind the options, whose paths are the caller's
python=${PYTHON:-python3}
begin=$SECONDS worst=0
left() { echo $(( seconds - (SECONDS - begin) )); }
note() { echo "[$(( SECONDS - begin )) s] $*"; }

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
for folder in ${wheels[@]+"${wheels[@]}"}; do
  if ls "$folder"/*.whl >/dev/null 2>&1; then
    install=("$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site")
    # One wheel that does not fit this Python stops pip: then each by itself, and what is missing is named in the table.
    "${install[@]}" "$folder"/*.whl 2>/dev/null || for wheel in "$folder"/*.whl; do
      "${install[@]}" "$wheel" 2>/dev/null || note "does not install here: $(basename "$wheel")"
    done
  fi
  [ ! -d "$folder/files" ] || export ACPO_PEER_FILES="$folder/files"
done
if [ "$device" = cuda ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  note "no CUDA device: a dry run on the CPU"
  device=cpu
fi
if [ "$device" = cpu ]; then  # small shapes only tie two threads up, and compiling is most of their time
  shapes=small threads=1
  export TORCH_COMPILE_DISABLE=1
fi

# Beside the tests: CUDA has its own kernels, but the segmenter and the training step need the extension.
build=
if ! "$python" -c 'import acpo_kernels._C' 2>/dev/null; then
  note "building the extension (build.log)"
  timeout 150 "$python" setup.py -q build_ext --inplace >"$out/build.log" 2>&1 & build=$!
fi
"$python" -c 'import platform, torch, triton; print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)' || exit 1

# 1. The tests of every operation on this device, the heavy ones first, in several processes where pytest-xdist is there (compiling is most of it).
# Beside them what the benchmarks compile, which is most of their time too: Triton and torch.compile keep it on the disk.
rehearse() {
  timeout -k 5 170 "$python" -m pytest "$@" -q -rs -p no:cacheprovider --benchmark --rehearse --device "$device" --shapes "$shapes" >>"$out/rehearsal.log" 2>&1
}
if [ -n "$tests" ]; then
  if [ "$device" = cuda ]; then
    rehearse benchmarks/bench_{logprob_entropy,hindsight_information,linear_hindsight_information}.py & rehearsals=$!
    rehearse benchmarks/bench_{linear_logprob_entropy,whole_loss,linear_policy_loss}.py & rehearsals+=" $!"
    files=() many=()
    for name in logprob_entropy{,_edges,_backward} linear_logprob_entropy{,_edges} linear_policy_loss{,_edges,_properties} hindsight_information \
      policy_loss{,_edges,_properties} segment_credit segment_reduce chunks segments policy; do
      files+=("tests/test_$name.py")
    done
    "$python" -c 'import xdist' 2>/dev/null && many=(-n "$(( $(nproc) > 3 ? $(nproc) - 1 : 2 ))" --dist worksteal)
    timeout -k 5 170 "$python" -m pytest "${files[@]}" -q -p no:cacheprovider ${many[@]+"${many[@]}"} -k cuda >"$out/tests.log" 2>&1
  else
    timeout -k 5 60 "$python" -m pytest tests/test_segment_reduce.py -q -p no:cacheprovider -k "by_hand or reference" >"$out/tests.log" 2>&1
  fi
  status=$?
  [ $status = 0 ] || worst=$status
  grep -aE "^(FAILED|ERROR)" "$out/tests.log" | head -20
  wait ${rehearsals-}
  note "tests: $(tail -1 "$out/tests.log")$([ $status != 124 ] || echo ' (cut off: not all of them ran)')"
fi
if [ -n "$build" ]; then
  wait "$build" || { worst=1; note "no C++ extension: $(tail -1 "$out/build.log")"; }
fi

# 2. Benchmarks, what matters most first: part SECONDS EXPRESSION FILE...
part() {
  local limit=$1 expression=$2 spare=15 status
  shift 2
  [ "$limit" -le $(( $(left) - spare )) ] || limit=$(( $(left) - spare ))
  if [ "$limit" -lt 15 ]; then
    note "skipped, no time is left: $* $expression"
    return
  fi
  timeout -k 5 "$limit" "$python" -m pytest "$@" -q -rs -p no:cacheprovider --benchmark --device "$device" --threads "$threads" --shapes "$shapes" \
    --limit $(( limit * 3 / 4 )) --rows "$out/benchmarks.json" ${expression:+-k "$expression"} >>"$out/benchmarks.log" 2>&1
  status=$?
  [ $status = 0 ] || [ $status = 5 ] || worst=$status  # 5: no such case at these shapes
  note "$* ${expression:+($expression)}: $([ $status = 124 ] && echo "cut off after $limit s" || tail -1 "$out/benchmarks.log")"
}
rm -f "$out/benchmarks.json" "$out/benchmarks.log"
if [ -n "$only" ]; then
  part "$(left)" "$only" benchmarks
elif [ "$device" = cpu ]; then  # a dry run: every file, one type, few processes
  part 90 "not bfloat16" benchmarks/bench_logprob_entropy.py benchmarks/bench_linear_logprob_entropy.py benchmarks/bench_whole_loss.py
  part 90 "not bfloat16" \
    benchmarks/bench_hindsight_information.py benchmarks/bench_linear_hindsight_information.py benchmarks/bench_policy_loss.py \
    benchmarks/bench_segment_credit.py benchmarks/bench_segment_reduce.py benchmarks/bench_linear_policy_loss.py benchmarks/bench_empty_call.py
  part 60 "mixed" benchmarks/bench_step.py
else
  part 110 "" benchmarks/bench_logprob_entropy.py
  part 130 "forward+backward" benchmarks/bench_linear_logprob_entropy.py
  part 70 "" benchmarks/bench_whole_loss.py
  part 60 "" benchmarks/bench_hindsight_information.py benchmarks/bench_linear_hindsight_information.py
  part 60 "" benchmarks/bench_policy_loss.py benchmarks/bench_segment_credit.py benchmarks/bench_segment_reduce.py
  part 60 "" benchmarks/bench_linear_policy_loss.py
  part 60 "" benchmarks/bench_step.py
  part 60 "not forward+backward" benchmarks/bench_linear_logprob_entropy.py
  part 30 "" benchmarks/bench_empty_call.py
fi

# 3. The table and the plots.
if [ -f "$out/benchmarks.json" ]; then
  "$python" -m benchmarks.report "$out/benchmarks.json" --out "$out" >"$out/table.md" 2>&1 || worst=1
  cat "$out/table.md"
else
  echo "nothing was measured (benchmarks.log)"; worst=1
fi
note "results in $out, exit status $worst"
exit "$worst"
