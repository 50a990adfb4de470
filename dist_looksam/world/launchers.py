"""Rank, size and master address from the variables that launchers set.

A *launcher* starts the processes; its *claim* is the rank, size, ... in its variables. Launchers
can be nested: torchrun inside srun leaves both sets of variables, and the innermost is right.
"""

import hashlib
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ConfigError
from . import hostlist

LOCAL = "127.0.0.1"
DEFAULT_PORT = 29500


def _names(prefix: str, node: str = "") -> tuple[str, str, str, str, str]:
    ranks = (f"{prefix}_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    return (*ranks, node)  # type: ignore[return-value]


# Innermost first. The variables: rank, size, local rank, local size, node.
_VARIABLES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
    "deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK"),
    "horovod": _names("HOROVOD", "HOROVOD_CROSS_RANK"),
    "openmpi": _names("OMPI_COMM_WORLD"),
    "mvapich2": _names("MV2_COMM_WORLD"),
    "flux": ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", "", ""),
    "jsrun": _names("JSM_NAMESPACE"),
    "pals": ("PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID", "PMI_LOCAL_SIZE", "PALS_NODEID"),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", ""),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "", "SLURM_NODEID"),
    "env": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
}
# Only the named launcher sets its mark; RANK and WORLD_SIZE are set by many, and by hand.
_MARKS = {"torchrun": "TORCHELASTIC_RUN_ID", "deepspeed": "CROSS_SIZE"}
# MPI launchers, under which mpi4py can broadcast the address of rank 0.
_OF_MPI = ("openmpi", "jsrun", "mvapich2", "flux", "pals", "mpich")
_OF_SCHEDULERS = ("flux", "jsrun", "pals", "slurm")  # may start the daemons of other launchers
# Ranks of unsupported launchers, or ranks within a node: above 0 only if there are several ranks.
_SIGNS = (
    *("PMIX_RANK", "PMI_ID", "ALPS_APP_PE", "MP_CHILD", "MPT_LRANK", "MPIRUN_RANK", "LOCAL_RANK"),
    *("MVP_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
)
_SLURM_SPECIAL_STEPS = 0xFFFFFFF0  # the shell of `salloc`, the batch script: not tasks of a step


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's place in the job. All ranks have the same size, master_addr and master_port.

    `local_rank` counts within `node`, `local_size` is the number of ranks there. `launcher` is one
    of torchrun, deepspeed, horovod (over gloo, or over Open MPI), openmpi, jsrun, mvapich2, flux,
    pals, mpich, slurm, env (RANK and WORLD_SIZE set by hand) and single.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0
    master_addr: str = LOCAL
    master_port: int = DEFAULT_PORT
    launcher: str = "single"

    @classmethod
    def from_env(
        cls, env: Mapping[str, str] | None = None, *, local_rank: int | None = None
    ) -> "World":
        """From the launcher's variables in `env` (default: os.environ).

        `local_rank` is the value of a `--local_rank` flag, if there was one. MASTER_ADDR and
        MASTER_PORT take precedence over derived values. No communication, except that under an MPI
        over several nodes without MASTER_ADDR the address is broadcast with mpi4py.
        Raises ConfigError if two launchers contradict each other, if an unknown one has started
        several ranks, or if there is no address.
        """
        env = os.environ if env is None else env
        claim = _innermost(env)
        if claim is None:
            port = _port(env) or _free_port()
            return cls(master_addr=env.get("MASTER_ADDR", LOCAL), master_port=port)
        addr, port = _meeting_point(claim, env)
        local_size = claim.local_size or claim.size  # unknown: as if on one machine
        return cls(
            rank=claim.rank,
            size=claim.size,
            local_rank=_local_rank(claim, local_rank, local_size),
            local_size=local_size,
            node=claim.rank // local_size if claim.node is None else claim.node,
            master_addr=addr,
            master_port=port,
            launcher="horovod" if _by_horovodrun(claim, env) else claim.launcher,
        )

    def __str__(self) -> str:
        return (
            f"rank {self.rank}/{self.size}  local {self.local_rank}/{self.local_size}  "
            f"node {self.node} ({socket.gethostname()})  "
            f"master {self.master_addr}:{self.master_port}  launcher {self.launcher}"
        )


@dataclass(frozen=True)
class _Claim:
    launcher: str
    rank: int
    size: int
    local_rank: int | None
    local_size: int | None
    node: int | None

    def same(self, other: "_Claim") -> bool:
        return (self.rank, self.size) == (other.rank, other.size)

    def __str__(self) -> str:
        rank, size, *_ = _VARIABLES[self.launcher]
        return f"{rank}={self.rank} {size}={self.size}"


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "") if name else ""
    if not text:
        return None
    if not text.isdecimal():
        raise ConfigError(f"{name} must be a whole number, got {text!r}: unset or correct it.")
    return int(text)


def _port(env: Mapping[str, str]) -> int | None:
    port = _number(env, "MASTER_PORT")
    if port is not None and port >= 2**16:
        raise ConfigError(f"MASTER_PORT must be below 65536, got {port}: correct it.")
    return port


