#!/usr/bin/env bash
# Usage: [ENV=production] scripts/build.sh
# Builds the image of this revision: wheels from the lock on this machine, then the Dockerfile. ENV=production takes only what
# is committed and pushed.
#   SET="launcher.image=HOST/NAME:TAG"   another repository         BASE_IMAGE, IMAGE_PYTHON   another base and its Python
#   DRY_RUN=1   prints what it would do
# Standard output: the image's reference, REPOSITORY:REVISION. Log: build/ENV/build.log.
# Exit codes: 0 done, 1 the build failed, 2 bad input or a tree that is not clean, 3 no engine or tool, 11 no package index.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=build
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"
# shellcheck source=scripts/lib/settings.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/settings.bash"
# shellcheck source=scripts/lib/image.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/image.bash"

# What runs on the cluster can be found again: in a commit, in a place that others see.
need_pushed_tree() {
  local -a work
  mapfile -t work < <(git status --porcelain)
  if ((${#work[@]})); then
    refuse 2 "${#work[@]} files are not committed, the first: ${work[0]:3}" 'production is built from a commit' \
      'git commit (or git stash), then again; for a trial: ENV=minitest'
  fi
  [[ -n $(git branch -r --contains HEAD 2>/dev/null) ]] ||
    refuse 2 "commit $(revision) is on no remote" 'production is built from a commit that others can find' 'git push, then again'
}

# from_dockerfile NAME: the default of one of its arguments.
from_dockerfile() { sed -nE "s/^ARG $1=(.*)/\1/p" Dockerfile | head -n 1; }

# The wheels go in as an image: so they are no part of the context that each build sends.
wheels_image() {
  local folder key
  IFS=$'\t' read -r folder key <<<"$1"
  WHEELS=wmtp-wheels:$key
  if [[ ${DRY_RUN:-} == 1 ]]; then
    log build "would run: docker import the wheels as $WHEELS"
  elif ! docker image inspect "$WHEELS" >/dev/null 2>&1; then
    log build "wheels of $folder into the engine as $WHEELS"
    tar -C "$folder" -cf - locked torch uv | docker import - "$WHEELS" >/dev/null
  fi
}

build() {
  local source lock created
  source=$(git remote get-url origin 2>/dev/null | sed -E 's#//[^@/]*@#//#; s#^git@([^:]+):#https://\1/#; s#\.git$##') || source=''
  [[ $source == http* ]] || source=unknown
  lock=sha256:$(cat requirements/{run,torch,cuda}.txt | sha256sum | cut -c1-64)
  created=$(TZ=UTC git log -1 --date=format-local:%Y-%m-%dT%H:%M:%SZ --format=%cd)
  local -a command=(docker build --network=host --build-arg "BASE_IMAGE=$BASE_IMAGE" --build-arg "PYTHON=$IMAGE_PYTHON"
    --build-arg "WHEELS_IMAGE=$WHEELS" --build-arg "WMTP_REVISION=$(git rev-parse HEAD)${1:+-dirty}"
    --build-arg "WMTP_CREATED=$created" --build-arg "WMTP_LOCK=$lock" --build-arg "WMTP_SOURCE=$source"
    -t "$REPOSITORY:$TAG" ${LATEST:+-t "$REPOSITORY:$LATEST"} .)
  if [[ ${DRY_RUN:-} == 1 ]]; then
    act "${command[@]}"
    return
  fi
  narrated "$IMAGE_DIR/build.log" "${command[@]}" || {
    tail -n 15 "$IMAGE_DIR/build.log" >&2
    die 1 'the image could not be built (lines above)' 'each step of the Dockerfile ends well' "read $IMAGE_DIR/build.log, then again"
  }
}

main() {
  no_arguments "${BASH_SOURCE[0]}" "$@"
  local dirty='' wheels began=$SECONDS
  need_cmd python
  need_cmd git
  cd "$ROOT"
  choose_settings "${ENV:-production}" ''
  overrides
  image_overrides
  image_names
  git rev-parse -q --verify HEAD >/dev/null || die 2 "$ROOT is no git checkout with a commit" 'an image has a revision' 'git clone'
  BASE_IMAGE=${BASE_IMAGE:-$(from_dockerfile BASE_IMAGE)} IMAGE_PYTHON=${IMAGE_PYTHON:-$(from_dockerfile PYTHON)}
  [[ $IMAGE_PYTHON =~ ^3\.1[0-9]$ ]] || die 2 "IMAGE_PYTHON=$IMAGE_PYTHON" 'the minor version of the Python in BASE_IMAGE' 'IMAGE_PYTHON=3.12'
  log build "$REPOSITORY:$TAG on ${BASE_IMAGE%@*}"
  if [[ $ENV == production ]]; then need_pushed_tree; fi
  [[ $TAG != *-dirty ]] || dirty=1
  need_engine 'a running engine builds and pushes'
  if [[ ${DRY_RUN:-} == 1 ]]; then wheels="build/wheelhouse/$IMAGE_PYTHON"$'\t'KEY; else
    mkdir -p "$IMAGE_DIR" 2>/dev/null || die 10 "$IMAGE_DIR can't be written" 'a stage hands its results on there' 'make it writable'
    wheels=$(scripts/wheelhouse.sh "$IMAGE_PYTHON")
  fi
  wheels_image "$wheels"
  build "$dirty"
  [[ ${DRY_RUN:-} == 1 ]] || log build "ok: $REPOSITORY:$TAG in $((SECONDS - began)) s"
  printf '%s\n' "$REPOSITORY:$TAG"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
