#!/usr/bin/env bats
load helpers

setup() {
  common_setup
  export ENV=test
  cd "$repo"
}

check() {
  "$repo/scripts/check_vocab.sh" --config tests/configs/config.local_test.yaml --recipe tests/configs/recipe.critic_wmtp.yaml "$@"
}

@test "vocab: one line of JSON when all models agree" {
  [[ -d tests/test_models/test-llama-mtp ]] || python tests/test_models/generate.py
  run -0 --separate-stderr check
  [[ $output == *'"vocab_size": 32000'* ]]
}

@test "vocab: 14 when the size is not the expected one" {
  run -14 --separate-stderr check --expected 31000
  [[ $stderr == *'vocab_size 32000, expected 31000'* ]]
}

@test "vocab: the recipe says the size unless --expected does" {
  run -14 --separate-stderr check --set model.vocab_size=50257
  [[ $stderr == *'vocab_size 32000, expected 50257'* ]]
  run -0 --separate-stderr check --set model.vocab_size=50257 --expected 32000
}

@test "vocab: 2 when the configuration is not there" {
  run -2 --separate-stderr "$repo/scripts/check_vocab.sh" --config nowhere.yaml --recipe nowhere.yaml
}
