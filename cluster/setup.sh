#!/bin/bash
# setup.sh [--all] - makes .venv/ in the project's root, with this package (editable) and DeepSpeed in it.
#
# --all adds what the tests use: compilers, OpenMPI, SLURM, ssh, pdsh and a built Horovod.
# Run it as often as you like: when nothing changed it is done in a second. Debian packages are
# installed when this is root on Debian; anyone else is told what is missing, and the rest goes on.
#
# PYTHON  the Python (>= 3.10) that makes .venv/; default python3
# TORCH   what pip shall install as torch; default torch==2.13.0. Where a site has a build of its
#         own (CUDA), name it here: everything else is installed around it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
TORCH=${TORCH:-torch==2.13.0}
DEEPSPEED=deepspeed==0.19.8
TRITON=triton==3.9.0 # its interpreter, for the tests of the kernels; 1 GB
EXTRAS=report,deepspeed,mpi,data,dev,docs,tensorboard,wandb,peers
TRAINERS=(lightning==2.6.6 accelerate==1.15.0 transformers==5.24.0) # that examples/ and tests use
TIMM=(timm==1.0.31 torchvision==0.28.0) # of examples/timm_loop.py, in .venv/timm: a torchvision of
                                        # another build of torch cannot be imported, and transformers
                                        # imports the one that it finds
HOROVOD_NEEDS=(setuptools packaging numpy cloudpickle psutil pyyaml cffi)
DATA_PACKAGES=(dataset-fashion-mnist)
JPEG_PACKAGES=(gcc libc6-dev libjpeg-dev)
TEST_PACKAGES=(g++ make cmake python3-dev openmpi-bin libopenmpi-dev libpmix2 mpich
    slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge
    debootstrap openssh-server openssh-client pdsh iproute2 iputils-ping procps chromium)
stamp=.venv/.set_up                # written last: the hash of what .venv/ was made from
unfinished=.cache/venv-unfinished  # there while pip works: .venv/ is then not believed. Outside it,
                                   # because an interrupted `rm -rf .venv` may take the mark first.

say() { printf 'setup: %s\n' "$*"; }
die() {
    printf 'setup: %s\n' "$*" >&2
    exit 2
}

all=
case "${1:-}" in
    "") ;;
    --all) all=1 ;;
    *) die "unknown argument $1; allowed: --all, or nothing" ;;
esac

