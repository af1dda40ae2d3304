# Why a run failed, said before its last words. Sourced by docker/vessl_startup.sh only, after common.bash.
# shellcheck shell=bash disable=SC2034,SC2154  # app is the startup script's, and CURE is for it

cgroups=/sys/fs/cgroup of_process=/proc/self/cgroup

# memory_file NAME OLD_NAME: this container's file of that name, by the second version of control groups or the first.
memory_file() {
  local kinds path found
  while IFS=: read -r _ kinds path; do
    case ,$kinds, in
      ,,) found=$1 kinds= ;;
      *,memory,*) found=$2 kinds=/memory ;;
      *) continue ;;
    esac
    # A container that sees only its own group has the files at the top.
    for found in "$cgroups$kinds$path/$found" "$cgroups$kinds/$found"; do
      [[ ! -r $found ]] || { printf '%s\n' "$found" && return 0; }
    done
  done < <(cat "$of_process" 2>/dev/null)
  return 0
}

# memory_kills: how many processes of this container the kernel has killed for memory.
memory_kills() {
  local file
  file=$(memory_file memory.events memory.oom_control)
  { [[ -z $file ]] || sed -n 's/^oom_kill //p' "$file"; } | grep -E '^[0-9]+$' || echo 0
}

# memory_limit_gib: that of the container, or the machine's memory.
memory_limit_gib() {
  local file
  file=$(memory_file memory.max memory.limit_in_bytes)
  { cat "$file" 2>/dev/null || true; } | awk '
    FILENAME == "/proc/meminfo" { if ($1 == "MemTotal:") whole = $2 * 1024; next }
    /^[0-9]+$/ { limit = $1 }
    END { if (!limit || (whole && limit > whole)) limit = whole; if (limit) printf "%.2f\n", limit / 1024 ^ 3 }' - /proc/meminfo 2>/dev/null || true
}

kills_before=$(memory_kills)

# bundle CODE [WHAT]: failure.json, failure.md and bundle.tar.gz in the run's record, the paragraph in the log, its command in
# CURE. It bears whatever goes wrong in it: the run ends as it would without.
CURE=''
bundle() {
  local folder=${app:-}/logs/${RUN_NAME:-} limit line
  local -a told
  [[ -n ${app:-} && -n ${RUN_NAME:-} && -d $folder ]] || return 0
  limit=$(memory_limit_gib) || limit=
  # `rc` is what the caller's child ended with.
  local -a words=(--code "$1" --said="${2:-}" --status "${rc:-$1}" --kills "$(($(memory_kills) - kills_before))")
  [[ -z $limit ]] || words+=(--limit-gib "$limit")
  [[ -z ${over_time:-} ]] || words+=(--hours)
  mapfile -t told < <(bounded 10 python -m wmtp.causes "$folder" "${words[@]}" </dev/null || true)
  ((${#told[@]})) || return 0
  # The last line is the command; a line of the paragraph may begin as that does.
  if [[ ${told[-1]} == 'next: '* ]]; then CURE=${told[-1]#next: } && unset 'told[-1]'; fi
  for line in "${told[@]}"; do log startup "$line"; done
}
