"""Runs the recipes of cluster/container/ in a bare Debian folder, without Docker or Apptainer.

    python tests/launchers/bare_debian.py FOLDER     # as root; 5 GB, ten minutes on two idle cores

makes FOLDER the smallest Debian (debootstrap), runs every instruction of Dockerfile and every
section of looksam.def in it by chroot, Horovod's build included, and trains two steps on two ranks.
BASE is then this Debian, TORCH what .venv/ has. What FOLDER has of an earlier call is used again.
Each command has a namespace of its own, so that its mounts end with it.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "cluster" / "container"
PACKAGES = "/packages"  # in the folder: this machine's Python packages, if they are taken
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
IN_NAMESPACE = """
root=$1 && shift
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/dev/shm"
while [[ $1 != -- ]]; do
    mkdir -p "$root$2" && mount --bind -o ro "$1" "$root$2" && shift 2
done
shift
exec chroot "$root" env -i "$@"
"""


@dataclass
class Folder:
    """A folder with Debian in it. env: of its commands; binds: (here, inside), read-only."""

    root: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": PATH, "HOME": "/root"})
    binds: list[tuple[Path, str]] = field(default_factory=list)

    def run(self, command: str, **env: str) -> str:
        """What `sh -ec COMMAND` prints by chroot. AssertionError if it fails."""
        binds = [str(part) for bind in self.binds for part in bind]
        inside = [f"{name}={value}" for name, value in {**self.env, **env}.items()]
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        words = [*namespaces, "bash", "-ec", IN_NAMESPACE, "bash", str(self.root), *binds, "--"]
        done = subprocess.run(
            [*words, *inside, "/bin/sh", "-ec", command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout[-5000:]}"
        return done.stdout

    def take_packages(self, site_packages: Path) -> None:
        """pip takes the packages of that folder for installed, and builds no Horovod."""
        self.binds.append((site_packages, PACKAGES))
        self.env["PYTHONPATH"] = PACKAGES
        wheels = Path.home() / ".cache" / "dist_looksam"
        for wheel in wheels.glob("horovod-*"):
            _copy(wheel, self.root / "root/.cache/dist_looksam" / wheel.name)


def bootstrapped(root: Path) -> Folder:
    """This machine's release of Debian. Inside, apt and pip reach what they reach here."""
    release = dict(re.findall(r"^(\w+)=(.*)$", Path("/etc/os-release").read_text(), re.M))
    if not (root / "etc/debian_version").exists():
        command = ["debootstrap", "--variant=minbase", release["VERSION_CODENAME"], str(root)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:]
    (root / "etc/dpkg/dpkg.cfg.d/unsafe").write_text("force-unsafe-io\n")
    shutil.rmtree(root / "etc/apt", ignore_errors=True)
    for path in ("etc/apt", "etc/resolv.conf", "etc/hosts", "usr/local/share/ca-certificates"):
        _copy(Path("/", path), root / path)
    folder = Folder(root)
    for name, value in _pip_settings().items():
        for path in map(Path, re.findall(r"(?<![\w/])(?:file://)?(/[^\s,]+)", value)):
            if path.is_dir():  # an index may link to its neighbours
                above = Path(*path.parts[:3])
                folder.binds.append((above, str(above)))
            elif path.is_file() and not path.is_relative_to("/etc/ssl"):
                _copy(path, root / path.relative_to("/"))
        folder.env[f"PIP_{name.upper().replace('-', '_')}"] = value
    return folder


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
    elif source.exists():
        shutil.copy(source, target)


