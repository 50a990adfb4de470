# checks.sh - checks of the launch scripts before they start anything; sourced, never run.
# A mistake is one sentence and exit code 2.
stop() { echo "$(basename "$0"): $*" >&2 && exit 2; }

# in_container - sets RUN, the words before Python, and PYTHON for the Apptainer image in CONTAINER.
in_container() {
    RUN=()
    [[ ${CONTAINER:-} ]] || return 0
    # --nv: the GPUs of this node; without one Apptainer says so and goes on
    RUN=(apptainer exec --nv --bind "$project" --bind "$PWD" "$CONTAINER")
    PYTHON=${PYTHON:-/opt/dist_looksam/.venv/bin/python}
}

# as_group FLAGS - sets FLAGS, with --group for --m, which launchers take for one of their own.
as_group() {
    local flag
    FLAGS=()
    for flag; do
        case $flag in
            --m) flag=--group ;;
            --m=*) flag=--group=${flag#--m=} ;;
        esac
        FLAGS+=("$flag")
    done
}

# counted NAME VALUE - VALUE must be a whole number from 1.
counted() { [[ $2 =~ ^[1-9][0-9]*$ ]] || stop "$1 must be a whole number from 1, got '$2'"; }

# hostfile FILE - FILE must list machines. A name must not look like an option of ssh.
hostfile() {
    [[ $1 ]] || stop "HOSTFILE must name a file like cluster/hostfile.example, got none"
    [[ -f $1 && -r $1 && -s $1 ]] ||
        stop "HOSTFILE must name a file like cluster/hostfile.example, got '$1'"
    local wrong
    wrong=$(without_comments "$1" | awk -v part='[A-Za-z0-9_][A-Za-z0-9_.-]*' '
        NF && $1 !~ "^(" part "@)?" part "$" {print NR ": " $0; exit}
        {for (i = 2; i <= NF; i++) if ($i !~ /^(max[_-])?slots=[1-9][0-9]*$/) {print NR ": " $0; exit}}')
    [[ ! $wrong ]] || stop "a line of $1 must be like 'node1 slots=8', got line $wrong"
    [[ $(machines "$1") ]] || stop "HOSTFILE must name machines, got none in $1"
}
without_comments() { sed 's/#.*//' "$1"; }
machines() { without_comments "$1" | awk 'NF {print $1}'; }
# with_slots FILE - prints one MACHINE:SLOTS a line.
with_slots() {
    without_comments "$1" |
        awk 'NF {n = 1; for (i = 2; i <= NF; i++) if (sub(/^slots=/, "", $i)) n = $i; print $1 ":" n}'
}
slots() { with_slots "$1" | awk -F: '{s += $NF} END {print s + 0}'; }

# reached MACHINE... - ssh must log in to each without a question. SSH_CHECK=no skips this check.
reached() {
    [[ ${SSH_CHECK:-yes} == yes ]] || return 0
    local lost
    lost=$(printf '%s\n' "$@" |
        xargs -r -P 64 -I '{}' bash -c \
            'ssh -o BatchMode=yes -o ConnectTimeout=10 -- "$1" true </dev/null >&2 || echo "$1"' - '{}' \
            2>/dev/null | sort -V | head -8 | paste -sd ' ') || true
    [[ ! $lost ]] || stop "every machine must be reached by ssh without a question, got no answer" \
        "from $lost; try ssh ${lost%% *} true, or take them out of $HOSTFILE"
}

# meeting_point HOST PORT - the first node must be known, and answer within MASTER_WAIT seconds.
meeting_point() {
    local address
    [[ $1 ]] || stop "NODES=$NODES needs MASTER_ADDR, the first node's name"
    counted MASTER_PORT "$2"
    address=$(getent ahosts "$1" | awk '{print $1; exit}') || true
    [[ $address ]] || stop "MASTER_ADDR must name the first node, got $1, which is unknown here"
    if [[ $address == 127.* || " $(hostname -I) " == *" $address "* ]]; then
        ! answers "$address" "$2" ||
            echo "$(basename "$0"): a program has port $2 here; where it is not this run's, start" \
                "again with another MASTER_PORT" >&2
        return 0
    fi
    until answers "$address" "$2"; do
        ((SECONDS < ${MASTER_WAIT:-600})) ||
            stop "the first node must answer within ${MASTER_WAIT:-600} s, got nothing from $1:$2;" \
                "start this there, too, or correct MASTER_ADDR and MASTER_PORT"
        sleep 0.5
    done
}
answers() { timeout 5 bash -c ": </dev/tcp/$1/$2" 2>/dev/null; }
