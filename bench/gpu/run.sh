#!/usr/bin/env bash
# The battery on a bare machine: torch, triton, transformers, pydantic and click suffice; nothing is installed.
#   bash bench/gpu/run.sh [--out DIR] [--part kernels|dit|e2e|peers|skipping|PROFILE]... [--smoke] [--again]
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p .typing && ln -sfn .. .typing/step1x # the checkout's root is the package step1x
export PYTHONPATH="$PWD/.typing${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python3}" -m step1x.bench.battery "$@"
