#!/usr/bin/env bash
# Installs what the build, the tests and the quickstart need from Debian 12 or Ubuntu 24.04 packages, as root or through
# sudo. Says what it installed; does nothing when everything is there.
#
#   tools/bootstrap.sh            build and run
#   tools/bootstrap.sh --dev      also clang-format and clang-tidy
#   tools/bootstrap.sh --slurm    also Slurm, for the tests that start one on this machine
set -euo pipefail

packages=(
  g++ cmake ninja-build pkg-config ccache git ca-certificates python3 python3-venv
  libtomlplusplus-dev libhdf5-dev libopenblas-dev libcli11-dev nlohmann-json3-dev libfmt-dev libspdlog-dev libxxhash-dev
  libopenmpi-dev openmpi-bin procps
  libgtest-dev
)
for argument in "$@"; do
  case "$argument" in
    --dev) packages+=(clang-format clang-tidy) ;;
    --slurm) packages+=(slurmctld slurmd slurm-client munge) ;;
    *) echo "bootstrap: unknown option '$argument'; accepted: --dev, --slurm" >&2; exit 2 ;;
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
if [ ${#missing[@]} -eq 0 ]; then
  echo "bootstrap: all ${#packages[@]} packages are installed"
  exit 0
fi
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null; then
    echo "bootstrap: needs root or sudo to install: ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi
echo "bootstrap: installing ${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { "${as_root[@]}" apt-get update -q && "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q \
  --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
  tail -n 20 "$log" >&2
  echo "bootstrap: installation failed" >&2
  exit 1
fi
echo "bootstrap: installed ${#missing[@]} packages"
