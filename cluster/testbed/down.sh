#!/bin/bash
# down.sh - stops all hosts of this testbed and removes its processes, namespaces and files.
set -uo pipefail
. "$(dirname "$0")/lib.sh"
for f in "$STATE"/wire/*; do [[ ! -s $f ]] || kill "$(<"$f")" 2>/dev/null; done
for f in "$STATE"/pid/*; do [[ ! -e $f ]] || crash "$(basename "$f")"; done
for ns in /run/netns/"$NS"-*; do [[ ! -e $ns ]] || ip netns del "$(basename "$ns")"; done
# The watcher of TESTBED_OWNER may run this script.
[[ ! -s $STATE/owner || $(<"$STATE/owner") == "$$" ]] ||
    kill -- "-$(<"$STATE/owner")" 2>/dev/null
rm -rf "$STATE"