def _claim(launcher: str, env: Mapping[str, str]) -> _Claim | None:
    """The claim of one launcher, or None if it did not start this process."""
    if launcher in _MARKS and _MARKS[launcher] not in env:
        return None
    rank, size, local_rank, local_size, node = (_number(env, n) for n in _VARIABLES[launcher])
    if launcher == "slurm":
        size, local_size = _slurm_sizes(env, node)
    if launcher == "flux":
        local_size = _flux_local_size(env, size)
    if rank is None or size is None:
        return None
    if not rank < size:
        raise ConfigError(
            f"{launcher} says this is rank {rank} of {size}, ranks count from 0 to size - 1: "
            f"correct {_VARIABLES[launcher][0]} or {_VARIABLES[launcher][1]}."
        )
    return _Claim(launcher, rank, size, local_rank, local_size, node)


def _by_horovodrun(claim: _Claim, env: Mapping[str, str]) -> bool:
    """True if horovodrun has called Open MPI's mpirun, for which it sets no variable of its own.

    It always calls mpirun with these settings, and gives both transports the same list of
    interfaces. Under another MPI it cannot be recognised.
    """
    interfaces = env.get("OMPI_MCA_btl_tcp_if_include")
    return (
        claim.launcher == "openmpi"
        and env.get("OMPI_MCA_pml") == "ob1"
        and env.get("OMPI_MCA_btl") == "^openib"
        and interfaces is not None
        and interfaces == env.get("NCCL_SOCKET_IFNAME")
    )


def _slurm_sizes(env: Mapping[str, str], node: int | None) -> tuple[int | None, int | None]:
    """(tasks of the step, tasks on this node); (None, None) outside a step of several tasks.

    In a batch script, and in the shell of `salloc`, SLURM_PROCID=0 and SLURM_NTASKS are set too,
    but the other tasks are not started.
    """
    step = _number(env, "SLURM_STEP_ID")
    if step is None:
        step = _number(env, "SLURM_STEPID")
    tasks = _number(env, "SLURM_STEP_NUM_TASKS") or _number(env, "SLURM_NTASKS")
    if step is None or step >= _SLURM_SPECIAL_STEPS or tasks is None or tasks < 2:
        return None, None
    per_node = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE")
    if not per_node or node is None:
        return tasks, None
    try:
        numbers = hostlist.counts(per_node)
    except ValueError as error:
        raise ConfigError(f"SLURM_TASKS_PER_NODE must be like 4(x2),1: {error}.") from None
    return tasks, numbers[node] if node < len(numbers) else None


def _flux_local_size(env: Mapping[str, str], size: int | None) -> int | None:
    """Tasks on a node if all nodes have equally many; Flux has no variable for it. Else None."""
    nodes = _number(env, "FLUX_JOB_NNODES")
    return size // nodes if size and nodes and size % nodes == 0 else None


def _innermost(env: Mapping[str, str]) -> _Claim | None:
    """The claim of the innermost launcher. ConfigError if another claim contradicts it and is not
    of a launcher around it."""
    claims = [claim for launcher in _VARIABLES if (claim := _claim(launcher, env)) is not None]
    if not claims:
        _no_half_claim(env)
        return None
    first = claims[0]
    if first.launcher == "mpich" and first.local_rank is None:
        # srun --mpi=pmi2 sets PMI_RANK and PMI_SIZE; the place in the node is in its own variables
        claims.sort(key=lambda claim: not (claim.launcher == "slurm" and claim.same(first)))
    inner, others = claims[0], {claim.launcher: claim for claim in claims[1:]}
    if inner.launcher in _MARKS:  # unambiguous
        return inner
    around = {*_OF_SCHEDULERS} if inner.launcher != "slurm" else set()
    if "mpich" in others and "slurm" in others and others["mpich"].same(others["slurm"]):
        around.add("mpich")  # srun --mpi=pmi2 sets the PMI variables
    for other in others.values():
        if not other.same(inner) and other.launcher not in around:
            raise ConfigError(
                f"two launchers contradict each other, got {inner} and {other}: start with one, or "
                f"unset the variables of the other."
            )
    world_size = _number(env, "WORLD_SIZE")
    if world_size not in (None, inner.size):
        raise ConfigError(
            f"two launchers contradict each other, got {inner} and WORLD_SIZE={world_size}: unset "
            f"WORLD_SIZE or start {world_size} ranks."
        )
    return inner


def _no_half_claim(env: Mapping[str, str]) -> None:
    """ConfigError if some variable shows that there are several ranks: each would train alone."""
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    if (rank or 0) > 0 or (size or 1) > 1:
        raise ConfigError(
            f"RANK and WORLD_SIZE must be set together, got RANK={rank} WORLD_SIZE={size}: start "
            f"with torchrun, deepspeed, srun, mpirun or horovodrun, or unset them."
        )
    # Slurm's are set in a batch script, too, which is one process.
    pairs = [names[:2] for launcher, names in _VARIABLES.items() if launcher != "slurm"]
    ranks = [name for name in (*_SIGNS, *(r for r, _ in pairs)) if _above(env, name, 0)]
    if found := [*ranks, *(size for _, size in pairs if _above(env, size, 1))]:
        name, value = found[0], env[found[0]]
        raise ConfigError(
            f"the launcher must say the rank and how many there are, got {name}={value} and no "
            f"more that is known: export RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, "
            f"MASTER_ADDR and MASTER_PORT on every rank, or unset {name} to train alone."
        )


