#!/usr/bin/env bats
# The operator's day: one long way through every command that a person types, on a bare clone, with a preemption and a bad file.
# It leaves build/day/transcript.txt; the page that is made of it must have the shape of docs/operators-day.md.

load helpers

setup_file() {
  cluster_file_setup
  need_engines
  # Before the day's `make` finds an environment that is behind its lock, and installs itself into this checkout's.
  make -s -C "$repo" install >/dev/null
}

setup() {
  endpoint=$S3_ENDPOINT_URL
  cluster_setup
  plain_environment
  printf '%s\n' "$endpoint" >"$stub/nodes"
  export S3_ENDPOINT_URL=$endpoint
  here=$repo/build/day transcript=$repo/build/day/transcript.txt
  # One commit of this day: a run of the same name has nothing to go on from in a bucket that outlives the test.
  real_tree "$BATS_TEST_TMPDIR/hub/wmtp"
  unset GIT_AUTHOR_DATE GIT_COMMITTER_DATE
  git -C "$BATS_TEST_TMPDIR/hub/wmtp" commit -q --amend --no-edit --date=now
  export S3_BUCKET_NAME=team POLL_S=1 TERM=dumb
  # The registry has the layers of an earlier day: a first push of all of them is no part of this one.
  (export ENV=minitest SET="launcher.image=$image:latest" && cd "$BATS_TEST_TMPDIR/hub/wmtp" && scripts/build.sh && scripts/push.sh <<<"$REGISTRY_TOKEN") >/dev/null 2>&1
  without_bucket
  bucket mb s3://team
  mkdir -p "$here" "$BATS_TEST_TMPDIR/work"
  cd "$BATS_TEST_TMPDIR/work"
  : >"$transcript"
}

teardown() {
  docker ps -aq --filter "name=vessl-stub-$stub_pid-" | xargs -r docker rm -fv >/dev/null 2>&1
  without_bucket
  cluster_teardown
}

