#!/usr/bin/env bash
# Builds the wheel, installs it into an empty environment away from the checkout, and runs the saga of
# README.md there. Usage: run_readme.sh [PYTHON], where PYTHON defaults to that of the environment
# which `make` keeps.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/../.." && pwd)
python=${1:-$checkout/.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work/dist" "$checkout"
"$python" -m venv "$work/venv"
wheel=$(echo "$work"/dist/sagacity-*.whl)
"$work/venv/bin/python" -m pip install --quiet "$wheel[embedded]"

cd "$work"
"$work/venv/bin/python" -I -c 'import pathlib, sagacity; assert pathlib.Path(sagacity.__file__).with_name("py.typed").is_file()'
"$work/venv/bin/saga" --help >/dev/null
"$work/venv/bin/saga-worker" --help >/dev/null
"$work/venv/bin/python" -I "$checkout/tests/wheel/readme_program.py" "$checkout/README.md"
