# Which configuration and recipe a stage works with: chosen by name from ENV, ALGO and LAUNCHER, in one place.
# To be sourced after common.bash. The functions set ENV ALGO LAUNCHER CONFIG RECIPE and the array SETTINGS.
# shellcheck shell=bash

# one_of NAME VALUE WORD…: refuses a value outside its list.
one_of() {
  local name=$1 value=$2 word
  shift 2
  for word in "$@"; do [[ $value != "$word" ]] || return 0; done
  die 2 "$name=$value: not known" "$name is one of: $*" "set $name to one of them, for example: $name=$1"
}

# algorithms: all that there is a recipe for, a line each.
algorithms() { (cd "$ROOT/configs" && printf '%s\n' recipe.*.yaml) | sed 's/^recipe\.//; s/\.yaml$//; s/_/-/g'; }

# choose_settings ENV ALGO: ALGO may be empty (no recipe is chosen then). CONFIG and RECIPE, when set, win.
choose_settings() {
  ENV=$1 ALGO=$2
  one_of ENV "$ENV" test minitest production
  if [[ -n $ALGO ]]; then
    local -a known
    mapfile -t known < <(algorithms)
    one_of ALGO "$ALGO" "${known[@]}"
  fi
  if [[ -z ${LAUNCHER:-} ]]; then
    if [[ $ENV == production ]]; then LAUNCHER=vessl; else LAUNCHER=local; fi
  fi
  one_of LAUNCHER "$LAUNCHER" local docker vessl
  case $LAUNCHER-$ENV in
    local-production | vessl-test | docker-test)
      die 2 "LAUNCHER=$LAUNCHER with ENV=$ENV: there is no configuration for this pair" \
        "production runs on docker or vessl, test on local" "make minitest, or LAUNCHER=vessl ENV=production"
      ;;
  esac
  local where=$LAUNCHER suffix=_$ENV
  [[ $where != docker ]] || where=vessl
  [[ $ENV != production ]] || suffix=
  # Chosen here they are nobody's wish, and no child takes them for one, where the caller exports them empty.
  [[ -n ${CONFIG:-} ]] || export -n CONFIG
  [[ -n ${RECIPE:-} ]] || export -n RECIPE
  [[ $ENV != test ]] || where=tests/configs/config.local
  [[ $where == tests/* ]] || where=configs/config.$where
  CONFIG=${CONFIG:-$where$suffix.yaml}
  if [[ -n $ALGO ]]; then RECIPE=${RECIPE:-$(recipe_of "$ENV" "$ALGO")}; fi
  SETTINGS=(--config "$CONFIG")
  [[ -z ${RECIPE:-} ]] || SETTINGS+=(--recipe "$RECIPE")
}

# recipe_of ENV ALGO: the recipe's file, on standard output.
recipe_of() {
  local folder=tests/configs
  [[ $1 != production ]] || folder=configs
  printf '%s\n' "$folder/recipe.${2//-/_}.yaml"
}

# overrides: SET="a.b=c d.e=f" as --set arguments in the array OVERRIDES. docker works with vessl's configuration, and says so.
overrides() {
  local -a words=()
  read -ra words <<<"${SET:-}"
  OVERRIDES=()
  # Words are all that is seen of it: `key = value` would be three settings, none of them one.
  [[ ! " ${words[*]} " =~ (\ =|=\ [^=\ ]+\ ) ]] ||
    die 2 "SET=\"$SET\"" 'no spaces around =; a space ends a setting' "SET=\"$(sed -E 's/ =/=/g; s/= ([^= ]+)( |$)/=\1\2/g' <<<"${words[*]}")\""
  local word
  for word in "${words[@]}"; do OVERRIDES+=(--set "$word"); done
  if [[ ${LAUNCHER:-} == docker && " ${SET:-} " != *' launcher.target='* ]]; then OVERRIDES+=(--set launcher.target=docker); fi
}

# revision: 7 characters, from the image's WMTP_REVISION or from git; 0000000 where neither is there.
revision() {
  local found=${WMTP_REVISION:-}
  [[ -n $found ]] || found=$(git -C "$ROOT" rev-parse HEAD 2>/dev/null) || found=0000000
  printf '%.7s\n' "$found"
}
