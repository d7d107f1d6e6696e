#!/usr/bin/env bash
# Configures and builds one preset: tools/build.sh [cpu|debug|asan] [target ...]. Quiet unless something fails.
set -euo pipefail
cd "$(dirname "$0")/.."
preset=${1:-cpu}
shift || true
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { cmake --preset "$preset" && cmake --build --preset "$preset" ${@:+--target "$@"}; } >"$log" 2>&1; then
  grep -E 'error|warning:|Error|FAILED' -A 12 "$log" | head -n 80 >&2 || tail -n 40 "$log" >&2
  echo "build of preset $preset failed" >&2
  exit 1
fi
echo "built preset $preset in build/$preset"
