#!/bin/bash
# on.sh HOST COMMAND...   runs COMMAND on HOST (head, node1 ..), in this folder
# on.sh VERB HOST ...     crash, powercut, restart, unplug, replug, slow, fast (see lib.sh)
set -euo pipefail
. "$(dirname "$0")/lib.sh"
case ${1:-} in
    crash | powercut | restart | unplug | replug | slow | fast) "$@" ;;
    head | node*) on "$@" ;;
    *) die "got '${1:-}'; allowed: head, node1 .. node$NODES, or a verb: crash, powercut, restart, unplug, replug, slow, fast" ;;
esac
