#!/usr/bin/env bats
load helpers

setup() {
  common_setup
  export WMTP_MLFLOW_DIR="$work/merged here" WMTP_MIRROR_S=0.5 WMTP_STORAGE_RETRIES=1
  unset FROM NAME
}

# record ADDRESS NAME: a run of three steps with an artifact.
record() {
  echo "$2" >"$work/plot.svg"
  RANK=0 python - "$1" "$2" "$work" <<'PY'
import sys
from pathlib import Path
from wmtp.tracking import Tracker
uri, name, work = sys.argv[1:]
tracker = Tracker(uri, "wmtp/bats", name, {}, {"a": 1}, Path(work) / name / "mlflow.json")
for step in (1, 2, 3):
    tracker.log(step, {"wmtp_loss": 4.0 - step})
tracker.artifact(Path(work) / "plot.svg")
tracker.finish()
PY
}

setup_file() {
  PATH=$(cd "$BATS_TEST_DIRNAME/.." && pwd)/.venv/bin:$PATH PYTHONPATH=$(cd "$BATS_TEST_DIRNAME/.." && pwd)/src
  export PATH PYTHONPATH
}

mlflow_sh() { "$repo/scripts/mlflow.sh" "$@"; }

@test "mlflow: runs of a prefix in one store, the same again, and what to run for the page" {
  need_bucket
  local prefix=s3://$S3_BUCKET_NAME/mlruns-$BATS_SUITE_TEST_NUMBER-$$
  record "$prefix" run-a
  record "$prefix" run-b
  FROM=$prefix run --separate-stderr mlflow_sh
  [[ $status == 0 ]]
  grep -qP "^[0-9a-f]{32}\trun-a\tFINISHED\t3\t1.000\t1$" <<<"$output"
  grep -qP "^[0-9a-f]{32}\trun-b\tFINISHED\t3\t1.000\t1$" <<<"$output"
  [[ ${lines[2]} == "sqlite:///$WMTP_MLFLOW_DIR/mlflow.db" ]]
  grep -qE 'next +(uvx --from mlflow==[0-9.]+ )?.?mlflow' <<<"$stderr"
  local once=$output
  run --separate-stderr mlflow_sh --from "$prefix/"
  [[ $output == "$once" ]]
}

@test "mlflow: one run of the prefix when NAME says so, 2 and the names when it is none" {
  need_bucket
  local prefix=s3://$S3_BUCKET_NAME/mlruns-$BATS_SUITE_TEST_NUMBER-$$
  record "$prefix" run-a
  record "$prefix" run-b
  NAME=run-b run --separate-stderr mlflow_sh --from "$prefix"
  [[ $status == 0 && ${#lines[@]} == 2 && $output == *run-b* ]]
  run -2 --separate-stderr mlflow_sh --from "$prefix" --name run-c
  [[ $stderr == *'no record of run-c'*'run-a, run-b'* ]]
}

@test "mlflow: the folder that the configuration names when FROM is not given" {
  record "file://$work/app/mlruns_test" run-a
  ENV=minitest run --separate-stderr mlflow_sh
  [[ $status == 0 && $output == *run-a* && $stderr == *"$work/app/mlruns_test"* ]]
}

@test "mlflow: 2 when nothing was recorded yet" {
  ENV=minitest run -2 --separate-stderr mlflow_sh
  [[ $stderr == *'is not there'*'make minitest'* ]]
}

@test "mlflow: 11 when the bucket does not answer" {
  export AWS_ACCESS_KEY_ID=x AWS_SECRET_ACCESS_KEY=y S3_ENDPOINT_URL=http://127.0.0.1:9
  run -11 --separate-stderr mlflow_sh --from s3://wmtp/mlruns
}

@test "mlflow: 2 when FROM is a server, names no prefix, or an option is not known" {
  run -2 --separate-stderr mlflow_sh --from http://127.0.0.1:5000
  [[ $stderr == *'open http://127.0.0.1:5000'* ]]
  run -2 --separate-stderr mlflow_sh --from s3://wmtp
  run -2 --separate-stderr mlflow_sh --from
  run -2 --separate-stderr mlflow_sh --all
  run -2 --separate-stderr mlflow_sh --name 'a b'
}

@test "mlflow: 10 when the store's folder can't be written" {
  touch "$work/file"
  WMTP_MLFLOW_DIR="$work/file/in" run -10 --separate-stderr mlflow_sh --from s3://wmtp/mlruns
}
