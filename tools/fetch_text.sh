#!/usr/bin/env bash
# Puts real English text (about 11 MB: the reStructuredText sources of the Python manual) into a folder, from the
# distribution's documentation package, without installing it: tools/fetch_text.sh FOLDER
set -euo pipefail
folder=${1:?usage: tools/fetch_text.sh FOLDER}
if [ -f "$folder/.complete" ]; then
  echo "text is in $folder already"
  exit 0
fi
package=$(apt-cache depends python3-doc 2>/dev/null | sed -n 's/^ *Depends: \(python3\.[0-9]*-doc\)$/\1/p' | head -n 1)
if [ -z "$package" ]; then
  echo "fetch_text: no python3-doc in the package lists; run apt-get update, or point the configuration at other text" >&2
  exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=$work/log
if ! (cd "$work" && apt-get download -q "$package") >"$log" 2>&1; then
  tail -n 5 "$log" >&2
  echo "fetch_text: cannot download $package" >&2
  exit 1
fi
dpkg-deb -x "$work"/"$package"_*.deb "$work/tree"
sources=$(find "$work/tree" -type d -name _sources | head -n 1)
mkdir -p "$folder"
cp -r "$sources"/. "$folder"/
touch "$folder/.complete"
echo "text of $package: $(find "$folder" -name '*.txt' | wc -l) files, $(du -sh "$folder" | cut -f1)"