# fingerprint [all] - of what .venv/ is made from, without or with what only --all installs.
fingerprint() { { cat pyproject.toml setup.py dist_looksam/data/*.c cluster/setup.sh && echo "$root $TORCH ${1:-}"; } | sha256sum; }
made() {
    [[ -x .venv/bin/python && -s $stamp && ! -e $unfinished ]] || return
    [[ $(<"$stamp") == "$(fingerprint all)" || (! $all && $(<"$stamp") == "$(fingerprint)") ]]
}

missing_packages() {
    local p
    for p in "$@"; do
        dpkg-query -W -f='${db:Status-Abbrev}' "$p" 2>/dev/null | grep -q '^ii' || echo "$p"
    done
}

# debian PURPOSE PACKAGE... - install what is missing, or say in one sentence what to install.
debian() {
    local purpose=$1 missing
    shift
    if ! command -v dpkg-query >/dev/null; then
        say "this is not Debian: for $purpose, install what it calls $*"
        return 0
    fi
    mapfile -t missing < <(missing_packages "$@")
    ((${#missing[@]})) || return 0
    if ((EUID)); then
        say "not root: for $purpose, let root run: apt-get install --no-install-recommends ${missing[*]}"
        return 0
    fi
    say "Debian packages for $purpose: ${missing[*]}"
    install_packages "${missing[@]}" || say "apt could not install ${missing[*]}: going on without $purpose"
}

# A subshell, so that its trap is its own. The guard keeps new daemons (slurmd, munged, sshd)
# from starting on this machine: the test cluster starts its own.
install_packages() (
    guard=/usr/sbin/policy-rc.d
    if [[ ! -e $guard ]]; then
        trap 'rm -f "$guard"' EXIT
        trap 'exit 130' INT TERM
        printf '#!/bin/sh\nexit 101\n' >"$guard"
        chmod 755 "$guard"
    fi
    export DEBIAN_FRONTEND=noninteractive
    lock=(-o DPkg::Lock::Timeout=300)
    apt-get -qq "${lock[@]}" update || true # an old list may still do
    apt-get -qq "${lock[@]}" install -y --no-install-recommends "$@" >/dev/null
)

find_python() {
    PYTHON=${PYTHON:-python3}
    if [[ $PYTHON == python3 ]] && ! python3 -c 'import ensurepip' 2>/dev/null; then
        debian "Python" python3 python3-venv
    fi
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        die "needs Python 3.10 or newer, but '$PYTHON' is not: set PYTHON=/path/to/python3"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        die "'$PYTHON' cannot make a virtual environment: install its venv package (Debian: python3-venv)"
}

# A python in .venv/bin/ is not enough: without pyvenv.cfg it is the machine's own.
is_venv() { .venv/bin/python -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null; }

make_venv() {
    [[ ! -e $unfinished ]] || say "an earlier set-up did not finish: making .venv/ anew"
    if [[ -e $unfinished ]] || ! is_venv; then
        find_python
        say "making .venv/ with $("$PYTHON" --version)"
        touch "$unfinished"
        rm -rf .venv
        "$PYTHON" -m venv .venv
    fi
}

pip_install() {
    PIP_REQUIRE_VIRTUALENV=1 .venv/bin/python -m pip install -q --disable-pip-version-check "$@"
}

# torch comes first and alone, then holds everything after it to itself: a resolver that is free
# to choose takes another torch, with gigabytes of CUDA.
install_python_packages() {
    touch "$unfinished"
    rm -f "$stamp"
    say "$TORCH (some 200 MB, more with CUDA)"
    pip_install "$TORCH"
    .venv/bin/python - >.venv/constraints.txt <<-END
	from importlib.metadata import version
	print("torch==" + version("torch"), "$DEEPSPEED", sep="\n")
	END
    if [[ $all ]]; then # Horovod compiles while the rest is fetched
        pip_install -c .venv/constraints.txt "${HOROVOD_NEEDS[@]}"
        setsid cluster/horovod/build.sh wheel 9>&- & # a group of its own, to end it as one
        builder=$!
        trap 'kill -- "-$builder" 2>/dev/null || true' EXIT
    fi
    say "$DEEPSPEED and the other packages"
    pip_install -c .venv/constraints.txt --use-pep517 -e ".[$EXTRAS]"
    if [[ $all ]]; then
        pip_install -c .venv/constraints.txt "${TRAINERS[@]}"
        pip_install --no-deps --target .venv/timm --upgrade "${TIMM[@]}"
    fi
    if [[ $all && $(uname -m) == x86_64 ]]; then
        pip_install --no-deps "$TRITON"
    fi
    say "checking that torch and deepspeed import"
    DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} .venv/bin/python -c 'import torch, deepspeed' >/dev/null
    fingerprint ${all:+all} >"$stamp.new"
    rm -f "$unfinished"
    mv "$stamp.new" "$stamp"
}

set_up_python() {
    made && return
    mkdir -p .cache
    exec 9>.cache/setup.lock
    flock -n 9 || { say "another set-up works here: waiting for it" && flock 9; }
    if ! made; then
        make_venv
        install_python_packages
    fi
    exec 9>&-
}

debian "decoding JPEG files in C (without it: by Python, at half the speed)" "${JPEG_PACKAGES[@]}"
debian "the Fashion-MNIST images (without them: --data digits)" "${DATA_PACKAGES[@]}"
[[ -z $all ]] || debian "the tests of Horovod, MPI, SLURM and web pages" "${TEST_PACKAGES[@]}"
set_up_python
if [[ $all ]]; then
    wait # for the wheel, if it is being built
    trap - EXIT
    cluster/horovod/build.sh || say "going on without Horovod"
fi
say "ready: .venv/bin/dist-looksam"
