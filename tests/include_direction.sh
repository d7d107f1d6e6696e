#!/usr/bin/env bash
# Holds the include direction: every #include "..." names a file of this tree, in a folder that the including one may
# use. Prints each line that does not, and exits 1 when there is one.
#
#   tests/include_direction.sh [ROOT]
set -euo pipefail
cd "${1:-"$(dirname "$0")/.."}"

# What a folder may include beside itself, by the names that #include lines begin with. A folder takes its row before it
# takes its files: one without a row is an error here.
declare -A may=(
  [src/core]=""
  [kernels]="core"
  [src/comm]="core kernels"
  [src/data]="core comm"
  [src/model]="core kernels comm"
  [checkpoints]="core comm model"
  [src/distill]="core kernels comm model"
  [src/pipeline]="core kernels comm data model distill checkpoints"
  [src/eval]="core kernels comm data model distill checkpoints pipeline"
  [src/train]="core kernels comm data model distill checkpoints pipeline eval"
  [src/plan]="core kernels comm data model distill checkpoints pipeline eval train"
  [src/cli]="core kernels comm data model distill checkpoints pipeline eval train plan"
)

bad=0
complain() {
  echo "$*"
  bad=1
}

lines=0
while IFS=: read -r file line text; do
  [[ $text =~ ^[[:space:]]*#[[:space:]]*include[[:space:]]*\"([^\"]+)\" ]] || continue
  included=${BASH_REMATCH[1]}
  lines=$((lines + 1))
  folder=${file%%/*}
  if [ "$folder" = src ]; then
    rest=${file#src/}
    folder=src/${rest%%/*}
  fi
  if [ -z "${may[$folder]+known}" ]; then
    complain "$file: folder $folder has no row in tests/include_direction.sh"
    continue
  fi
  target=${included%%/*}
  if [ ! -f "src/$included" ] && [ ! -f "$included" ]; then
    complain "$file:$line: \"$included\" is no path from the root or from src/"
  elif [ "$target" != "${folder##*/}" ] && [[ " ${may[$folder]} " != *" $target "* ]]; then
    complain "$file:$line: $folder must not include \"$included\"; it may include: ${may[$folder]:-nothing of ours}"
  fi
done < <(grep -rnE '^[[:space:]]*#[[:space:]]*include[[:space:]]*"' src kernels checkpoints \
  --include='*.h' --include='*.cpp' --include='*.cu' --include='*.cuh' --include='*.in')

# Kernels reach their device code through kernels/NAME.cpp alone.
while IFS=: read -r file line text; do
  case "$file" in kernels/*) ;; *) complain "$file:$line: device code is for kernels/ alone: $text" ;; esac
done < <(grep -rnE '#[[:space:]]*include[[:space:]]*"kernels/(cpu|cuda|dispatch)' src checkpoints || true)

if [ "$lines" -eq 0 ]; then complain "no #include lines found in $PWD"; fi
exit "$bad"
