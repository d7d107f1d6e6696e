#!/usr/bin/env bash
# clang-format over all C++ and CUDA sources: tools/format.sh rewrites, tools/format.sh --check only tells.
set -euo pipefail
cd "$(dirname "$0")/.."
mode=(-i)
[ "${1:-}" = --check ] && mode=(--dry-run --Werror)
git ls-files -z '*.cpp' '*.h' '*.cu' '*.cuh' | xargs -0 clang-format "${mode[@]}"
