#!/usr/bin/env bats
# The table of the plan's criteria: what it prints and how it ends. That its rows can be red: tests/break_acceptance.py.

load helpers

setup() {
  common_setup
  tree="$work/a tree"
  mkdir -p "$tree/tests"
  cp -r "$repo"/{scripts,docker,configs,datasets,src,Dockerfile} "$tree/"
  cp -r "$repo"/tests/{configs,acceptance.py} "$tree/tests/"
  ln -s "$repo/.venv" "$tree/.venv"
  unset ONLY ENGINE WMTP_ACCEPTANCE
}

acceptance() { "$tree/scripts/acceptance.sh" "$@"; }

@test "acceptance: rows and sections by id, each with its bar and what was measured, and 0 when none is red" {
  ONLY='P1.1, P3.7 P3.3' run -0 --separate-stderr acceptance
  [[ $output == *'| P1.1 | ok '*'| /app '*'| WORKDIR /app |'*'| P3.7 | ok '*'| 10 samples |'* ]]
  [[ $(tail -n 1 <<<"$output") == '3 ok, 0 need the cluster, 0 not checked, 0 FAIL' && $output != *'| P1.2 |'* ]]
}

@test "acceptance: 1 and FAIL with what was found when a criterion is not met" {
  sed -i 's/^WORKDIR \/app$/WORKDIR \/workspace/' "$tree/Dockerfile"
  ONLY=P1.1,P1.2,P1.5 run -1 --separate-stderr acceptance
  [[ $output == *'| P1.1 | FAIL '*'WORKDIR /workspace'*'| P1.2 | ok '*'| P1.5 | FAIL '*'Dockerfile'*'1 ok, 0 need the cluster, 0 not checked, 2 FAIL' ]]
}

@test "acceptance: a stage that fails makes its rows red, with its own words" {
  sed -i '/^project: /d' "$tree/configs/config.vessl.yaml"
  ONLY=P3.1 run -1 --separate-stderr acceptance
  [[ $output == *'| P3.1 | FAIL '*'config ended with 2: '*' project missing'* && $stderr == *'config: code 2'* ]]
}

@test "acceptance: without an engine its rows are not checked, and never ok" {
  ENGINE=0 ONLY=S2 run -0 --separate-stderr acceptance
  [[ $output == *'| S2.1 | not checked '*'ENGINE=0'*'0 ok, 1 need the cluster, 3 not checked, 0 FAIL'* ]]
}

@test "acceptance: 2 for a row that is not known, a switch that is none, an argument" {
  ONLY=P1.1,XX run -2 --separate-stderr acceptance
  [[ $stderr == *'XX: no such row'*rule*next* && -z $output ]]
  ENGINE=yes run -2 --separate-stderr acceptance
  [[ $stderr == *'ENGINE=yes'* ]]
  run -2 --separate-stderr acceptance now
  run -0 --separate-stderr acceptance --help
  [[ $output == *'Exit codes:'* ]]
}
