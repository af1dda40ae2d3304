#!/usr/bin/env bash
# Usage: [ENV=production] scripts/push.sh [<token]
# Pushes the image of this revision under its revision's tag, then under the configuration's (latest), and proves by reading it
# back that the registry has it.
# A token on standard input logs in, with a client configuration that is gone afterwards; without one the engine's own login is
# used. REGISTRY_USER: the login's name (default: the owner in the image's name).
# Standard output: REPOSITORY@sha256:…; kept in build/ENV/image.digest. Every later stage names the image by it.
# Exit codes: 0 done, 2 bad input or nothing built, 3 no engine or the login is refused, 11 the registry does not answer.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=push
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"
# shellcheck source=scripts/lib/settings.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/settings.bash"
# shellcheck source=scripts/lib/image.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/image.bash"

PRIVATE='' token=''

cleanup() { if [[ -n $PRIVATE ]]; then rm -rf -- "$PRIVATE"; fi; }

# The engine's client keeps a login in a file. It is gone with this stage, also after kill -9: a guard dies of its parent's
# death, and what a kill of both leaves is removed by the next push.
private_folder() {
  PRIVATE=$IMAGE_DIR/.login
  rm -rf -- "$PRIVATE"
  mkdir -m 700 "$PRIVATE"
  local -a tied
  tie TERM
  if ((${#tied[@]})); then
    # shellcheck disable=SC2016 # the guard's own words
    "${tied[@]}" bash -c 'trap "rm -rf -- \"\$1\"; exit" TERM; while :; do sleep 1; done' guard "$PRIVATE" \
      >/dev/null 2>&1 </dev/null &
  fi
}

# A token may be offered, it need not be: nobody waits for a pipe that never says anything.
read_token() {
  [[ ! -t 0 ]] || return 0
  # No assignment and no test of it: `bash -x` would show the value.
  local rc=0
  IFS=$' \t\r\n' read -r -t 15 token || rc=$?
  ((rc <= 128)) || die 3 'no token came on standard input within 15 s' 'a token is offered on standard input, or nothing is' 'make push </dev/null uses the engine'"'"'s own login'
}

# failed: what the engine said, with the code that it stands for.
failed() {
  local said
  said=$(tail -n 3 "$1" | tr -s '\n' ' ' | cut -c1-200)
  case $said in
    *'daemon socket'*)
      die 3 "the container engine refuses this user: $said" 'who pushes may use the engine' 'join the group docker, or set DOCKER_HOST to an engine of your own'
      ;;
    *denied* | *[Uu]nauthorized* | *'no basic auth'* | *'authentication required'* | *'incorrect username'* | *forbidden*)
      die 3 "$REPOSITORY refuses the login: $said" 'a token that may write packages, on standard input' \
        "printf %s \"\$TOKEN\" | REGISTRY_USER=$user make push ENV=$ENV"
      ;;
    *'does not exist locally'*) die 2 "$REPOSITORY:$TAG is not built" 'what was built is pushed' "make build ENV=$ENV" ;;
  esac
  die 11 "$REPOSITORY does not take the image: $said" 'the registry answers from here' "see $1, then again: what has arrived is kept"
}

login() {
  ((${#token})) || return 0
  private_folder
  # Contexts and credential helpers of the caller have no part in it.
  export DOCKER_CONFIG=$PRIVATE
  docker login --username "$user" --password-stdin "${REPOSITORY%%/*}" <<<"$token" >"$PRIVATE/said" 2>&1 || failed "$PRIVATE/said"
  token=''
  log push "logged in to ${REPOSITORY%%/*} as $user, for this push only"
}

push() {
  narrated "$IMAGE_DIR/push.log" docker push "$REPOSITORY:$1" || failed "$IMAGE_DIR/push.log"
}

main() {
  no_arguments "${BASH_SOURCE[0]}" "$@"
  local user digest reference began=$SECONDS new there owner
  need_cmd python
  cd "$ROOT"
  choose_settings "${ENV:-production}" ''
  overrides
  image_overrides
  image_names
  owner=${REPOSITORY#*/}
  user=${REGISTRY_USER:-${owner%%/*}}
  need_engine 'a running engine builds and pushes'
  if [[ ${DRY_RUN:-} == 1 ]]; then
    act docker push "$REPOSITORY:$TAG"
    if [[ -n $LATEST ]]; then act docker push "$REPOSITORY:$LATEST"; fi
    return 0
  fi
  mkdir -p "$IMAGE_DIR" 2>/dev/null || die 10 "$IMAGE_DIR can't be written" 'the digest is kept there' 'make it writable'
  docker image inspect "$REPOSITORY:$TAG" >/dev/null 2>&1 || die 2 "$REPOSITORY:$TAG is not built" 'what was built is pushed' "make build ENV=$ENV"
  [[ $ENV != production || $TAG != *-dirty ]] || die 2 "$TAG: the tree has changes that no commit has" 'production runs a commit' 'git commit, then: make build push'
  exec 7>"$IMAGE_DIR/.push.lock"
  flock -n 7 || log push "another push of $ENV is at work; waiting for it"
  flock -w 3600 7 || die 1 "another push of $ENV takes longer than an hour" 'one at a time' 'stop it'
  trap cleanup EXIT
  rm -rf -- "$IMAGE_DIR/.login"
  read_token
  login
  log push "$REPOSITORY:$TAG"
  push "$TAG"
  digest=$(sed -nE 's/.*digest: (sha256:[0-9a-f]{64}).*/\1/p' "$IMAGE_DIR/push.log" | tail -n 1)
  [[ -n $digest ]] || failed "$IMAGE_DIR/push.log"
  reference=$REPOSITORY@$digest
  new=$(grep -c ': Pushed$' "$IMAGE_DIR/push.log" || true) there=$(grep -cE ': (Layer already exists|Mounted from .*)$' "$IMAGE_DIR/push.log" || true)
  docker pull -q "$reference" >"$IMAGE_DIR/pull.log" 2>&1 || failed "$IMAGE_DIR/pull.log"
  if [[ -n $LATEST ]]; then push "$LATEST"; fi
  printf '%s\n' "$TAG" >"$IMAGE_DIR/.image.revision"
  printf '%s\n' "$reference" >"$IMAGE_DIR/.image.digest"
  rm -f -- "$IMAGE_DIR/image.digest" # the two are one: between them there is none
  mv -f -- "$IMAGE_DIR/.image.revision" "$IMAGE_DIR/image.revision"
  mv -f -- "$IMAGE_DIR/.image.digest" "$IMAGE_DIR/image.digest"
  log push "ok: $reference read back, $((new)) layers pushed, $((there)) were there, $((SECONDS - began)) s"
  printf '%s\n' "$reference"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
