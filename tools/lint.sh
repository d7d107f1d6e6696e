#!/usr/bin/env bash
# clang-tidy over our sources with the compile commands of preset cpu: tools/lint.sh [file ...]
set -euo pipefail
cd "$(dirname "$0")/.."
[ -f build/cpu/compile_commands.json ] || cmake --preset cpu >/dev/null
if [ $# -eq 0 ]; then
  mapfile -t files < <(git ls-files 'src/*.cpp' 'kernels/*.cpp' 'checkpoints/*.cpp')
else
  files=("$@")
fi
printf '%s\0' "${files[@]}" | xargs -0 -n 1 -P "$(nproc)" clang-tidy -p build/cpu --quiet
