#!/usr/bin/env bats
load helpers

setup() {
  common_setup
  need_bucket
  export WMTP_CACHE_DIR="$work/cache"
  mkdir -p "$WMTP_CACHE_DIR"
}

cache() { "$repo/scripts/cache.sh" "$@"; }

# Two versions of one model in the cache; the link points at the second. Sets `old` and `new`, their digests.
two_versions() {
  make_model
  publish
  "$repo/scripts/sync_models.sh" --model "$name" >/dev/null 2>&1
  old=$(basename "$(readlink "$WMTP_APP_ROOT/models/$name")")
  echo '{"a": 1}' >"$work/from/$name/config.json"
  "$repo/scripts/publish_models.sh" --from "$work/from" --force "$name" >/dev/null 2>&1
  "$repo/scripts/sync_models.sh" --model "$name" >"$work/second" 2>/dev/null
  new=$(basename "$(readlink "$WMTP_APP_ROOT/models/$name")")
  [[ $old != "$new" ]]
}

@test "cache: tells each version, what uses it and how old it is" {
  two_versions
  run -0 --separate-stderr cache
  [[ $output == DIGEST*"${new:0:12}"*"$WMTP_APP_ROOT/models/$name"* ]]
  grep -q "^${old:0:12} .*nobody$" <<<"$output"
  run -0 --separate-stderr cache --json
  [[ ${#lines[@]} == 2 && ${lines[0]} == '{"digest": "'$old* ]]
}

# bats test_tags=long
@test "cache: a new version fetches only what is new in it" {
  two_versions
  grep -q '"downloaded_bytes": 9,' "$work/second"
  same_model
}

@test "cache: evicts what nobody uses, and only that" {
  two_versions
  run -0 --separate-stderr cache --evict unused
  [[ ! -e $WMTP_CACHE_DIR/$old && -d $WMTP_CACHE_DIR/$new ]]
  run -1 --separate-stderr cache --evict "$new"
  [[ $stderr == *'what is used stays'* && -d $WMTP_CACHE_DIR/$new ]]
  same_model
}

@test "cache: a version that a reader holds stays" {
  two_versions
  exec 5<"$WMTP_CACHE_DIR/$old/.complete"
  flock -s 5
  run -1 --separate-stderr cache --evict "$old"
  [[ -d $WMTP_CACHE_DIR/$old ]]
  exec 5<&-
  run -0 --separate-stderr cache --evict "${old:0:12}"
  [[ ! -e $WMTP_CACHE_DIR/$old ]]
}

@test "cache: a version that another app root uses stays, wherever that is said from" {
  make_model
  publish
  mkdir "$work/elsewhere"
  cd "$work"
  HOSTNAME=inherited WMTP_APP_ROOT=one "$repo/scripts/sync_models.sh" --model "$name" >/dev/null 2>&1
  grep -q "^$(uname -n)"$'\t'"$work/one/models/$name$" "$WMTP_CACHE_DIR"/.used/*/*
  touch -d '25 hours ago' "$WMTP_CACHE_DIR"/.used/*/*
  cd "$work/elsewhere"
  run -1 --separate-stderr cache --evict "$name"
  diff -r -x manifest.json -x .complete "$work/from/$name" "$work/one/models/$name"
}

@test "cache: another machine's version stays for a day" {
  two_versions
  rm "$WMTP_APP_ROOT/models/$name"
  sed -i 's/^[^\t]*/another-host/' "$WMTP_CACHE_DIR/.used/$new"/*
  run -1 --separate-stderr cache --evict "$new"
  touch -d '25 hours ago' "$WMTP_CACHE_DIR/.used/$new"/*
  run -0 --separate-stderr cache --evict "$new"
  [[ ! -e $WMTP_CACHE_DIR/$new ]]
}

@test "cache: a sync keeps it within WMTP_CACHE_MAX_GB, the longest unused first" {
  two_versions
  WMTP_CACHE_MAX_GB=0.0004 run -0 --separate-stderr "$repo/scripts/sync_models.sh" --model "$name"
  [[ $stderr == *evicted* && ! -e $WMTP_CACHE_DIR/$old && -d $WMTP_CACHE_DIR/$new ]]
}

@test "cache: nothing is evicted for a model that would not fit anyway" {
  two_versions
  name=large-$name
  printf '{"format": 1, "name": "%s", "files": [{"path": "w", "bytes": 900000000000000, "blake3": "%064d"}], "total_bytes": 900000000000000, "created": "2026-01-01T00:00:00+00:00", "tool": "t"}' \
    "$name" 0 | put "$name/manifest.json"
  run -10 --separate-stderr "$repo/scripts/sync_models.sh" --model "$name"
  [[ -d $WMTP_CACHE_DIR/$old && -d $WMTP_CACHE_DIR/$new ]]
}

@test "cache: 2 when there is no store" {
  WMTP_CACHE_DIR="$work/none" run -2 --separate-stderr cache
}

@test "cache: without a node's folder it is the mini-test's store" {
  local tree="$work/a tree"
  mkdir -p "$tree/build/minitest/app/models/.store"
  cp -r "$repo"/{scripts,src} "$tree/"
  ln -s "$repo/.venv" "$tree/.venv"
  [[ ! -d /app/models ]] || skip '/app/models is here: this machine is a node'
  unset WMTP_APP_ROOT WMTP_CACHE_DIR
  run -0 --separate-stderr "$tree/scripts/cache.sh"
  [[ $stderr == *"$tree/build/minitest/app/models/.store, "*' MB free'* ]]
}
