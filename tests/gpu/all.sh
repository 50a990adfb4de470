#!/bin/bash
# all.sh [correct|speed|profile ...] - what only a GPU can show: correctness, speed, a step's profile.
#
# All parts by default, in this order. Results are JSON lines, written as they come, so that a script
# that is cut off has lost nothing; at its end it makes a table of them.
#   OUT         folder of the results; default build/gpu: lines.jsonl, README.md, log.txt, profile.png
#   TIME_LIMIT  seconds; default 540. Each part does what is most telling first, and what fits
#   DEVICE      cuda or cpu; default cuda. On a CPU the same steps with tiny models: no speeds
#   WHEELS      folder of wheels of packages that this Python lacks; installed into a folder of their own
#   PYTHON      default: .venv/bin/python if there is one, else python3
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
began=$(date +%s)
limit=${TIME_LIMIT:-540}
export OUT=${OUT:-build/gpu} DEVICE=${DEVICE:-cuda}
parts=("$@")
((${#parts[@]})) || parts=(correct speed profile)
declare -A share=([correct]=36 [speed]=50 [profile]=14) # of the time
declare -A file=([correct]=correct [speed]=speed [profile]=launches) # `profile` is a module of Python's
total=0
for part in "${parts[@]}"; do
    [[ -n ${share[$part]:-} ]] || {
        echo "all.sh needs parts of correct, speed, profile, got $part." >&2
        exit 2
    }
    total=$((total + share[$part]))
done
mkdir -p "$OUT" || exit
OUT=$(cd "$OUT" && pwd)
: >"$OUT/lines.jsonl"
exec > >(tee "$OUT/log.txt") 2>&1
[[ -x .venv/bin/python ]] && own=.venv/bin/python || own=python3
python=${PYTHON:-$own}
here=$PWD/tests/gpu
export PYTHONPATH=$PWD:$here:${PYTHONPATH:-} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
export TORCHINDUCTOR_CACHE_DIR=$temporary/inductor # one for all processes
if [[ -n ${WHEELS:-} ]]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
        --target "$temporary/site" "$WHEELS"/*.whl && PYTHONPATH=$temporary/site:$PYTHONPATH
fi
note() {
    printf '{"part": "%s", "why": "%s"}\n' "$1" "$2" | tee -a "$OUT/lines.jsonl"
}
used=0 failed=0
"$python" "$here/lines.py" "TIME_LIMIT=$limit bash tests/gpu/all.sh $*" || exit
for part in "${parts[@]}"; do
    used=$((used + share[$part]))
    end=$((began + (limit - 5) * used / total)) # what an earlier part has left is for the next
    left=$((end - $(date +%s)))
    echo "== $part, $left seconds"
    if ((left <= 5)); then
        note "$part" "no time was left"
        continue
    fi
    PART_END=$end timeout -k 5 "$left" "$python" "$here/${file[$part]}.py"
    case $? in
        0) ;;
        124 | 137) note "$part" "cut off: no time was left" ;;
        *) failed=1 ;;
    esac
done
"$python" "$here/table.py" "$OUT/lines.jsonl" >"$OUT/README.md" || failed=$?
cat "$OUT/README.md"
echo "$(($(date +%s) - began)) seconds; results: $OUT"
exit "$failed"
