#!/bin/bash
# run.sh [--quick] [PYTEST ARGUMENTS] - sets up everything the tests use, then runs every check there is.
#
# --quick leaves out what starts several processes or takes long: tests/ranks/, tests/cluster/ and the
# tests marked slow. Without arguments, tests/ranks/ and tests/cluster/ run beside the other tests,
# since they wait for each other and for SLURM; tests that measure time run last, by themselves.
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
code() {
    check ruff check .
    check ruff format --check .
    check mypy --no-error-summary
}
case "${1:-}" in
    --quick)
        shift
        code
        check pytest -q -m "not ranks and not cluster and not slow and not alone" "$@"
        ;;
    "")
        # Three lanes side by side: ranks wait for each other, and the cluster's tests for SLURM.
        logs=$(mktemp -d)
        lanes=(ranks cluster)
        started=()
        trap 'kill "${started[@]}" 2>/dev/null' EXIT # also when this is interrupted
        for lane in "${lanes[@]}"; do
            pytest -q -m "$lane and not alone" "tests/$lane" >"$logs/$lane" 2>&1 &
            started+=("$!")
        done
        code # beside ranks, which fill both cores meanwhile
        check pytest -q -m "not ranks and not cluster and not alone"
        for at in "${!lanes[@]}"; do
            wait "${started[at]}" || failed+=("pytest tests/${lanes[at]}")
            printf '\n== pytest -q -m "%s and not alone" tests/%s\n' "${lanes[at]}" "${lanes[at]}"
            cat "$logs/${lanes[at]}"
        done
        trap - EXIT
        rm -r "$logs"
        check pytest -q -m alone
        ;;
    *)
        code
        check pytest -q "$@"
        ;;
esac
((${#failed[@]} == 0)) || {
    printf '\nfailed: %s\n' "${failed[@]}"
    exit 1
}
