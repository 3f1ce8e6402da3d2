#!/usr/bin/env bash
# On a lent machine that can fetch nothing: install the wheels that came along, then run the lease.
#
#   bash tools/bench/lease.sh [options of the benchmark `lease`]
#
# From the environment:
#
#   PYTHON   the interpreter that has torch    (default: python3)
#   WHEELS   the folder of wheels              (default: .wheels; README.md says how to fill it)
#   SITE     where they are installed          (default: a new folder under TMPDIR)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python3}
wheels=${WHEELS:-.wheels}
refuse() { printf 'lease.sh: error: %s\n' "$*" >&2; exit 2; }

shopt -s nullglob
packages=() numpy=()
for wheel in "$wheels"/*.whl; do
  case $(basename "$wheel") in
    numpy-*) numpy+=("$wheel") ;;
    *) packages+=("$wheel") ;;
  esac
done
[[ ${#packages[@]} -gt 0 ]] || refuse "WHEELS = $wheels: no wheels there. Fix: the download in tools/bench/README.md"

site=${SITE:-$(mktemp -d "${TMPDIR:-/tmp}/ithaca-site.XXXXXX")}
install() { "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$@"; }
install "${packages[@]}" || refuse "pip could not install the wheels of $wheels into $("$python" --version)." \
  "Fix: the download in tools/bench/README.md, with --python-version of that"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"

# numba refuses a numpy that is newer than itself.
if ! reason=$("$python" -c 'import numba' 2>&1); then
  [[ ${#numpy[@]} -gt 0 ]] || refuse "numba refuses (${reason##*$'\n'}), and $wheels has no numpy"
  echo "lease.sh: numba refuses (${reason##*$'\n'}): $(basename "${numpy[0]}") goes before the machine's numpy" >&2
  install "${numpy[@]}" || refuse "pip could not install ${numpy[*]}"
fi

# Installed beside the machine's packages, a wheel's .pth file is not read: what it would add.
if [[ -d $site/nvidia_cutlass_dsl/dsl_packages ]]; then
  export PYTHONPATH="$site/nvidia_cutlass_dsl/dsl_packages:$PYTHONPATH"
fi
exec "$python" -m tools.bench lease "$@"
