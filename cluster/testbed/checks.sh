# checks.sh - `check` and `verdict`, for smoke.sh and faults.sh; sourced, never run.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
passed=0 failed=0
PY=${PY:-$project/.venv/bin/python} # checks that want torch or mpi4py use it, where it has them

# check NAME WANTED COMMAND... - COMMAND must print something that WANTED (a regex) finds.
check() {
    local name=$1 wanted=$2 start=$EPOCHREALTIME got status result=ok
    shift 2
    got=$("$@" 2>&1)
    status=$?
    [[ $got =~ $wanted ]] || result=FAILED
    [[ $result == ok ]] && passed=$((passed + 1)) || failed=$((failed + 1))
    printf '%-6s %4d ms  %s\n' $result $(((${EPOCHREALTIME/./} - ${start/./}) / 1000)) "$name"
    [[ $result == ok ]] ||
        printf '%s\n' "exit $status, wanted: $wanted" "$got" | head -15 | sed 's/^/       | /'
}
verdict() {
    echo "$passed passed, $failed failed"
    ((failed == 0))
}
has() { "$PY" -c "import $1" 2>/dev/null; }
