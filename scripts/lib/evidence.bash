# What make acceptance judges: each function runs real stages once, in a folder of its own ($HERE/NAME, its working folder is the
# checkout), and leaves what they said. To be sourced by acceptance.sh only.
# shellcheck shell=bash disable=SC2153,SC2154

RUN=acceptance-critic-wmtp

# unchecked WHY: this evidence can't be had here; its rows say so.
unchecked() { printf '%s\n' "$*" >"$AT/why"; }

evidence_models() { python tests/test_models/generate.py; }

# Production as shipped, in any place: neither bucket nor account is asked.
evidence_config() { env -u S3_ENDPOINT_URL ENV=production scripts/test_vessl_config.sh --json --offline --only 1,2,3,devices; }
evidence_dryrun() { env -u S3_ENDPOINT_URL ENV=production ALGO=critic-wmtp scripts/test_vessl_config.sh --json --offline; }
evidence_minitest_config() {
  env -u S3_ENDPOINT_URL ENV=minitest LAUNCHER=vessl ALGO=critic-wmtp scripts/test_vessl_config.sh --json --offline --only 1,2,3,devices
}

evidence_render() {
  env -u S3_ENDPOINT_URL python -m wmtp.runfile --config configs/config.vessl.yaml --recipe configs/recipe.critic_wmtp.yaml --env production \
    --set launcher.volume=volume://storage/wmtp-models-cache --run-name acceptance --revision abcdef0 \
    --image "ghcr.io/wooshikwon/wmtp@sha256:$(printf 'a%.0s' {1..64})" --output "$AT/run.yaml"
}

evidence_vocab() {
  local -a check=(scripts/check_vocab.sh --config configs/config.local_minitest.yaml --recipe tests/configs/recipe.critic_wmtp.yaml)
  export WMTP_APP_ROOT=$AT/app
  mkdir -p "$WMTP_APP_ROOT/models"
  cp -r tests/test_models/test-* "$WMTP_APP_ROOT/models/"
  "${check[@]}"
  # The same models, one of them with a size that only the expected one tells from right.
  sed -i 's/"vocab_size": 32000/"vocab_size": 32064/' "$WMTP_APP_ROOT/models/test-rm-llama/config.json"
  expect "$AT/wrong.rc" "${check[@]}"
}

# expect FILE COMMAND…: its exit code is the finding.
expect() {
  local rc=0
  "${@:2}" >/dev/null || rc=$?
  printf '%s\n' "$rc" >"$1"
}

# 256 MB to the bucket; to a new node; to another one that finds them in the volume; and an object that is gone.
evidence_sync() {
  local name=acceptance-model began part
  export WMTP_APP_ROOT=$AT/first WMTP_CACHE_DIR=$AT/volume WMTP_STORAGE_RETRY_WAIT_S=1
  mkdir -p "$AT/from/$name" "$AT/volume"
  echo '{"vocab_size": 32000}' >"$AT/from/$name/config.json"
  for part in 1 2 3 4; do head -c 64000000 /dev/urandom >"$AT/from/$name/pytorch_model-0000$part-of-00004.bin"; done
  scripts/publish_models.sh --from "$AT/from" --force "$name"
  scripts/sync_models.sh --model "$name" >"$AT/first.out" 2>"$AT/first.err"
  (cd "$AT/volume" && find . -mindepth 2 -maxdepth 2 -name .complete -printf '%P\n') >"$AT/marker"
  export WMTP_APP_ROOT=$AT/second
  began=$EPOCHREALTIME
  scripts/sync_models.sh --model "$name" >"$AT/second.out"
  awk -v a="$began" -v b="$EPOCHREALTIME" 'BEGIN {print b - a}' >"$AT/second.seconds"
  aws --endpoint-url "$S3_ENDPOINT_URL" s3 rm --quiet "s3://$S3_BUCKET_NAME/models/$name/pytorch_model-00001-of-00004.bin"
  mkdir "$AT/other"
  WMTP_APP_ROOT=$AT/third WMTP_CACHE_DIR=$AT/other expect "$AT/broken.rc" scripts/sync_models.sh --model "$name" 2>"$AT/broken.err"
  # The same bytes in number, others in content.
  mkdir -p "$AT/from/acceptance-damaged"
  head -c 2000000 /dev/urandom >"$AT/from/acceptance-damaged/pytorch_model.bin"
  scripts/publish_models.sh --from "$AT/from" --force acceptance-damaged
  head -c 2000000 /dev/zero | "$(s5cmd_bin)" pipe "s3://$S3_BUCKET_NAME/models/acceptance-damaged/pytorch_model.bin"
  WMTP_APP_ROOT=$AT/third WMTP_CACHE_DIR=$AT/other expect "$AT/damaged.rc" scripts/sync_models.sh --model acceptance-damaged
  rm -rf -- "$AT"/{from,volume,first,second,third,other}
}

