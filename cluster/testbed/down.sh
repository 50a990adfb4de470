#!/bin/bash
# down.sh - stops every host of this testbed and removes all it made: processes, namespaces, files.
set -uo pipefail
. "$(dirname "$0")/lib.sh"
for f in "$STATE"/wire/*; do [[ ! -s $f ]] || kill "$(<"$f")" 2>/dev/null; done
for f in "$STATE"/pid/*; do [[ ! -e $f ]] || crash "$(basename "$f")"; done
for ns in /run/netns/"$NS"-*; do [[ ! -e $ns ]] || ip netns del "$(basename "$ns")"; done
# The watcher of TESTBED_OWNER may be what runs this.
[[ ! -s $STATE/owner || $(<"$STATE/owner") == "$$" ]] ||
    kill -- "-$(<"$STATE/owner")" 2>/dev/null
rm -rf "$STATE"
