#!/bin/bash
# build.sh [wheel] - builds Horovod for the torch in .venv/ and installs it there.
#
# The wheel is kept in ${XDG_CACHE_HOME:-~/.cache}/dist_looksam/, one per torch, Python, machine type
# and version of this file, so that only the first time takes minutes (a compiler, CMake, MPI, and
# 2 GiB of memory per core). `wheel` makes the wheel and installs nothing.
#
# HOROVOD_GPU_OPERATIONS=NCCL, HOROVOD_BUILD_ARCH_FLAGS and Horovod's other build settings are
# passed on; another setting makes another wheel.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
VERSION=0.28.1
SHA256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
python=$PWD/.venv/bin/python
cache=${XDG_CACHE_HOME:-$HOME/.cache}/dist_looksam
stamp=.venv/.horovod # names the wheel that is installed

say() { printf 'horovod: %s\n' "$*"; }
die() {
    printf 'horovod: %s\n' "$*" >&2
    exit 2
}
pip() { PIP_REQUIRE_VIRTUALENV=1 "$python" -m pip "$@" -q --disable-pip-version-check; }

wheel_key() {
    local settings
    settings=$({ cat cluster/horovod/build.sh && env | grep '^HOROVOD_' | sort; } | sha256sum)
    "$python" - "$VERSION" "${settings:0:10}" <<-'END'
	import platform, sys
	from importlib.metadata import version
	python = "cp%d%d" % sys.version_info[:2]
	print("horovod", sys.argv[1], f"torch{version('torch')}", python, platform.machine(), sys.argv[2], sep="-")
	END
}

require_tools() {
    local tool missing=()
    for tool in "${CXX:-g++}" make cmake mpicxx; do
        command -v "$tool" >/dev/null || missing+=("$tool")
    done
    "$python" -c 'import os, sys, sysconfig as s
sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' || missing+=("Python.h")
    ((${#missing[@]} == 0)) ||
        die "cannot build without ${missing[*]}: install them (Debian: apt-get install g++ make cmake openmpi-bin libopenmpi-dev python3-dev)"
    "$python" -c 'import setuptools, packaging, numpy, cloudpickle, psutil, yaml, cffi' 2>/dev/null ||
        pip install setuptools packaging numpy cloudpickle psutil pyyaml cffi
}

# edit FILE SED [COUNT PATTERN] - after it, PATTERN stands COUNT times in FILE, or the source is not
# the one this was written for.
edit() {
    local file=$1 found
    sed -i "$2" "$file"
    found=$(grep -c "$4" "$file" || true)
    [[ $found == "$3" ]] || die "patching $file left '$4' $found times, not $3: is this $VERSION?"
}

# torch wants C++17 where Horovod asks for 14; Python 3.12 has no distutils; GCC 13 includes less.
patch_source() {
    edit CMakeLists.txt 's/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD 17)/' \
        2 'CMAKE_CXX_STANDARD 17'
    edit horovod/torch/CMakeLists.txt 's/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD 17)/' \
        1 'CMAKE_CXX_STANDARD 17'
    edit horovod/torch/CMakeLists.txt \
        "s/from distutils.*get_python_inc())/import sysconfig; print(sysconfig.get_path('include'))/" \
        1 "sysconfig.get_path('include')"
    edit horovod/runner/js_run.py \
        's/from distutils.spawn import find_executable/from shutil import which as find_executable/' \
        1 'from shutil import which as find_executable'
    edit horovod/common/common.h '0,/^#include/s//#include <stdexcept>\n&/' 1 '<stdexcept>'
    edit horovod/common/group_table.h '0,/^#include/s//#include <string>\n&/' 1 '<string>'
    # no debug information: a smaller and quicker build
    edit setup.py "s/'RelWithDebInfo'/'Release'/" 1 "'Release'"
}

# Sources that share torch's headers are compiled ten at a time, which saves two fifths of the work.
# Left out for CUDA, whose sources nobody here has compiled that way.
compile_in_batches() {
    local gloo=third_party/gloo/gloo batches='PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 10'
    "$python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' || return 0
    echo "set_target_properties(\${PYTORCH_TARGET_LIB} $batches)" >>horovod/torch/CMakeLists.txt
    sed -i "s|^    target_compile_definitions(gloo PRIVATE .*|&\n    set_target_properties(gloo $batches)\n\
    set_source_files_properties(\"\${PROJECT_SOURCE_DIR}/$gloo/allreduce_local.cc\"\
 TARGET_DIRECTORY gloo PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)|" CMakeLists.txt
}

num_jobs() { # two GiB of memory for each
    awk -v cores="$(nproc)" '/MemAvailable/ {n = int($2 / 2097152)}
        END {print n < 1 ? 1 : n < cores ? n : cores}' /proc/meminfo
}

build_wheel() (
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    trap 'exit 130' INT TERM
    cd "$folder"
    say "fetching the source of $VERSION"
    pip download --no-deps --no-binary horovod --no-build-isolation "horovod==$VERSION"
    echo "$SHA256  horovod-$VERSION.tar.gz" | sha256sum --check --quiet ||
        die "the source has another checksum than the one known here: not building it"
    tar xzf "horovod-$VERSION.tar.gz"
    cd "horovod-$VERSION"
    patch_source
    compile_in_batches
    export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
    export HOROVOD_WITH_GLOO=1 HOROVOD_WITH_MPI=1
    export MAKEFLAGS=-j$(num_jobs) LDFLAGS="${LDFLAGS:-} -s" # -s: stripped, 2 MB instead of 65
    say "compiling (about two minutes on two idle cores)"
    pip wheel --no-build-isolation --no-deps -w "$folder/wheel" . >"$folder/log" 2>&1 ||
        { tail -30 "$folder/log" >&2 && die "the build failed; above are its last lines"; }
    mkdir -p "$cache/$key.new"
    cp "$folder"/wheel/horovod-*.whl "$cache/$key.new/"
    mv "$cache/$key.new" "$cache/$key"
)

[[ -x $python ]] || die "no .venv/ here: bash cluster/setup.sh"
key=$(wheel_key)
[[ ${1:-} == wheel || ! -s $stamp || $(<"$stamp") != "$key" ]] || exit 0
if [[ ! -d $cache/$key ]]; then
    require_tools
    mkdir -p "$cache"
    exec 8>"$cache/horovod.lock"
    flock -n 8 || { say "another build works here: waiting for it" && flock 8; }
    if [[ ! -d $cache/$key ]]; then
        rm -rf "$cache/$key.new"
        build_wheel
    fi
    exec 8>&-
fi
[[ ${1:-} != wheel ]] || exit 0
rm -f "$stamp"
pip install --force-reinstall --no-deps "$cache/$key"/horovod-*.whl
pip install cloudpickle psutil pyyaml packaging cffi # what it needs at run time
(cd / && "$python" -c 'import horovod.torch')
echo "$key" >"$stamp"
say "$VERSION installed"
