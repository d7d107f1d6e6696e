#!/usr/bin/env bash
# What PROGRAM takes from the CUDA libraries, STAND_IN must have: exports.sh PROGRAM STAND_IN.
set -euo pipefail

# cudnn-frontend's CUDA graphs and runtime-compiled norms, which no operation of ours reaches.
unreached='^(cudaGraphRetainUserObject|cudaLibrary.*|cudaUserObject.*'
unreached+='|cudaThreadExchangeStreamCaptureMode)$'

wanted=$(nm -D --undefined-only "$1" | grep -oE '\b_?_?(cuda|cublas|cudnn|nccl)[A-Za-z0-9_]*' | sort -u)
exported=$(nm -D --defined-only "$2" | awk '{ print $3 }' | sort -u)
missing=$(comm -23 <(echo "$wanted") <(echo "$exported") | grep -vE "$unreached" || true)
[ -n "$wanted" ] || { echo "$1 takes nothing from the CUDA libraries: are they linked statically?" >&2; exit 1; }
[ -z "$missing" ] || { echo "the stand-in lacks:" $missing >&2; exit 1; }
