# This machine's own engine and GPUs, for those with a workstation: a run is a container of the run's name. To be sourced by
# run.bash.
# shellcheck shell=bash disable=SC2034,SC2153  # what it sets and reads is shared with the script that sources it

SAID=''

launcher_name() { printf 'the container engine\n'; }
launcher_said() { tail -n 1 <<<"$SAID" | cut -c1-200; }

launcher_open() { need_engine 'a run here is a container'; }

# launcher_check: what a container needs that the engine does not check before it runs.
launcher_check() { need_env AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY; }

launcher_runs() {
  docker ps -a --no-trunc --filter label=wmtp.run --format '{{.ID}} {{.Names}} {{.Status}}' |
    awk '{id = substr($1, 1, 12); status = "failed"} # Created or Dead: it never ran, or never will
      $3 == "Up" {status = "running"}
      $3 == "Exited" {status = $4 == "(0)" ? "completed" : "failed"}
      {print id, $2, status}'
}

# settings_of FILE: what a container is made of, as a label says it.
settings_of() { sha256sum <"$1" | cut -c1-16; }

engine_command() {
  local gpus image
  image=$(sed -n 's/^# image //p' "$1") gpus=$(sed -n 's/^# gpus //p' "$1")
  COMMAND=(docker run -d --name "$2" --label wmtp.run=wmtp --network host --shm-size 16g --stop-timeout 600
    -v wmtp-models-cache:/cache/models --env-file "$1" --label "wmtp.settings=$(settings_of "$1")")
  if ((gpus)); then COMMAND+=(--gpus all); fi
  COMMAND+=("$image")
}

# The secrets of the env file are names: the engine takes their values from this environment, no argument holds them.
launcher_create() {
  local file=${1%run.yaml}run.env rc=0
  local -a COMMAND=()
  local there
  there=$(docker container inspect --format '{{.State.Status}} {{index .Config.Labels "wmtp.run"}}.' "$2" 2>/dev/null) || there=''
  [[ -z $there || $there == *' wmtp.' ]] ||
    die 2 "$2 is a container that is no run of this project" 'a run is a container of the run'"'"'s name' 'another RUN_NAME'
  if [[ $there == 'created '* ]]; then docker rm "$2" >/dev/null && there=''; fi
  if [[ -n $there ]]; then
    # The same container again: what it kept on its own disk is still there. Its image and settings are those of its first start.
    [[ $(docker container inspect --format '{{index .Config.Labels "wmtp.settings"}}' "$2") == "$(settings_of "$file")" ]] ||
      die 2 "$2 is a container of another image or other settings" 'a container goes on as it began' \
        "another RUN_NAME; or, if all of it is in the bucket: docker rm $2, then again"
    SAID=$(docker start "$2" 2>&1) || rc=$?
  else
    engine_command "$file" "$2"
    SAID=$("${COMMAND[@]}" 2>&1) || rc=$?
    # What was created and could not start holds nothing.
    if ((rc)); then docker rm "$2" >/dev/null 2>&1 || true; fi
  fi
  if ((rc)); then
    die 1 "$2 was not started: $(launcher_said)" 'the engine starts the container, with its GPUs' 'mend what it says, then again'
  fi
  NUMBER=$(docker container inspect --format '{{.Id}}' "$2" | cut -c1-12)
}

launcher_command() {
  local -a COMMAND=()
  engine_command "${1/run.yaml/run.env}" "$NAME"
  printf '%s\n' "${COMMAND[*]}"
}

# need_container NAME
need_container() {
  docker container inspect "$1" >/dev/null 2>&1 || die 2 "run $1: the engine has no such container${DOCKER_HOST:+ at $DOCKER_HOST}" \
    'a run here is a container; it was removed, or is on another engine' 'docker ps -a; a new one: make submit LAUNCHER=docker ENV=… ALGO=…'
}

launcher_read() {
  need_container "$1"
  docker container inspect --format '{{.State.Status}} {{.State.ExitCode}} {{.Name}}' "$1" |
    awk '{status = "failed"; reason = "exit code " $2; sub("^/", "", $3)}
      $1 == "running" {status = "running"; reason = ""}
      $1 == "exited" {status = $2 == 0 ? "completed" : "failed"}
      {print status "\t" $3 "\t" reason}'
}

# Of its present life: a container that was started again keeps the log of the one before.
launcher_logs() {
  need_container "$1"
  docker logs --timestamps --since "$(docker container inspect --format '{{.State.StartedAt}}' "$1")" --tail "$2" "$1" 2>&1
}

launcher_stop() {
  need_container "$1"
  docker stop "$1" >/dev/null
}
