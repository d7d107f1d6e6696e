#!/usr/bin/env bash
# Makes the Python environment of the interop tests, outside the source tree, or reuses the one made from the same
# requirements.txt. Prints one line of what it did; the last line of stdout is the interpreter's path.
#
#   python=$(tests/interop/venv.sh | tail -n 1)
#
# DELTAPIPE_INTEROP_VENV  folder of the environment, made anew when requirements.txt has changed (default:
#                         ~/.cache/deltapipe/interop-HASH, so that checkouts with other requirements keep theirs)
# PYTHON                  interpreter to make it with, 3.11 or newer (default: python3)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
key=$(sha256sum <"$here/requirements.txt" | cut -c 1-12)
venv=${DELTAPIPE_INTEROP_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/deltapipe/interop-$key}
base_python=${PYTHON:-python3}
python=$venv/bin/python

die() { echo "venv.sh: $*" >&2; exit 1; }

# PyPI's Linux wheel of torch links against a dozen CUDA libraries that are loaded with it even where no GPU will ever be
# used. For those that the environment does not hold, a library that defines the wanted symbols and does nothing is enough.
# Copies installed elsewhere on the machine are not used: they may be of another version.
stub_cuda_libraries() {
  local site=$1 work=$2 lib=$1/torch/lib soname version
  type cc nm readelf >/dev/null 2>&1 || return 1
  nm -D --undefined-only "$lib"/lib*.so >"$work/undefined" 2>/dev/null
  readelf -VW "$lib"/lib*.so >"$work/versions" 2>/dev/null
  for soname in $(readelf -dW "$lib"/lib*.so | sed -nE 's/.*\(NEEDED\).*\[(lib(cu|nv|nccl)[^]]*)\]/\1/p' | sort -u); do
    [ "$soname" != libcuda.so.1 ] || continue  # the driver's; torch itself copes without it
    [ -z "$(find "$site/torch/lib" "$site/nvidia" -name "$soname")" ] || continue
    version=$(awk -v file="$soname" '$0 ~ "File: " file " " { getline; print $3; exit }' "$work/versions")
    # NCCL, cuSPARSELt and cuFile do not version their symbols: told by prefix, and any stub may define them.
    { sed -nE "s/.* U ([A-Za-z0-9_]+)@${version:-$soname}\$/\1/p" "$work/undefined"
      sed -nE "s/.* U ((nccl|cusparseLt|cuFile)[A-Za-z0-9_]*)\$/\1/p" "$work/undefined"; } |
      sort -u | sed 's/.*/char &;/' >"$work/stub.c"
    echo "${version:-$soname} { global: *; };" >"$work/stub.map"
    cc -shared -nostdlib -w -Wl,-soname,"$soname" -Wl,--version-script="$work/stub.map" -o "$lib/$soname" "$work/stub.c"
  done
}

make_venv() {
  local work site how='GPU-only libraries stubbed'
  if [ -e "$venv" ]; then
    [ -f "$venv/pyvenv.cfg" ] || die "$venv is there and is no virtual environment; set DELTAPIPE_INTEROP_VENV to another folder"
    rm -rf "$venv"
  fi
  "$base_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$base_python is not Python 3.11 or newer; set PYTHON"
  "$base_python" -m venv "$venv" >&2 || die "cannot make $venv; on Debian and Ubuntu: apt-get install python3-venv"
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$here/requirements.txt" >&2 ||
    die "pip could not install $here/requirements.txt"
  work=$(mktemp -d)
  site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  (stub_cuda_libraries "$site" "$work") >&2 || true  # judged by whether torch then works
  if ! "$python" -c 'import torch; torch.ones(2, 2) @ torch.ones(2, 2)' 2>/dev/null; then
    how='with all CUDA libraries'
    rm -rf "$site/torch"
    "$python" -m pip install --quiet --disable-pip-version-check --force-reinstall \
      "$(grep '^torch==' "$here/requirements.txt")" >&2 || die 'pip could not install torch with its dependencies'
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$here/requirements.txt" >&2
  fi
  rm -rf "$work"
  "$python" -c 'import torch, transformers' >&2 || die "torch or transformers cannot be imported from $venv"
  echo "$key" >"$venv/deltapipe.key"
  echo "made $venv: $("$python" -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)'), $how"
}

mkdir -p "$(dirname "$venv")"
exec 9>"$venv.lock"
flock 9  # tests that run side by side wait for the one that makes it
if [ "$(cat "$venv/deltapipe.key" 2>/dev/null)" = "$key" ] && [ -x "$python" ]; then
  echo "reusing $venv"
else
  make_venv
fi
echo "$python"
