#!/usr/bin/env bash
# What is measured on a GPU, in stages, most telling first; each has its own time limit, and goes on when one fails.
#   benchmarks/gpu.sh OUT A      then, in a second run of nine minutes:      benchmarks/gpu.sh OUT B
#   benchmarks/gpu.sh OUT dry    every stage's code on a CPU, in tiny shapes
#   benchmarks/gpu.sh OUT --stage step --contexts 32768        one stage
# Works from a checkout with torch, triton and transformers; other packages come from wheels in .whl/, offline.
set -u
cd "$(dirname "$0")/.."
out=$1 plan=${2:-A}
shift $(($# > 1 ? 2 : 1))
mkdir -p "$out"
scratch=$(mktemp -d)
export PYTHONUNBUFFERED=1 PYTHONPATH="$scratch/site:src:." HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export TORCHINDUCTOR_CACHE_DIR="$scratch/inductor" TRITON_CACHE_DIR="$scratch/triton"
if ls .whl/*.whl > /dev/null 2>&1; then
    python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$scratch/site" .whl/*.whl
fi
python=${PYTHON:-python3}
stage() {  # name, limit in seconds, arguments
    local name=$1 limit=$2
    shift 2
    run "$name" "$limit" "$python" benchmarks/gpu.py "$@" --results "$out/results.jsonl"
}
run() {  # name, limit in seconds, command
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    timeout -k 5 "$limit" "$@" > "$scratch/$name.log" 2>&1
    local rc=$?
    { echo "=== $name: exit $rc after $((SECONDS - start)) s"; cat "$scratch/$name.log"; } >> "$out/log.txt"
    echo "=== $name: exit $rc after $((SECONDS - start)) s"
}
ranks() {
    run ranks 120 "$python" -m torch.distributed.run --nproc-per-node 2 benchmarks/gpu.py ranks "$@" \
        --results "$out/results.jsonl"
}
case $plan in
A)
    stage env 60 env
    stage kernel 90 kernel
    stage tiny 90 tiny
    stage step 110 step --contexts 1024,8192 --rows 1,16,64,128
    stage profile 45 profile --rows 1,64
    if "$python" -c 'import pytest' 2> /dev/null; then run tests 120 "$python" -m pytest -x -m gpu tests/test_gpu.py; fi
    ;;
B)
    stage answers 170 answers
    stage step-7b 70 step --shape Llama-2-7B --rows 1,16,64,128
    stage long 60 step --contexts 32768 --rows 1,64
    stage smol 40 step --shape SmolLM2-135M --rows 1,16,64
    stage full 150 step --mode compiled --rows 1,64
    if [ "$("$python" -c 'import torch; print(torch.cuda.device_count())')" -gt 1 ]; then ranks; fi
    ;;
dry)
    export TRITON_INTERPRET=1
    for name in env kernel tiny step profile answers; do stage "$name" 200 "$name" --dry; done
    ranks --dry
    ;;
--stage) stage "$1" 540 "$@" ;;
*)
    echo "benchmarks/gpu.sh OUT [A|B|dry|--stage NAME ...]" >&2
    exit 2
    ;;
esac
"$python" benchmarks/gpu.py report --results "$out/results.jsonl" | tee "$out/report.txt"
