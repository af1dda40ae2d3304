# What is published in the bucket: one listing and the manifests that it names. Sourced by models.sh and verify_models.sh.
# shellcheck shell=bash disable=SC2016,SC2154  # what it sets and reads is shared with the script that sources it; another program expands

# list_published FILE: all objects of models/ and datasets/, the client's JSON lines.
list_published() {
  local kind
  : >"$1"
  for kind in models datasets; do
    bounded 300 "$S5CMD" --json --retry-count 3 ls "s3://$S3_BUCKET_NAME/$kind/*" >>"$1" 2>"$1.said" ||
      grep -q 'no object found' "$1.said" || {
      # One small request names the reason.
      fetch_manifest .alive "$1.alive" || true
      die 11 "s3://$S3_BUCKET_NAME/$kind can't be listed: $(cut -c1-300 "$1.said")" '' 'may this key list it? then again'
    }
  done
}

# fetch_published FILE DIR: the manifests that the listing names, as DIR/models/NAME.json, DIR/datasets/NAME.json; one byte
# more than a manifest may have, since its size is judged, not trusted.
fetch_published() {
  local name
  mkdir -p "$2/models" "$2/datasets"
  while read -r name; do
    printf '%s\0%s\0' "s3://$S3_BUCKET_NAME/$name/manifest.json" "$2/$name.json"
  done < <(sed -nE 's#.*"key":"s3://[^/"]*/((models|datasets)/[A-Za-z0-9][A-Za-z0-9._-]*)/manifest\.json".*#\1#p' "$1") |
    xargs -0 -r -n 2 -P 8 bash -c '"$0" --log error cat "$1" | head -c 67108865 >"$2"' "$S5CMD" ||
    log "$STAGE" 'warn  a manifest could not be read whole'
}
