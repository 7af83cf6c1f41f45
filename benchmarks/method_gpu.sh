#!/usr/bin/env bash
# The method on a policy of 19 million parameters, on one GPU and without network, in under nine minutes.
#
#   benchmarks/method_gpu.sh --out FOLDER [--seconds 510] [--jobs 10] [--config configs/compare/medium.yaml] [--dry-run]
#
# --out      the runs and results.json, .png, .html of what is finished by then: seed by seed all arms, so that whole pairs remain. The same command
#            with the same folder goes on where it was cut off.
# --jobs     runs at a time on the one GPU: a run this small leaves most of it idle. `nvidia-cuda-mps-control -d` beforehand lets their kernels overlap.
# --dry-run  on the CPU, with the smallest policy, three steps a run and one seed
# Environment: PYTHON (python3).
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out= seconds=510 jobs=10 config=$root/configs/compare/medium.yaml dry=
while [ $# -gt 0 ]; do
  case "$1" in
    --out) out=$2; shift 2 ;;
    --seconds) seconds=$2; shift 2 ;;
    --jobs) jobs=$2; shift 2 ;;
    --config) config=$2; shift 2 ;;
    --dry-run) dry=1; shift ;;
    *) sed -n '2,12p' "$0" >&2; exit 2 ;;
  esac
done
[ -n "$out" ] || { echo "--out FOLDER is missing" >&2; exit 2; }
[ -f "$config" ] || { echo "--config $config: no such file" >&2; exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd) && config=$(cd "$(dirname "$config")" && pwd)/${config##*/} || exit 2
cd "$root" || exit 2  # behind the options, whose paths are the caller's
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
begin=$SECONDS
if [ -n "$dry" ]; then
  sed -e 's/from_config: medium, device: cuda/from_config: tiny, device: cpu/' -e 's/steps: 700, batch: 64/steps: 20, batch: 16/' \
    -e 's/prompts: 8,/prompts: 2,/' -e 's/steps: 40, eval_every: 10/steps: 3, eval_every: 2/' -e 's/^seeds: .*/seeds: 0-0/' -e 's/900-901/900-900/' \
    -e 's/^settings:/settings:\n  eval: {max_problems: 8, samples: 2}/' "$config" >"$out/dry.yaml"
  config=$out/dry.yaml
elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no CUDA device; --dry-run goes without" >&2
  exit 1
fi
if ! "$python" -c 'import acpo_kernels._C' 2>/dev/null; then
  timeout 150 "$python" setup.py -q build_ext --inplace >"$out/build.log" 2>&1 || { echo "the extension does not build: $out/build.log" >&2; exit 1; }
fi
timeout -k 10 $(( seconds - (SECONDS - begin) - 20 )) "$python" -m acpo.cli compare "$config" --dir "$out/runs" --jobs "$jobs"
status=$?
[ $status = 124 ] && echo "[$(( SECONDS - begin )) s] time is over: the table is of what is finished"
"$python" -m acpo.cli compare "$config" --dir "$out/runs" --report || exit 1
[ $status = 0 ] || [ $status = 124 ]