def _above(env: Mapping[str, str], name: str, least: int) -> bool:
    text = env.get(name, "")
    return text.isdecimal() and int(text) > least


def _local_rank(claim: _Claim, flag: int | None, local_size: int) -> int:
    """The launcher's local rank, or that of a `--local_rank` flag, which must not contradict it."""
    if flag is None or flag < 0:  # -1 is what old launch scripts write for "none"
        flag = claim.local_rank
    if claim.local_rank is not None and flag != claim.local_rank:
        raise ConfigError(
            f"--local_rank contradicts {_VARIABLES[claim.launcher][2]}, got {flag} and "
            f"{claim.local_rank}: leave out --local_rank."
        )
    return claim.rank % local_size if flag is None else flag


def _meeting_point(claim: _Claim, env: Mapping[str, str]) -> tuple[str, int]:
    """(master_addr, master_port), the same on every rank."""
    addr, port = env.get("MASTER_ADDR"), _port(env)
    if addr is None and claim.launcher in _OF_MPI and claim.local_size != claim.size:
        addr, free = _agreed_by_mpi(claim)
        return addr, port or free
    port = port or _job_port(claim.launcher, env)
    if addr is not None:
        return addr, port
    if claim.local_size == claim.size:
        return LOCAL, port
    if claim.launcher == "slurm":
        return _first_host(env), port
    if claim.launcher == "horovod" and "HOROVOD_GLOO_RENDEZVOUS_ADDR" in env:
        return env["HOROVOD_GLOO_RENDEZVOUS_ADDR"], port  # the machine horovodrun was called on
    raise ConfigError(
        f"MASTER_ADDR must name the host of rank 0, got none for {claim.size} ranks started by "
        f"{claim.launcher}: export MASTER_ADDR=HOST and MASTER_PORT=PORT on every rank."
    )


def _job_port(launcher: str, env: Mapping[str, str]) -> int:
    """A port below the ephemeral ones, the same within a job, different between jobs."""
    names = {
        "slurm": ("SLURM_JOB_ID", "SLURM_STEP_ID"),
        "openmpi": ("OMPI_MCA_ess_base_jobid", "PMIX_NAMESPACE"),
        "jsrun": ("LSB_JOBID", "PMIX_NAMESPACE"),
        "flux": ("FLUX_JOB_ID",),
        "pals": ("PALS_APID",),
        "horovod": ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT"),
    }.get(launcher, ())
    identity = " ".join(env[name] for name in names if name in env)
    if not identity:
        return DEFAULT_PORT
    return 12000 + int.from_bytes(hashlib.sha256(identity.encode()).digest()[:4], "big") % 20000


def _first_host(env: Mapping[str, str]) -> str:
    """The host of a SLURM step's task 0."""
    text = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    try:
        return hostlist.expand(text)[0]
    except (ValueError, IndexError):
        pass
    if text and shutil.which("scontrol"):
        command = ["scontrol", "show", "hostnames", text]
        shown = subprocess.run(command, capture_output=True, text=True, check=False)
        if shown.returncode == 0 and shown.stdout.split():
            return shown.stdout.split()[0]
    raise ConfigError(
        f"SLURM_STEP_NODELIST must be a list like node[1-3],x1, got {text!r}: export MASTER_ADDR "
        f"with the host of task 0."
    )


def _agreed_by_mpi(claim: _Claim) -> tuple[str, int]:
    """Rank 0's host name and a free port there, from one MPI broadcast."""
    reason = "mpi4py is not installed"
    try:
        from mpi4py import MPI

        if MPI.COMM_WORLD.Get_size() == claim.size:
            mine = (socket.gethostname(), _free_port()) if claim.rank == 0 else None
            return MPI.COMM_WORLD.bcast(mine, root=0)
        reason = f"mpi4py uses another MPI ({MPI.Get_library_version().split(',')[0]})"
    except (ImportError, RuntimeError) as error:  # RuntimeError: no MPI library found
        if not isinstance(error, ModuleNotFoundError):
            reason = f"mpi4py does not load ({error})"
    raise ConfigError(
        f"MASTER_ADDR must name the host of rank 0 where ranks are on several nodes, got none and "
        f"{reason}: pass -x MASTER_ADDR=HOST (MPICH: -genv MASTER_ADDR HOST) or pip install mpi4py."
    )


def slurm_job(env: Mapping[str, str] | None = None) -> str | None:
    """This process's SLURM job, as an argument for scontrol and scancel; None outside SLURM.

    ARRAY_ELEMENT in an array: the plain job number of one of its elements is that of the array.
    """
    env = os.environ if env is None else env
    array, element = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{element}" if array and element else env.get("SLURM_JOB_ID")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]
