#!/usr/bin/env bash
# TensorRT-RTX on a machine without a network, to which 64 MiB travel at a time: pack here, store there, run there.
#   bash bench/gpu/tensorrt.sh pack                 wheels, in pieces of 32 MiB: .trt/0 .trt/1 .trt/2 (git ignores them)
#   bash bench/gpu/tensorrt.sh store                keeps the pieces that travelled with this call
#   bash bench/gpu/tensorrt.sh run [--out DIR] ...  joins and installs them, then the battery's part
set -euo pipefail
cd "$(dirname "$0")/../.."
VERSION=1.7.1.116
KEPT="${KEPT:-/tmp/tensorrt-pieces}" SITE="${SITE:-/tmp/tensorrt-site}" PYTHON="${PYTHON:-python3}"
LIBS=tensorrt_rtx_cu13_libs-$VERSION-py3-none-manylinux_2_28_x86_64.whl

pack() {
  rm -rf .trt && mkdir -p .trt/0 .trt/1 .trt/2
  grep -qsx '/.trt/' .git/info/exclude || echo '/.trt/' >>.git/info/exclude
  "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 -d .trt tensorrt-rtx-cu13-libs==$VERSION tensorrt-rtx-cu13-bindings==$VERSION
  (cd .trt && sha256sum "$LIBS" >0/sum && split -b 32M -d -a 1 "$LIBS" piece. && rm "$LIBS")
  for index in 0 1 2; do mv ".trt/piece.$index" ".trt/$index/"; done
  mv .trt/*.whl .trt/2/
  du -sh .trt/*
}

store() {
  mkdir -p "$KEPT"
  cp .trt/*/* "$KEPT/"
  ls -l "$KEPT"
}

run() {
  store
  (cd "$KEPT" && cat piece.* >"$LIBS" && sha256sum -c sum)
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$SITE" "$KEPT"/*.whl
  PYTHONPATH="$SITE" bash bench/gpu/run.sh --part tensorrt "$@"
}

"$1" "${@:2}"
