#!/usr/bin/env bash
# The kernel's tests and the GPU rows of the benchmarks: benchmarks/gpu.sh DATA OUT [SIZE]
# With more than one GPU, lookahead parallelism as well: the same tokens, and tokens per second.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=src:tests
python3 -m pytest -q tests/test_attention.py -k "kernel" -p no:cacheprovider
python3 benchmarks/gpu.py --data "$1" --out "$2" --size "${3:-7B}"
gpus=$(nvidia-smi -L | wc -l)
if [ "$gpus" -gt 1 ]; then
    prompts="$1/data/humaneval/HumanEval.jsonl"
    for ranks in $(seq 2 "$gpus"); do
        run="torchrun --nproc-per-node $ranks -m lookahead_decoding"
        $run verify pocket --prompts "$prompts" --limit 20 --temperature 0.8
        $run bench pocket --prompts "$prompts" --limit 20 --dtype bfloat16 \
            --methods autoregressive,lookahead,parallel --json "$2/parallel-$ranks.json"
    done
fi
