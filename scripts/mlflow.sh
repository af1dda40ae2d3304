#!/usr/bin/env bash
# Usage: [ENV=minitest] scripts/mlflow.sh [--from s3://BUCKET/PREFIX|DIR] [--name RUN]…
# The MLflow records of all runs of a prefix, merged into one store of this machine, build/mlflow (WMTP_MLFLOW_DIR), and
# MLflow's own page of it. Merging again brings what is new. --from: default what mlflow.tracking_uri of the environment's
# configuration says; FROM and NAME say the same as the options.
# Standard output: a line a run, newest first (id, name, status, last step, wmtp_loss, artifacts, between tabs), then the
# store's address. On a terminal the page is served until Ctrl-C; MLFLOW_PORT (default 5000).
# Environment: S3_BUCKET_NAME S3_ENDPOINT_URL AWS_* ENV LAUNCHER CONFIG WMTP_STORAGE_RETRIES …_RETRY_WAIT_S …_STALL_S
# Exit codes: 0 done, 2 bad arguments or no such record, 3 tool or credential, 10 disk, 11 no answer, 13 a record is damaged.
set -Eeuo pipefail
shopt -s inherit_errexit
STAGE=mlflow
# shellcheck source=scripts/lib/common.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.bash"
# shellcheck source=scripts/lib/settings.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/settings.bash"
# shellcheck source=scripts/lib/store.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/store.bash"
# shellcheck source=scripts/lib/transfer.bash
source "$(dirname "${BASH_SOURCE[0]}")/lib/transfer.bash"

INTO='' ADDRESS='' NAMES_OPTIONS=()

# tracking_address: ADDRESS, where the runs of this environment's configuration are recorded, with /app where it is here.
tracking_address() {
  storage_settings mlflow.tracking_uri
  if [[ $LAUNCHER == local ]]; then export WMTP_APP_ROOT=${WMTP_APP_ROOT:-$ROOT/build/$ENV/app}; fi
  ADDRESS=$(python -c 'import sys; from wmtp.paths import PathResolver; print(PathResolver().resolve_tracking(sys.argv[1]))' \
    "$(<"$TEMP/settings")")
}

# merged FROM: all runs into the store; its lines on standard output.
merged() {
  local from=$1 rc=0
  [[ $from != file://* ]] || from=${from#file://}
  case $from in
    http://* | https://*)
      die 2 "$from is an MLflow server" 'it keeps all runs itself, and there is nothing to merge' "open $from"
      ;;
    s3://*/*) store_environment ;;
    s3://*) die 2 "$from names no prefix" 'FROM is s3://BUCKET/PREFIX, under which each run has a folder' 'make mlflow FROM=s3://wmtp/mlruns' ;;
  esac
  python -m wmtp.mlstore "$from" --into "$INTO" "${NAMES_OPTIONS[@]}" \
    --retries "$RETRIES" --retry-wait-s "$WAIT" --stall-s "$STALL" || rc=$?
  case $rc in
    0) ;;
    11) die 11 "$from does not answer${S3_ENDPOINT_URL:+ at $S3_ENDPOINT_URL}" "$RETRIES tries were made" 'see that S3_ENDPOINT_URL and the credentials are right, then again' ;;
    13) die 13 "a record under $from can't be used (line above)" 'a store is merged only when it is proved' 'the run mirrors it anew when it goes on; NAME=… merges the others' ;;
    *) exit "$rc" ;;
  esac
}

# page: MLflow's own, where it is; training has a smaller MLflow, without it.
page() {
  local uri=sqlite:///$INTO/mlflow.db version port=${MLFLOW_PORT:-5000}
  local -a serve=(mlflow ui --backend-store-uri "$uri" --default-artifact-root "file://$INTO/artifacts" --port "$port")
  version=$(python -c 'from importlib.metadata import version; print(version("mlflow-skinny"))' 2>/dev/null) || version=3
  printf '%s\n' "$uri"
  if ! python -c 'import flask, mlflow.server' 2>/dev/null; then
    log mlflow "MLflow's page is not installed here (training does without): with a package registry in reach,"
    log mlflow "next  uvx --from mlflow==$version ${serve[*]@Q}"
  elif [[ -t 1 ]]; then
    log mlflow "http://127.0.0.1:$port shows them; Ctrl-C ends it"
    exec "${serve[@]}" >&2
  else
    log mlflow "next  ${serve[*]@Q}"
  fi
}

main() {
  local from=${FROM:-} name
  local -a again=("$@")
  if [[ -n ${NAME:-} ]]; then NAMES_OPTIONS=(--name "$NAME"); fi
  while (($#)); do
    case $1 in
      -h | --help) usage "${BASH_SOURCE[0]}" && return 0 ;;
      --from) from=${2:-} && shift $(($# > 1 ? 2 : 1)) && [[ -n $from ]] || die 2 '--from names nothing' '--from s3://BUCKET/PREFIX, or a folder' 'scripts/mlflow.sh --help' ;;
      --name) name=${2:-} && shift $(($# > 1 ? 2 : 1)) && check_name "$name" && NAMES_OPTIONS+=(--name "$name") ;;
      *) die 2 "$1: not known" 'the options are --from and --name' 'scripts/mlflow.sh --help' ;;
    esac
  done
  need_cmd python
  own_temp
  INTO=${WMTP_MLFLOW_DIR:-$ROOT/build/mlflow}
  if [[ -z $from ]]; then
    cd "$ROOT"
    choose_settings "${ENV:-minitest}" ''
    tracking_address
    from=$ADDRESS
  fi
  transfer_settings
  # A bucket of this machine lives only while something uses it.
  if [[ $from == s3://* && -z ${S3_ENDPOINT_URL:-} && ${LAUNCHER:-} == local ]]; then
    cleanup
    exec "$ROOT/scripts/bucket.sh" run "$ROOT/build/bucket" -- "${BASH_SOURCE[0]}" "${again[@]}"
  fi
  mkdir -p "$INTO" 2>/dev/null && [[ -w $INTO ]] || die 10 "$INTO can't be written" 'the merged store is kept there' 'WMTP_MLFLOW_DIR=… elsewhere'
  INTO=$(cd "$INTO" && pwd)
  log mlflow "the runs of $from, merged into $INTO"
  merged "$from" || exit
  log mlflow "merged in $SECONDS s"
  page
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
