# shellcheck shell=bash
# What every command runs in. Sourced: it makes the Python environment, exports PYTHON, and sees to
# it that Python finds this repository's packages before any others.

_ithaca_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

# By itself `python -m` looks for packages where the caller stands first: a folder called `model` or
# a file data.py there would be imported in place of ours. PYTHONSAFEPATH leaves that place out.
export PYTHONPATH="$_ithaca_root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONSAFEPATH=1

# shellcheck source=launch/setup.sh
. "$_ithaca_root/launch/setup.sh"