bucket() { "$repo/.venv/bin/aws" --endpoint-url "$endpoint" s3 "$@" >/dev/null; }
without_bucket() { bucket rb --force s3://team 2>/dev/null || true; }

heading() { printf '== %s\n' "$1" >>"$transcript" && printf -- '-- %s\n' "${@:2}" >>"$transcript"; }

# typed CODE COMMAND [SHOWN]: as in a terminal, what it prints in `said`; the page shows the lines with SHOWN alone.
typed() {
  local rc=0
  printf '$ %s\n' "$2" >>"$transcript"
  if [[ -n ${3:-} ]]; then printf '~ %s\n' "$3" >>"$transcript"; fi
  said=$(bash -c "$2" </dev/null 2>&1 3>&-) || rc=$?
  if [[ -n $said ]]; then sed 's/^/| /' <<<"$said" >>"$transcript"; fi
  printf '= %s\n' "$rc" >>"$transcript"
  echo "# $((SECONDS - began)) s  $2" >&3
  [[ $rc == "$1" ]] || { tail -n 30 <<<"$said" && echo "ended with $rc, not $1: $2" && return 1; }
}

# saw TEXT…: in what was said last, in this order.
saw() {
  local text left=$said
  for text in "$@"; do
    [[ $left == *"$text"* ]] || { printf 'not seen: %s\nin: %s\n' "$text" "$said" && return 1; }
    left=${left#*"$text"}
  done
}

@test "day: clone, mini-test, dry run, deploy, preempted, resumed, bad data, mended, finished, reported, compared, cleaned up" {
  local began=$SECONDS said name yesterday settings=configs/config.vessl_minitest.yaml

  heading 'A bare clone' 'The repository and nothing else. `make test` runs all tests, which takes minutes. These few show that the environment works.'
  typed 0 'git clone -q ../hub/wmtp && cd wmtp'
  cd wmtp
  # What `make install` makes once: the suite has it already.
  ln -s "$repo/.venv" .venv && ln -s "$repo/.venv-vessl" .venv-vessl && mkdir build && ln -s "$repo/build/wheelhouse" build/wheelhouse
  printf '/.venv\n/.venv-vessl\n' >>.git/info/exclude
  export PYTHONPATH=$PWD/src # its own install is of its own sources
  typed 0 '.venv/bin/pytest tests/test_paths.py tests/test_registry.py' passed
  saw passed

  heading 'The mini-test' 'The whole way on this machine, with the bucket of the team. It publishes its small models there, and leaves a run to compare with.'
  typed 0 'make minitest' '^(train .*done|startup .*ok|(algo|ranks|steps|held_out_ce_before|held_out_ce_after|tokens_per_second|checkpoint|report|minitest): )'
  saw 'is not kept: test-rm-llama reads' 'train     done: 12 steps' 'held_out_ce_after: ' 'minitest: ok '
  yesterday=$(readlink build/minitest/latest)
  [[ -s build/minitest/$yesterday/report.html ]]

  heading 'The settings of the cluster' "What differs here from the file as it is shipped. One thing was forgotten."
  sed -i -e 's/gpus: 4/gpus: 2/; s/gpu_type: A100/gpu_type: cpu/; s/preset: .*/preset: cpu-large/; s/compute_backend: cuda/compute_backend: cpu/; s/precision: bf16/precision: fp32/' \
    -e 's#base_path: .*#base_path: s3://${S3_BUCKET_NAME:-wmtp}/checkpoints#; s#wmtp_code: .*#wmtp_code: s3://${S3_BUCKET_NAME:-wmtp}/datasets/wmtp_code#' \
    -e "s#image: .*#image: $image:latest#; s/max_hours: 1/max_hours: 1\n  price_per_hour: 6.20/" "$settings"
  typed 0 "git diff -U0 $settings" '^[-+] '

  heading 'The dry run finds it' 'Before anything is built, in a second: CPU ranks do not speak nccl.'
  # Loopback is no address of a cluster: as with AWS, no address is named.
  unset S3_ENDPOINT_URL
  typed 2 'make dryrun ENV=minitest ALGO=critic-wmtp LAUNCHER=vessl' '^(dry run|  FAIL|  +rule|  +next)'
  saw "FAIL         $settings:55 devices.distributed.backend nccl" 'gloo is for cpu' 'LAUNCHER=vessl'
  typed 0 "sed -i 's/backend: nccl/backend: gloo/' $settings"
  typed 0 'make dryrun ENV=minitest ALGO=critic-wmtp LAUNCHER=vessl' '^dry run '
  saw ' 0 FAIL in '
  typed 0 "git commit -qam 'the settings of our cluster'"

  heading 'Deploy' 'The data goes to the bucket. Then one command goes from the dry run to the tenth step.'
  S3_ENDPOINT_URL=$endpoint typed 0 'make publish-models FROM=datasets AS=datasets NAMES=wmtp_code' '^publish .* ok'
  fault preempted
  typed 0 'make deploy ENV=minitest ALGO=critic-wmtp LAUNCHER=vessl SET=train.max_steps=40' '^([1-6]/6|submit .*(at most|[0-9] x)|deploy .*it runs)'
  saw '1/6       dry run   ok' '2/6       build     ok' '3/6       push      ok' '4/6       submit    ok' 'run 7' '5/6       follow    ok' 'Step 1' '6/6       report    ok' 'deploy    it runs'
  name=$(readlink build/minitest/latest)
  [[ $(<"build/minitest/$name/run.id") == 7 ]]
  export S3_ENDPOINT_URL=$endpoint

  heading 'The machine is taken away' 'The cluster needs it for somebody else. Nobody asked the run.'
  until [[ $(RUN_ID=7 make status 2>&1) == *Preempted ]]; do sleep 1; done
  typed 0 'make status'
  saw $'7\t'"$name"$'\tfailed\tPreempted'

  heading 'Bad data' 'Meanwhile a colleague publishes a file that was cut. `make watch` submits the run again, since a machine that is taken away is no fault of the run. Bad data is, and the watcher stops.'
  cp -r datasets ../theirs
  sed -i '40s/.\{20\}$//' ../theirs/wmtp_code/problems.jsonl
  typed 0 'make publish-models FROM=../theirs AS=datasets NAMES=wmtp_code FORCE=1' '^publish .* ok'
  typed 2 'make watch' '(Preempted|^watch     FAIL|^          (rule|next))'
  saw 'run 7 is failed' 'Preempted' 'submitted again (1 of 5)' 'run 8 is failed: it failed by its own fault (code 2)' 'wmtp_code/problems.jsonl:40' "make resume RUN_ID=$name"

  heading 'Why it failed' 'The page of the run says it in two lines. Whoever has to help gets the bundle.'
  typed 2 'make monitor' "^($name|  (why|next) )"
  saw "$name  failed" 'run 8 on vessl' 'why         code 2, data at step 0: wmtp_code/problems.jsonl:40: is not JSON' 'next        make publish-models AS=datasets FROM=… NAMES=wmtp_code FORCE=1'
  typed 0 'cat build/minitest/latest/record/failure.md'
  saw "$name failed: data, in data (code 2)" 'wmtp_code/problems.jsonl:40'
  typed 0 'tar -tzf build/minitest/latest/record/bundle.tar.gz' '(log.txt|failure.json|failure.md)$'
  saw log.txt failure.json failure.md

  heading 'Mended' 'The right file is published again, and the run goes on from the checkpoint that the first machine left.'
  typed 0 'make publish-models FROM=datasets AS=datasets NAMES=wmtp_code FORCE=1' '^publish .* ok'
  typed 0 'make resume'
  saw 'ok: run 9 goes on with' "$name"
  typed 0 'make watch' '(completed after|^9)'
  saw 'run 9' 'completed after 0 resubmissions'
  typed 0 'make logs TAIL=400' '(goes on after step|Step 40/40|training ok)'
  saw 'goes on after step' 'Step 40/40' 'training ok'

  heading 'The report' 'One page with everything that was recorded, over all machines. Its Markdown says, among the rest:'
  typed 0 'make report'
  saw "build/minitest/$name/report.html"
  typed 0 'cat build/minitest/latest/report.md' "^($name|[|] (state|steps|held-out loss|revision|image|cost|goodput) )"
  saw 'completed, 40 steps' 'goodput'

  heading 'Beside the run of yesterday' 'The mini-test of the morning stands for it.'
  typed 0 "make compare RUNS='$yesterday $name'"
  saw build/compare/compare.html
  typed 0 'ls build/compare'
  grep -qF "$yesterday" build/compare/compare.md && grep -qF "$name" build/compare/compare.md

  heading 'Clean-up' 'Nothing lives on the cluster. The bucket keeps models, data, checkpoints and records; here everything goes.'
  typed 0 'make status'
  saw $'9\t'"$name"$'\tcompleted'
  typed 0 'make clean && git status --short'
  saw 'build/ and the generated test models are gone'
  [[ ! -e build && $said != *' M '* ]]

  # No secret is in what a person saw.
  run -1 grep -F -e "$AWS_SECRET_ACCESS_KEY" -e "$REGISTRY_TOKEN" -e "$VESSL_ACCESS_TOKEN" "$transcript"
  echo "# the day: $((SECONDS - began)) s" >&3
  "$repo/.venv/bin/python" "$repo/tests/day.py" "$transcript" >"$here/operators-day.md"
  "$repo/.venv/bin/python" "$repo/tests/day.py" "$transcript" --check "$repo/docs/operators-day.md" || {
    echo "docs/operators-day.md tells another day (above). Read build/day/operators-day.md, then: cp build/day/operators-day.md docs/"
    return 1
  }
}