# The real client against the stub of the API, from a tree of its own: its image's digest is made up.
evidence_submit() {
  local tree=$AT/tree stub=$AT/stub pid i
  if ! cmp -s .venv-vessl/.installed requirements/vessl.txt && ! scripts/install_vessl.sh; then
    unchecked "VESSL's client can't be installed here"
    return 0
  fi
  mkdir -p "$tree/tests" "$tree/build/minitest" "$stub"
  cp -r scripts docker configs datasets src requirements Dockerfile "$tree/"
  cp -r tests/configs "$tree/tests/"
  ln -s "$ROOT/.venv" "$ROOT/.venv-vessl" "$tree/"
  echo "ghcr.io/wooshikwon/wmtp@sha256:$(printf 'a%.0s' {1..64})" >"$tree/build/minitest/image.digest"
  echo abcdef0 >"$tree/build/minitest/image.revision"
  "${tied[@]}" python tests/vessl_stub.py "$stub" >"$AT/address" &
  pid=$!
  for ((i = 0; i < 600; i++)); do
    [[ ! -s $AT/address ]] || break
    sleep 0.1
  done
  VESSL_API_HOST=$(<"$AT/address")
  export VESSL_API_HOST VESSL_ACCESS_TOKEN=stub-token VESSL_DEFAULT_ORGANIZATION=o VESSL_DEFAULT_PROJECT=wmtp
  export ENV=minitest ALGO=critic-wmtp LAUNCHER=vessl WMTP_REVISION=abcdef0 POLL_S=0.1
  unset S3_ENDPOINT_URL
  "$tree/scripts/submit.sh" | tee "$AT/number"
  "$tree/scripts/submit.sh" >"$AT/again.out"
  RUN_ID=$(<"$AT/number") FOLLOW=1 "$tree/scripts/logs.sh" >"$AT/logs.out"
  kill "$pid"
  (cd "$stub/runs" && printf '%s\n' *.yaml) >"$AT/runs"
  cp "$stub/runs/$(<"$AT/number").yaml" "$AT/sent.yaml"
}

evidence_deploy() {
  env -u S3_ENDPOINT_URL -u REGISTRY_TOKEN ENV=production ALGO=critic-wmtp DRY_RUN=1 ONLY=1,2,3,devices scripts/deploy.sh </dev/null
}

evidence_test() {
  local algo kept
  export WMTP_APP_ROOT=$AT/app SET='train.max_steps=2 paths.checkpoints.save_interval=2'
  for algo in baseline-mtp rho1-wmtp critic-wmtp; do
    kept=$(ALGO=$algo scripts/train_local.sh)
    cp -- "$(tail -n 1 <<<"$kept")" "$AT/$algo.json"
    python -c 'import json, sys; print(json.dumps(json.load(open(sys.argv[1]))))' "$AT/$algo.json"
  done
}

evidence_minitest() {
  # A finished run of this name is started afresh, its models synced anew: so it looks finished. Kept scores would spare one.
  rm -rf -- build/minitest/app/checkpoints/.scores
  mkdir -p "build/minitest/$RUN"
  echo '{}' >"build/minitest/$RUN/summary.json"
  ALGO=critic-wmtp RUN_NAME=$RUN SET="mlflow.tracking_uri=$MLRUNS mlflow.registry_uri=$MLRUNS" scripts/minitest.sh
  cp -- "build/minitest/$RUN"/{summary.json,sync.jsonl} "$AT/"
}

evidence_checkpoint() {
  aws --endpoint-url "$S3_ENDPOINT_URL" s3api list-objects-v2 --bucket "$S3_BUCKET_NAME" --prefix "checkpoints/$RUN/" \
    --query 'Contents[].[Key,Size]' --output text >"$AT/listing"
  ENV=minitest LAUNCHER=local RUN_ID=$RUN scripts/verify_checkpoint.sh
}

evidence_mlflow() {
  echo "$MLRUNS" >"$AT/from"
  WMTP_MLFLOW_DIR=$AT/store scripts/mlflow.sh --from "$MLRUNS"
}

evidence_monitor() { scripts/monitor_training.sh "$RUN"; }

evidence_report() {
  RUN_ID=$RUN ENV=minitest scripts/report.sh
  cp -- "build/minitest/$RUN/report.md" "$AT/"
}

evidence_engine() {
  if [[ ${ENGINE:-} == 0 ]]; then unchecked 'ENGINE=0' && return; fi
  if ((EUID)); then unchecked 'no container engine of its own can be started: not root' && return; fi
  if [[ ${ENGINE:-} != 1 ]] && ! PATH=$PATH:/usr/sbin command -v dockerd docker-registry >/dev/null; then
    unchecked 'no container engine is installed (ENGINE=1 installs one)' && return
  fi
  scripts/test_image.sh -f 'with.its.folders|check.of.paths|pulls.by.the.digest|two.ranks.with.FSDP|all.stages.in.order' \
    bats/cluster/image.bats bats/cluster/container.bats bats/cluster/deploy.bats || true
}
