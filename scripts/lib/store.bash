# The bucket that holds the models: settings, one cheap request, the client. To be sourced after common.bash.
# shellcheck shell=bash disable=SC2034  # its settings are the stages'

# Of all that moves bytes:
WORKERS=16 PART_MB=100 RETRIES=3 WAIT=10 STALL=30

# storage_settings KEY…: bucket and transfer as SETTINGS say, where the environment does not; the KEYs' lines in TEMP/settings.
storage_settings() {
  local bucket region endpoint
  python -m wmtp.config --env "${ENV:-${ENV_MODE:-}}" "${SETTINGS[@]}" --get storage.bucket storage.region storage.endpoint \
    storage.workers storage.part_size_mb storage.retries storage.retry_wait_s storage.stall_s "$@" >"$TEMP/storage" || exit
  {
    read -r bucket && read -r region && read -r endpoint && read -r WORKERS && read -r PART_MB
    read -r RETRIES && read -r WAIT && read -r STALL
    cat >"$TEMP/settings"
  } <"$TEMP/storage"
  export S3_BUCKET_NAME=${S3_BUCKET_NAME:-$bucket} AWS_DEFAULT_REGION=${AWS_DEFAULT_REGION:-$region}
  if [[ -z ${S3_ENDPOINT_URL:-} && -n $endpoint ]]; then export S3_ENDPOINT_URL=$endpoint; fi
}

# transfer_settings: the environment wins over what the configuration said.
transfer_settings() {
  RETRIES=${WMTP_STORAGE_RETRIES:-$RETRIES} WAIT=${WMTP_STORAGE_RETRY_WAIT_S:-$WAIT} STALL=${WMTP_STORAGE_STALL_S:-$STALL}
  [[ $RETRIES =~ ^[1-9][0-9]?$ && $WAIT =~ ^[0-9]{1,4}$ && $STALL =~ ^[1-9][0-9]{0,4}$ ]] ||
    die 2 "retries '$RETRIES', wait '$WAIT', stall '$STALL'" 'tries are 1 to 99, wait and stall are seconds' \
      'mend WMTP_STORAGE_RETRIES, WMTP_STORAGE_RETRY_WAIT_S or WMTP_STORAGE_STALL_S'
}

# store_environment: what both clients read, credentials proved to be there.
store_environment() {
  export S3_BUCKET_NAME=${S3_BUCKET_NAME:-wmtp} AWS_DEFAULT_REGION=${AWS_DEFAULT_REGION:-eu-north-1}
  export AWS_REGION=${AWS_REGION:-$AWS_DEFAULT_REGION} AWS_MAX_ATTEMPTS=2 AWS_EC2_METADATA_DISABLED=true AWS_PAGER=''
  if [[ -z ${AWS_PROFILE:-}${AWS_WEB_IDENTITY_TOKEN_FILE:-}${AWS_CONTAINER_CREDENTIALS_RELATIVE_URI:-} ]]; then
    if [[ -d $ROOT/build/bucket/data && -z ${S3_ENDPOINT_URL:-} ]]; then local INSTEAD="; with the mini-test's bucket, for example: scripts/bucket.sh run build/bucket -- make models"; fi
    need_env AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
  fi
  need_cmd python
  need_cmd aws
  S5CMD=$(s5cmd_bin)
}

prefix_of() { printf 's3://%s/models/%s\n' "$S3_BUCKET_NAME" "$1"; }

check_name() {
  [[ $1 =~ ^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$ ]] ||
    die 2 "model name '$1'" 'letters, digits, ".", "_" and "-"; the name of one folder' 'see paths.models in the configuration'
}

# fetch_manifest NAME FILE [PREFIX]: 0 there, 1 not published; anything else ends the stage. At most two tries of 5 and 10 s.
fetch_manifest() {
  local said rc=0 prefix=${3:-$(prefix_of "$1")} bucket
  prefix=${prefix#s3://} bucket=${prefix%%/*}
  local -a endpoint=()
  if [[ -n ${S3_ENDPOINT_URL:-} ]]; then endpoint=(--endpoint-url "$S3_ENDPOINT_URL"); fi
  # One byte more than a manifest may have: its size is judged, not trusted.
  said=$(bounded 40 aws "${endpoint[@]}" --cli-connect-timeout 5 --cli-read-timeout 10 s3api get-object \
    --bucket "$bucket" --key "${prefix#*/}/manifest.json" --range bytes=0-67108864 "$2" 2>&1 >/dev/null) || rc=$?
  ((rc)) || return 0
  said=$(tr -s '\n' ' ' <<<"$said")
  case $said in
    *'(NoSuchKey)'* | *'(404)'*) return 1 ;;
    *'(InvalidRange)'* | *'(416)'*) die 13 "$1: manifest.json in the bucket is empty" 'a manifest lists the files' "scripts/publish_models.sh --from DIR $1" ;;
    *'(NoSuchBucket)'*)
      die 3 "bucket $bucket does not exist" 'S3_BUCKET_NAME names the bucket of the models' 'export S3_BUCKET_NAME=…'
      ;;
    *'(403)'* | *AccessDenied* | *SignatureDoesNotMatch* | *InvalidAccessKeyId* | *ExpiredToken* | *InvalidToken* | *'Unable to locate credentials'* | *'Partial credentials'* | *'config profile'*)
      die 3 "bucket $bucket refuses the credentials:${said:0:200}" \
        'key and secret may read models/' 'mend AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY'
      ;;
    *'Invalid endpoint'* | *'Invalid bucket name'* | *'Parameter validation failed'*)
      die 2 "the bucket's address can't be used:${said:0:200}" 'S3_ENDPOINT_URL is http(s)://HOST[:PORT]' 'mend S3_ENDPOINT_URL or S3_BUCKET_NAME'
      ;;
  esac
  die 11 "bucket $bucket does not answer${S3_ENDPOINT_URL:+ at $S3_ENDPOINT_URL}:${said:0:200}" \
    'one small request was tried twice' 'see that the network and S3_ENDPOINT_URL are right, then again'
}
