#!/usr/bin/env bash
# Installs what the build, the tests and the quickstart need from Debian 12 or Ubuntu 24.04 packages, as root or through
# sudo. Says what it installed; does nothing when everything is there.
#
#   tools/bootstrap.sh            build and run
#   tools/bootstrap.sh --dev      also clang-format and clang-tidy
#   tools/bootstrap.sh --plots    also matplotlib, for tools/report.py
#   tools/bootstrap.sh --slurm    also Slurm, for the tests that start one on this machine
#   tools/bootstrap.sh --cuda     also the headers of cudnn-frontend, from PyPI, into ~/.cache/deltapipe. The driver, the
#                                 CUDA toolkit, cuDNN 9 and NCCL come from NVIDIA's packages and are left to the machine.
set -euo pipefail

packages=(
  g++ cmake ninja-build pkg-config ccache git ca-certificates python3 python3-venv
  libtomlplusplus-dev libhdf5-dev libopenblas-dev libcli11-dev nlohmann-json3-dev libfmt-dev libspdlog-dev libxxhash-dev
  libopenmpi-dev openmpi-bin procps
  libgtest-dev
)
cuda=false
for argument in "$@"; do
  case "$argument" in
    --dev) packages+=(clang-format clang-tidy) ;;
    --plots) packages+=(python3-matplotlib) ;;
    --slurm) packages+=(slurmctld slurmd slurm-client munge) ;;
    --cuda) cuda=true ;;
    *) echo "bootstrap: unknown option '$argument'; accepted: --dev, --plots, --slurm, --cuda" >&2; exit 2 ;;
  esac
done

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
  echo "bootstrap: this system has no apt; install by hand: ${packages[*]}" >&2
  exit 1
fi
missing=()
for package in "${packages[@]}"; do
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)" = installed ] || missing+=("$package")
done
install_missing() {
  local as_root=() log
  if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
      echo "bootstrap: needs root or sudo to install: ${missing[*]}" >&2
      exit 1
    fi
    as_root=(sudo)
  fi
  echo "bootstrap: installing ${missing[*]}"
  log=$(mktemp)
  trap 'rm -f "$log"' RETURN
  if ! { "${as_root[@]}" apt-get update -q && "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q \
    --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "bootstrap: installation failed" >&2
    exit 1
  fi
  echo "bootstrap: installed ${#missing[@]} packages"
}

# The wheel is made for some Python; only its C++ headers are kept.
install_cudnn_frontend() {
  local version=1.32.0 work
  local folder=${XDG_CACHE_HOME:-$HOME/.cache}/deltapipe/cudnn-frontend
  if [ -f "$folder/include/cudnn_frontend.h" ] && [ "$(cat "$folder/version" 2>/dev/null || true)" = "$version" ]; then
    echo "bootstrap: cudnn-frontend $version is in $folder"
    return
  fi
  work=$(mktemp -d)
  trap 'rm -rf "$work"' RETURN
  python3 -m venv "$work/venv"
  if ! "$work/venv/bin/pip" download -q --no-deps --only-binary=:all: -d "$work" "nvidia-cudnn-frontend==$version"; then
    echo "bootstrap: cannot get nvidia-cudnn-frontend $version from PyPI; with its headers at hand, give CMake" \
      "-DDELTAPIPE_CUDNN_FRONTEND=FOLDER, that holds include/cudnn_frontend.h" >&2
    exit 1
  fi
  python3 -m zipfile -e "$work"/nvidia_cudnn_frontend-*.whl "$work/wheel"
  mkdir -p "$folder"
  rm -rf "$folder/include"
  mv "$work/wheel/include" "$folder/include"
  echo "$version" >"$folder/version"
  echo "bootstrap: put the headers of cudnn-frontend $version into $folder"
}

if [ ${#missing[@]} -eq 0 ]; then
  echo "bootstrap: all ${#packages[@]} packages are installed"
else
  install_missing
fi
if $cuda; then install_cudnn_frontend; fi
