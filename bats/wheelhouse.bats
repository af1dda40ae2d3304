#!/usr/bin/env bats
# The index is played by two recorders: what it would give for the lock has other hashes.

load helpers

setup() {
  common_setup
  mkdir -p "$work/tree" "$work/bin"
  cp -r "$repo/scripts" "$work/tree/"
  mkdir "$work/tree/requirements"
  cd "$work/tree/requirements"
  printf '%s\n' 'six==1.0 \' '    --hash=sha256:aaa \' '    --hash=sha256:bbb' '    # via -r run.in' \
    "old==3 ; python_version < '3' \\" '    --hash=sha256:ccc' >run.txt
  printf '%s\n' 'uv==2 \' '    --hash=sha256:ddd' >uv.txt
  printf '%s\n' 'six==1.0 \' '    --hash=sha256:aaa' 'torch==9 \' '    --hash=sha256:eee' "cuda==7 ; sys_platform == 'linux' \\" \
    '    --hash=sha256:fff' >cuda.txt
  echo torch==9 >torch.txt
  export CALLS="$work/calls" PATH="$work/bin:$PATH"
  cat >"$work/bin/uv" <<'END'
#!/usr/bin/env bash
for file; do :; done
case $file in
  *run.txt) printf '%s\n' six==1.0 ;;
  *uv.txt) printf '%s\n' uv==2 ;;
  *torch.txt) printf '%s\n' cuda==7 six==1.0 torch==9 ${MORE:-} ;;
esac | if [[ " $* " == *' --generate-hashes '* ]]; then sed 's/$/ --hash=sha256:other/'; else cat; fi
END
  cat >"$work/bin/python" <<'END'
#!/usr/bin/env bash
for file; do :; done
cat "$file" >>"$CALLS"
END
  chmod +x "$work/bin/"*
  unset PIP_FIND_LINKS TORCH_BACKEND MORE
}

wheels() { "$work/tree/scripts/wheelhouse.sh" 3.12; }

@test "wheelhouse: every wheel is asked for with the hashes of the locks, not with those of the index" {
  run -0 --separate-stderr wheels
  [[ $output == build/wheelhouse/3.12$'\t'* ]]
  [[ $(tr -d ' \\\n' <"$CALLS") == 'six==1.0--hash=sha256:aaa--hash=sha256:bbbuv==2--hash=sha256:ddd'*'torch==9--hash=sha256:eeecuda==7--hash=sha256:fff' ]]
}

@test "wheelhouse: another build of torch has no lock, what is locked keeps its hashes" {
  PIP_FIND_LINKS=$work run -0 --separate-stderr wheels
  [[ $(tr -d ' \\\n' <"$CALLS") == *'--hash=sha256:bbbuv==2--hash=sha256:dddcuda==7torch==9' ]]
}

@test "wheelhouse: what the lock lacks ends with 11, by its name" {
  MORE=new==1 run -11 --separate-stderr wheels
  [[ $stderr == *'new==1 is not in the lock'* && ! -s $CALLS ]]
}
