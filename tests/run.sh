#!/bin/bash
# run.sh [--quick] [PYTEST ARGUMENTS] - sets up everything the tests use, then runs every check there is.
#
# --quick leaves out what starts several processes or takes long: tests/ranks/, tests/cluster/ and the
# tests marked slow. Without arguments, tests/cluster/ runs beside the other tests, since it mostly
# waits for SLURM; tests that measure time run last, by themselves.
# A test whose library or program is missing says so and is skipped; with CI=true it fails instead.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash cluster/setup.sh --all || exit

PATH=$PWD/.venv/bin:$PATH
failed=()
check() {
    printf '\n== %s\n' "$*"
    "$@" || failed+=("$*")
}
check ruff check .
check ruff format --check .
check mypy --no-error-summary
case "${1:-}" in
    --quick)
        shift
        check pytest -q -m "not ranks and not cluster and not slow and not alone" "$@"
        ;;
    "")
        log=$(mktemp)
        pytest -q -m "cluster and not alone" tests/cluster >"$log" 2>&1 &
        cluster=$!
        trap 'kill "$cluster" 2>/dev/null' EXIT # also when this is interrupted
        check pytest -q -m "not cluster and not alone"
        printf '\n== pytest -q -m "cluster and not alone" tests/cluster\n'
        wait "$cluster" || failed+=("pytest tests/cluster")
        trap - EXIT
        cat "$log"
        rm -f "$log"
        check pytest -q -m alone
        ;;
    *) check pytest -q "$@" ;;
esac
((${#failed[@]} == 0)) || {
    printf '\nfailed: %s\n' "${failed[@]}"
    exit 1
}
