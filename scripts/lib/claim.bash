# One publisher a name: an object that only one can put, and the puts that hold only on a condition. Sourced by
# publish_models.sh only.
# shellcheck shell=bash disable=SC2034,SC2119,SC2120,SC2153,SC2154  # what it sets and reads is shared with the script that sources it, arguments too

CLAIMED='' STRAYS=0

aws_s3api() {
  local verb=$1
  shift
  local -a endpoint=()
  if [[ -n ${S3_ENDPOINT_URL:-} ]]; then endpoint=(--endpoint-url "$S3_ENDPOINT_URL"); fi
  bounded 90 aws "${endpoint[@]}" --cli-connect-timeout 5 --cli-read-timeout 30 \
    s3api "$verb" --bucket "$S3_BUCKET_NAME" "$@"
}

# put_if KEY FILE CONDITION…: 0 put, 1 the condition does not hold; anything else ends the stage.
put_if() {
  local key=$1 file=$2 said
  shift 2
  said=$(aws_s3api put-object --key "${PREFIX#"s3://$S3_BUCKET_NAME/"}/$key" --body "$file" "$@" 2>&1 >/dev/null) && return 0
  said=$(tr -s '\n' ' ' <<<"$said")
  case $said in
    # A put that was tried twice, since its first answer was lost, meets itself.
    *PreconditionFailed* | *'(412)'* | *ConditionalRequestConflict*) [[ $(read_object "$key") == "$(<"$file")" ]] && return 0 || return 1 ;;
    *AccessDenied* | *'(403)'*) die 3 "$PREFIX/$key can't be put:${said:0:200}" 'a publisher may write there' 'a key that may' ;;
  esac
  die 11 "$PREFIX/$key can't be put:${said:0:200}" 'the last word is a conditional put' 'again; what is there is kept'
}

# read_object KEY [SECONDS]: its content; 1 where it is not there, 2 where nobody answers.
read_object() {
  bounded "${2:-60}" "$S5CMD" --log error cat "$PREFIX/$1" 2>"$WORK/read" | head -c 67108865 && return 0 # said: in a trap, a bare return gives what was before
  if grep -q 'not found' "$WORK/read"; then return 1; else return 2; fi
}

# start_of PID: when it began; a number that another process gets later began at another time.
start_of() {
  local stat
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
  cut -d ' ' -f 20 <<<"${stat##*) }"
}

# claim FORCE: one publisher works on the name, by an object that only one can put.
claim() {
  local force=$1 here host pid since place start etag
  # Of this boot and this namespace of processes: only there does a number say whether its process lives.
  here=$(cut -c1-8 /proc/sys/kernel/random/boot_id)-$(readlink /proc/self/ns/pid | tr -dc 0-9)
  printf '%s %s %s %s %s %s\n' "${HOSTNAME:-host}" $$ "$(date -u +%FT%TZ)" "$here" "$(start_of $$)" \
    "$(od -An -N8 -tx8 /dev/urandom | tr -d ' ')" >"$WORK/claim"
  CLAIMED=$NAME
  put_if .publishing "$WORK/claim" --if-none-match '*' && return 0
  client ls "$PREFIX/.publishing" | head -n 1 >"$WORK/held" || die 1 "$NAME: another publisher came and went" '' 'again'
  etag=$(sed -E 's/.*"etag":"([^"]*)".*/\1/' "$WORK/held")
  read -r host pid since place start _ < <(read_object .publishing | tr -dc '[:print:]\n') || true
  if [[ $place == "$here" && $pid =~ ^[0-9]+$ && -n $start && $(start_of "$pid") == "$start" ]]; then
    die 1 "$NAME is being published by process $pid of this machine since $since" 'one publisher a name' "wait for it, or end it: kill $pid"
  elif [[ $place != "$here" ]] && ((! force)); then
    die 1 "$NAME is being published by process ${pid:0:20} of ${host:0:60} since ${since:0:30}" 'one publisher a name' \
      'wait for it; where it is dead: FORCE=1 (--force) takes over'
  fi
  STRAYS=1
  if [[ $place != "$here" ]]; then log publish "$NAME: taken over from process ${pid:0:20} of ${host:0:60}"; fi
  put_if .publishing "$WORK/claim" --if-match "\"$etag\"" || die 1 "$NAME: another publisher took it over first" 'one publisher a name' 'wait for it'
}

# ours [SECONDS]: 0, 1 where another publisher is or was here, 2 where nobody answers.
ours() {
  local held rc=0
  held=$(read_object .publishing "$@") || rc=$?
  ((rc)) || [[ $held == "$(<"$WORK/claim")" ]] || rc=1
  return "$rc"
}

lost() { die 1 "$NAME: another publisher took it over" 'a manifest stands beside the objects of its own publisher' 'see who, then again'; }

# Also at the end of a publish that failed or was ended.
release() {
  [[ -n $CLAIMED ]] || return 0
  CLAIMED=''
  if ours; then client rm "$PREFIX/.publishing" >/dev/null || log publish "warn  $PREFIX/.publishing could not be removed"; fi
}

# abort_strays: parts of uploads that were killed are in no listing, and billed.
abort_strays() {
  local key id
  while IFS=$'\t' read -r key id; do
    aws_s3api abort-multipart-upload --key "$key" --upload-id "$id" >/dev/null 2>&1 || true
  done < <(aws_s3api list-multipart-uploads --prefix "${PREFIX#"s3://$S3_BUCKET_NAME/"}/" \
    --query 'Uploads[].[Key,UploadId]' --output text 2>/dev/null | grep -v '^None' || true)
}
