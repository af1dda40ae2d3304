#!/usr/bin/env bash
# Usage: scripts/wheelhouse.sh PYTHON      (for example 3.12: the minor version of the image's interpreter)
# Downloads the wheels of the image into build/wheelhouse/PYTHON: locked/ with hashes from requirements/run.txt, torch/ with
# what torch brings beside it (hashes from requirements/cuda.txt where it is the package index's), uv/ to install them. What is there already is kept: the second call asks no index.
# Environment: PIP_FIND_LINKS (a folder of wheels that torch may come from) or TORCH_BACKEND (cpu, cu126, … as uv knows them);
#   without both it is the build with CUDA that the package index has.
# Standard output: the folder and the key of its content, with a tab between.
# Exit codes: 0 done, 2 bad input, 3 a tool is missing, 10 no room, 11 the package index does not answer.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=wheels
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"

# key PYTHON: what the wheels depend on.
key() {
  { cat requirements/{run,torch,cuda,uv}.txt && printf '%s\n' "$1" "${TORCH_FROM[*]}"; } | sha256sum | cut -c1-16
}

# flat PYTHON FILE OPTION…: what of a requirements file holds on the image's platform, whatever this machine is; pip itself
# would judge the markers by this machine.
flat() {
  uv pip compile -q --no-header --no-annotate --python-platform x86_64-manylinux_2_28 --python-version "$1" \
    "${TORCH_FROM[@]}" "${@:3}" "$2"
}

# with_hashes LOCK: the pins on standard input with the lock's own hashes: pip compile would take those of the index. Fails
# for a pin that the lock doesn't have.
with_hashes() {
  awk 'NR == FNR { lacks[$1]; next }
    /^[^ #]/ { shown = $1 in lacks; delete lacks[$1]; if (shown) print $1 " \\" }
    shown && /--hash=/
    END { for (pin in lacks) { print pin " is not in the lock" >"/dev/stderr"; exit 1 } }' - "$1"
}

# fetch PYTHON FOLDER FILE: exactly these wheels, no others.
fetch() {
  python -m pip download -qq --disable-pip-version-check --only-binary=:all: --no-cache-dir --no-deps \
    --python-version "$1" --implementation cp --abi "cp${1/./}" --abi abi3 --abi none \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_26_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux_2_12_x86_64 \
    --platform manylinux2010_x86_64 --platform manylinux_2_5_x86_64 --platform manylinux1_x86_64 --platform linux_x86_64 \
    -d "$2" -r "$3" >&2
}

# repack PYTHON FOLDER REQUIREMENT: a wheel out of what uv installs. Builds with a local version (+cpu, +cu126) stand on
# indexes that uv knows by TORCH_BACKEND and pip doesn't.
repack() {
  local tree=$2/.tree tag
  rm -rf -- "$tree"
  uv pip install -q --no-deps --target "$tree" --python-platform x86_64-manylinux_2_28 --python-version "$1" \
    "${TORCH_FROM[@]}" "$3" || return
  tag=$(sed -n 's/^Tag: //p' "$tree"/torch-*.dist-info/WHEEL | head -n 1)
  (cd "$tree" && python -m zipfile -c "../torch-${3#*==}-$tag.whl" ./*) || return
  rm -rf -- "$tree"
}

# fetch_all PYTHON FOLDER: the lock keeps its hashes; of torch's wheels only those that the lock doesn't have.
fetch_all() {
  local python=$1 folder=$2
  local -a bounds=(--constraint requirements/run.txt)
  ((${#TORCH_FROM[@]})) || bounds+=(--constraint requirements/cuda.txt)
  flat "$python" requirements/run.txt | with_hashes requirements/run.txt >"$folder/locked.txt" || return
  flat "$python" requirements/uv.txt | with_hashes requirements/uv.txt >"$folder/uv.txt" || return
  flat "$python" requirements/torch.txt "${bounds[@]}" >"$folder/with-torch.txt" || return
  grep -vxFf <(grep -oE '^[^ ]+==[^ ]+' "$folder/locked.txt") "$folder/with-torch.txt" >"$folder/torch.txt" || return
  if ((${#TORCH_FROM[@]} == 0)); then
    mv -- "$folder/torch.txt" "$folder/pins.txt" && with_hashes requirements/cuda.txt <"$folder/pins.txt" >"$folder/torch.txt" || return
  fi
  fetch "$python" "$folder/locked" "$folder/locked.txt" || return
  fetch "$python" "$folder/uv" "$folder/uv.txt" || return
  if [[ ${TORCH_FROM[0]:-} == --torch-backend ]] && grep -q '^torch==.*+' "$folder/torch.txt"; then
    repack "$python" "$folder/torch" "$(grep '^torch==' "$folder/torch.txt")" || return
    sed -i.all '/^torch==/d' "$folder/torch.txt"
    [[ -s $folder/torch.txt ]] || return 0
  fi
  fetch "$python" "$folder/torch" "$folder/torch.txt"
}

main() {
  case ${1:-} in
    -h | --help) usage "${BASH_SOURCE[0]}" && return 0 ;;
  esac
  [[ ${1:-} =~ ^3\.1[0-9]$ && $# == 1 ]] || die 2 "PYTHON '${1:-}'" 'the minor version of the image, as 3.12' 'scripts/wheelhouse.sh 3.12'
  need_cmd python
  need_cmd uv
  cd "$ROOT"
  TORCH_FROM=()
  if [[ -n ${PIP_FIND_LINKS:-} ]]; then
    TORCH_FROM=(--find-links "$PIP_FIND_LINKS")
  elif [[ -n ${TORCH_BACKEND:-} && $TORCH_BACKEND != auto ]]; then
    TORCH_FROM=(--torch-backend "$TORCH_BACKEND")
  fi
  local python=$1 folder=build/wheelhouse/$1 wanted began=$SECONDS
  wanted=$(key "$python")
  mkdir -p build/wheelhouse 2>/dev/null || die 10 "build/wheelhouse can't be written" 'wheels need up to 4 GB' 'make it writable'
  exec 6>"build/wheelhouse/.$python.lock"
  flock -n 6 || log wheels 'another build downloads them; waiting for it'
  flock -w 3600 6 || die 1 'another download of the wheels takes longer than an hour' 'one at a time' 'stop it'
  if [[ $(cat "$folder/key" 2>/dev/null || true) != "$wanted" ]]; then
    log wheels "for Python $python: the lock, torch and what it brings, into $folder"
    rm -rf -- "$folder"
    mkdir -p "$folder"/{locked,torch,uv} 2>/dev/null || die 10 "$folder can't be written" 'wheels need up to 4 GB' 'make it writable'
    fetch_all "$python" "$folder" ||
      die 11 'the wheels could not be downloaded (lines above)' 'the image is built from the lock, on this machine' \
        'is the package index reachable, is there room? then again'
    printf '%s\n' "$wanted" >"$folder/key"
    log wheels "ok: $(du -sm "$folder" | cut -f1) MB in $((SECONDS - began)) s"
  fi
  printf '%s\t%s\n' "$folder" "$wanted"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
