#!/usr/bin/env bash
# The kernel's tests and the GPU rows of the benchmarks: benchmarks/gpu.sh DATA OUT [SIZE]
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=src:tests
python3 -m pytest -q tests/test_attention.py -k "kernel" -p no:cacheprovider
python3 benchmarks/gpu.py --data "$1" --out "$2" --size "${3:-7B}"
