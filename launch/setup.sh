#!/usr/bin/env bash
# Make the Python environment of this repository: .venv from requirements.txt.
#
#   bash launch/setup.sh      run it: sets up, says which interpreter is used
#   . launch/setup.sh         source it: sets up and exports PYTHON (the other scripts do this)
#
# Cheap when nothing changed: a stamp in .venv holds a hash of requirements.txt and of the Python
# version. It is written last, so an interrupted setup is simply taken up again.
#
#   ITHACA_PYTHON=/path/to/python   use this interpreter as it is and make no .venv (torch already
#                                   installed, a container, a cluster module)
#
# pip's own variables work, e.g. the smaller torch for a machine without a GPU:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash launch/setup.sh

_setup_root() { (cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P); }

_setup_error() { printf 'setup: error: %s\n' "$*" >&2; }

_setup_new_enough='sys.exit(sys.version_info < (3, 11))'

# Print the first Python that is new enough.
_setup_find_python() {
  local candidate
  for candidate in python3.11 python3.12 python3.13 python3 python; do
    if "$candidate" -c "import sys; $_setup_new_enough" 2>/dev/null; then
      command -v "$candidate"
      return 0
    fi
  done
  _setup_error "needs Python 3.11 or newer; found $(python3 --version 2>&1 || echo none)." \
    "Install one, or name one that has the packages: ITHACA_PYTHON=/path/to/python"
  return 1
}

# Print what the stamp has to say for interpreter $1 and requirements file $2. Also proves that the
# interpreter runs.
_setup_fingerprint() {
  "$1" -I -S -c '
import hashlib, sys
requirements = open(sys.argv[1], "rb").read()
print(sys.version.split()[0], hashlib.sha256(requirements).hexdigest())' "$2" 2>/dev/null
}

# An interpreter that someone else filled: check the packages by name, without the seconds of
# importing them.
_setup_check_given() {
  local missing
  if ! command -v "$1" >/dev/null 2>&1; then
    _setup_error "ITHACA_PYTHON = $1: no such program"
    return 1
  fi
  if ! missing=$("$1" -c '
import importlib.util, sys
if sys.version_info < (3, 11):
    sys.exit("Python " + sys.version.split()[0] + " is older than 3.11")
names = ("torch", "megatron", "einops", "numpy", "numba", "xxhash", "yaml", "tyro", "tqdm",
         "scipy")
missing = [name for name in names if importlib.util.find_spec(name) is None]
sys.exit("missing: " + ", ".join(missing) if missing else 0)' 2>&1); then
    _setup_error "ITHACA_PYTHON = $1: $missing." \
      "Fix: install requirements.txt there, or unset ITHACA_PYTHON."
    return 1
  fi
}

# Whether .venv of root $1 holds what its requirements.txt asks for.
_setup_is_current() {
  local venv=$1/.venv
  [[ -x $venv/bin/python && -f $venv/.stamp ]] || return 1
  [[ $(_setup_fingerprint "$venv/bin/python" "$1/requirements.txt") == "$(<"$venv/.stamp")" ]]
}

# Make the empty environment $1. Only a folder that this script made (.made says so) is emptied.
_setup_make_venv() {
  local venv=$1 base
  local other_way="an interpreter that has the packages: ITHACA_PYTHON=/path/to/python"
  local entries=(-mindepth 1 -maxdepth 1 ! -name .setup.lock)
  if [[ ! -f $venv/.made && -n $(find "$venv" "${entries[@]}") ]]; then
    _setup_error "$venv has no usable Python, and this script did not make it." \
      "Move it away, or name $other_way"
    return 1
  fi
  base=$(_setup_find_python) || return 1
  if ! "$base" -c 'import venv, ensurepip' 2>/dev/null; then
    _setup_error "$base has no venv module." \
      "Install it (Debian, Ubuntu: apt install python3-venv), or name $other_way"
    return 1
  fi
  echo "setup: making $venv with $base"
  find "$venv" "${entries[@]}" -exec rm -rf {} +
  touch "$venv/.made"
  "$base" -m venv "$venv"
}

# Install requirements.txt of root $1. Of pip's output the packages and large downloads are shown.
_setup_install_packages() {
  local venv=$1/.venv log=$1/.venv/setup.log
  echo "setup: installing requirements.txt (the first time takes minutes; torch is the large one)"
  if ! "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off \
    -r "$1/requirements.txt" 2>&1 | tee "$log" | awk '
      /^Collecting /                       { print "setup:   " $2; fflush() }
      /^ *Downloading .*\([0-9.]+ [MG]B\)/ { print "setup:     " $(NF - 1) " " $NF; fflush() }
      /^Installing collected/              { print "setup:   unpacking"; fflush() }'; then
    _setup_error "pip failed; the end of $log:"
    tail -n 15 "$log" >&2
    return 1
  fi
}

_setup_install() {  # $1 = root; runs in a subshell
  set -o pipefail
  local root=$1 venv=$1/.venv
  mkdir -p "$venv" || exit 1
  # Several nodes may share this folder: one installs, the others wait and find the stamp.
  exec 9>"$venv/.setup.lock"
  if command -v flock >/dev/null 2>&1 && ! flock -n 9 2>/dev/null; then
    echo "setup: waiting for another setup of $venv"
    flock 9
  fi
  if _setup_is_current "$root"; then
    return 0
  fi
  rm -f "$venv/.stamp"
  # A half-filled environment is kept (pip goes on from there), unless its Python is gone or old.
  if ! "$venv/bin/python" -c "import pip, sys; $_setup_new_enough" 2>/dev/null; then
    _setup_make_venv "$venv" || exit 1
  fi
  _setup_install_packages "$root" || exit 1
  # The stamp comes last, and whole.
  _setup_fingerprint "$venv/bin/python" "$root/requirements.txt" >"$venv/.stamp.new" || exit 1
  mv "$venv/.stamp.new" "$venv/.stamp" || exit 1
  echo "setup: done"
}

ithaca_setup() {
  local root
  root=$(_setup_root) || return 1
  if [[ -n ${ITHACA_PYTHON:-} ]]; then
    _setup_check_given "$ITHACA_PYTHON" || return 1
    PYTHON=$(command -v "$ITHACA_PYTHON")
    [[ $PYTHON == /* ]] || PYTHON=$PWD/$PYTHON  # the scripts may change folder
  else
    PYTHON=$root/.venv/bin/python
    _setup_is_current "$root" || (_setup_install "$root") || return 1
  fi
  export PYTHON
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  ithaca_setup || exit 1
  echo "setup: ready, PYTHON=$PYTHON"
else
  ithaca_setup
fi
