#!/bin/bash
# run.sh [PYTEST ARGUMENTS] - sets up everything the tests use, then runs every check there is.
#
# A test whose library or program is missing says so and is skipped; with CI=true it fails instead.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash cluster/setup.sh --all || exit

PATH=$PWD/.venv/bin:$PATH
failed=()
check() {
    printf '\n== %s\n' "$*"
    "$@" || failed+=("$1 $2")
}
check ruff check .
check ruff format --check .
check mypy --no-error-summary
check pytest -q "$@"
((${#failed[@]} == 0)) || {
    printf '\nfailed: %s\n' "${failed[@]}"
    exit 1
}