def _pip_settings() -> dict[str, str]:
    """pip's settings on this machine: those of files, then those of the environment."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    said = subprocess.run(command, capture_output=True, text=True).stdout
    found = re.findall(r"^(\S+)\.([\w-]+)=(.*)$", said, re.M)
    found.sort(key=lambda row: row[0] == ":env:")
    return {name: ast.literal_eval(value) for _, name, value in found}


def instructions() -> Iterator[tuple[str, str]]:
    """(word, rest) of every instruction of Dockerfile."""
    text = re.sub(r"\\\n", " ", (RECIPES / "Dockerfile").read_text())
    for line in text.splitlines():
        if line and not line.startswith("#"):
            word, _, rest = line.partition(" ")
            yield word, rest


def build(folder: Folder, **arguments: str) -> str:
    """What `docker build` would do with Dockerfile. Returns the command of CMD."""
    given, command = dict(arguments), ""
    for word, rest in instructions():
        if word == "ARG":
            name, _, default = rest.partition("=")
            given.setdefault(name, default)
        elif word == "COPY":
            source, target = rest.split()
            copy(ROOT / source, folder.root / target.lstrip("/"))
        elif word == "RUN":
            print(folder.run(rest, **given), flush=True)
        elif word == "ENV":
            name, _, value = rest.partition("=")
            folder.env[name] = re.sub(r"\$(\w+)", lambda m: folder.env[m[1]], value)
        elif word == "CMD":
            command = shlex.join(ast.literal_eval(rest))
        else:
            assert word == "FROM", f"Dockerfile has {word}, which this does not know"
    return command


def copy(source: Path, target: Path) -> None:
    """COPY: all but what Dockerfile.dockerignore names, relative to `source`."""
    lines = (RECIPES / "Dockerfile.dockerignore").read_text().split()
    names = {line for line in lines if "/" not in line}
    anywhere = {line.removeprefix("**/") for line in lines if line.startswith("**/")}
    assert len(names) + len(anywhere) == len(lines)

    def ignored(folder: str, content: list[str]) -> set[str]:
        return {c for c in content if c in anywhere or (Path(folder) == source and c in names)}

    for old in target.glob("*"):  # of an earlier call; its .venv is used again
        if old.name not in names:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, ignore=ignored)


def sections(**arguments: str) -> dict[str, str]:
    """The sections of looksam.def by name, with {{ NAME }} replaced."""
    text = (RECIPES / "looksam.def").read_text()
    found = dict(re.findall(r"^%(\w+)\n(.*?)(?=^%|\Z)", text, re.M | re.S))
    given = dict(line.strip().split("=", 1) for line in found["arguments"].split()) | arguments

    def replaced(body: str) -> str:
        return re.sub(r"\{\{ (\w+) \}\}", lambda m: given[m[1]], body)

    return {name: replaced(body) for name, body in found.items()}


def set_up(root: Path) -> None:
    """%setup of looksam.def, which Apptainer runs on the machine that builds."""
    env = os.environ | {"APPTAINER_ROOTFS": str(root)}
    subprocess.run(["/bin/sh", "-ec", sections()["setup"]], cwd=ROOT, env=env, check=True)


def start(folder: Folder, *arguments: str) -> str:
    """`apptainer run IMAGE ARGUMENTS`: %environment, then %runscript."""
    parts = sections()
    script = f"set -- {shlex.join(arguments)}\n{parts['environment']}\n{parts['runscript']}"
    return folder.run(script, PATH=PATH)


def train(folder: Folder) -> str:
    """Two steps of look_sam on two ranks of ZeRO, which mpirun starts."""
    flags = "--optimizer look_sam --data digits --model vit_8 --batch_size 32 --steps 2 --k 2"
    where = "--backend zero --device cpu --out /run2"
    env = {"HOSTFILE": "/hosts", "MPI_FLAGS": "--allow-run-as-root", "OMP_NUM_THREADS": "1"}
    env |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    script = f"echo localhost slots=2 >/hosts\nbash /opt/dist_looksam/launch/mpi.sh {flags} {where}"
    return folder.run(script, **env)


def main() -> None:
    folder = bootstrapped(Path(sys.argv[1]).absolute())
    command = build(folder, TORCH=f"torch=={version('torch').partition('+')[0]}")
    print(folder.run(command), start(folder, "--version"), train(folder), sep="\n")


if __name__ == "__main__":
    main()
