import subprocess
import sys
from types import SimpleNamespace

import pytest

from dist_looksam.errors import ConfigError
from dist_looksam.world import World, hostlist, launchers

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "n0",
    "MASTER_PORT": "4000",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "4",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "n0",
    "MASTER_PORT": "4000",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "n[07-08]",
    "SLURM_JOB_ID": "1234",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_MCA_ess_base_jobid": "77",
    "MASTER_ADDR": "n0",
}
MPICH = {
    "PMI_RANK": "5",
    "PMI_SIZE": "8",
    "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "4",
    "MASTER_ADDR": "n0",
}
HOROVOD = {
    "HOROVOD_RANK": "5",
    "HOROVOD_SIZE": "8",
    "HOROVOD_LOCAL_RANK": "1",
    "HOROVOD_LOCAL_SIZE": "4",
    "HOROVOD_CROSS_RANK": "1",
    "HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.1",
    "HOROVOD_GLOO_RENDEZVOUS_PORT": "555",
}
HOROVODRUN_MPI = OPENMPI | {
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "^openib",
    "OMPI_MCA_btl_tcp_if_include": "eth0,eth1",
    "NCCL_SOCKET_IFNAME": "eth0,eth1",
}
JSRUN = {
    "JSM_NAMESPACE_RANK": "5",
    "JSM_NAMESPACE_SIZE": "8",
    "JSM_NAMESPACE_LOCAL_RANK": "1",
    "JSM_NAMESPACE_LOCAL_SIZE": "4",
    "PMIX_RANK": "5",
    "MASTER_ADDR": "n0",
}
MVAPICH2 = {
    "MV2_COMM_WORLD_RANK": "5",
    "MV2_COMM_WORLD_SIZE": "8",
    "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "4",
    "PMI_ID": "5",
    "PMI_SIZE": "8",
    "MASTER_ADDR": "n0",
}
FLUX = {
    "FLUX_TASK_RANK": "5",
    "FLUX_JOB_SIZE": "8",
    "FLUX_TASK_LOCAL_ID": "1",
    "FLUX_JOB_NNODES": "2",
    "FLUX_JOB_ID": "123",
    "PMI_SIZE": "8",
    "MASTER_ADDR": "n0",
}
PALS = {
    "PALS_RANKID": "5",
    "PALS_LOCAL_RANKID": "1",
    "PALS_NODEID": "1",
    "PALS_APID": "a-b",
    "PMI_SIZE": "8",
    "PMI_LOCAL_RANK": "1",
    "PMI_LOCAL_SIZE": "4",
    "MASTER_ADDR": "n0",
}
EACH = {
    "torchrun": TORCHRUN,
    "deepspeed": DEEPSPEED,
    "slurm": SLURM,
    "openmpi": OPENMPI,
    "mpich": MPICH,
    "horovod": HOROVOD,
    "jsrun": JSRUN,
    "mvapich2": MVAPICH2,
    "flux": FLUX,
    "pals": PALS,
}


def without(env: dict[str, str], *names: str) -> dict[str, str]:
    return {k: v for k, v in env.items() if k not in names}


@pytest.mark.parametrize("launcher", EACH)
def test_every_launcher_is_recognised(launcher):
    w = World.from_env(EACH[launcher])
    assert w.launcher == launcher
    assert (w.rank, w.size, w.local_rank, w.local_size, w.node) == (5, 8, 1, 4, 1)


@pytest.mark.parametrize("launcher", EACH)
def test_all_ranks_meet_at_one_place(launcher):
    rank, _, local_rank, _, node = launchers._VARIABLES[launcher]
    places = set()
    for i in range(8):
        env = EACH[launcher] | {rank: str(i), local_rank: str(i % 4)}
        w = World.from_env(env | ({node: str(i // 4)} if node else {}))
        places.add((w.master_addr, w.master_port))
    assert len(places) == 1


def test_alone_without_a_launcher():
    w = World.from_env({})
    assert (w.rank, w.size, w.launcher, w.master_addr) == (0, 1, "single", "127.0.0.1")


def test_the_address_of_the_user_wins_over_a_derived_one():
    w = World.from_env(SLURM | {"MASTER_ADDR": "ib0", "MASTER_PORT": "99"})
    assert (w.master_addr, w.master_port) == ("ib0", 99)


def test_slurm_meets_at_the_first_host_of_the_step():
    assert World.from_env(SLURM).master_addr == "n07"


def test_two_jobs_on_one_machine_do_not_share_a_port():
    ports = {World.from_env(SLURM | {"SLURM_JOB_ID": str(j)}).master_port for j in range(50)}
    assert len(ports) > 45 and all(12000 <= p < 32000 for p in ports)


def test_ranks_of_one_machine_meet_on_loopback():
    env = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_NODEID": "0"}
    assert World.from_env(env).master_addr == "127.0.0.1"


def test_uneven_nodes_have_their_own_local_size():
    env = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x1),3,1", "SLURM_NODEID": "1"}
    assert World.from_env(env).local_size == 3


def test_a_batch_script_and_the_shell_of_salloc_are_not_a_rank():
    batch = without(SLURM, "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS") | {"SLURM_PROCID": "0"}
    shell = SLURM | {"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"}
    one = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert {World.from_env(e).launcher for e in (batch, shell, one)} == {"single"}


def test_horovod_without_an_address_meets_where_horovodrun_was_called():
    assert World.from_env(HOROVOD).master_addr == "10.0.0.1"


@pytest.mark.parametrize("inner", [name for name in EACH if name != "slurm"])
def test_the_innermost_launcher_is_believed_inside_srun(inner):
    outer = SLURM | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
    w = World.from_env(outer | EACH[inner])
    assert (w.launcher, w.rank, w.size) == (inner, 5, 8)


def test_horovodrun_over_mpi_is_known_by_what_it_tells_mpirun():
    """It sets no HOROVOD_ variable, so that `--backend auto` once was ddp under it."""
    w = World.from_env(HOROVODRUN_MPI)
    assert (w.launcher, w.rank, w.size, w.local_size) == ("horovod", 5, 8, 4)
    for name in set(HOROVODRUN_MPI) - set(OPENMPI):
        assert World.from_env(without(HOROVODRUN_MPI, name)).launcher == "openmpi"
    assert World.from_env(HOROVODRUN_MPI | {"NCCL_SOCKET_IFNAME": "ib0"}).launcher == "openmpi"
    assert World.from_env(HOROVODRUN_MPI | TORCHRUN).launcher == "torchrun"


@pytest.mark.parametrize("outer", ["jsrun", "mvapich2", "flux", "pals", "openmpi", "mpich"])
@pytest.mark.parametrize("inner", ["torchrun", "deepspeed"])
def test_a_launcher_started_by_another_on_every_node_is_believed(outer, inner):
    w = World.from_env(EACH[outer] | EACH[inner])
    assert (w.launcher, w.rank, w.size) == (inner, 5, 8)


@pytest.mark.parametrize(
    "env",
    [
        *(
            {name: value}
            for name, value in [("PMI_SIZE", "4"), ("PMIX_RANK", "1"), ("PMI_ID", "3")]
        ),
        *({name: "2"} for name in ("ALPS_APP_PE", "MP_CHILD", "MPT_LRANK", "MPI_LOCALRANKID")),
        {"PALS_RANKID": "1"},
        {"FLUX_TASK_RANK": "1"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
        {"LOCAL_RANK": "1"},
    ],
    ids=str,
)
def test_ranks_of_a_launcher_that_is_not_known_do_not_each_train_alone(env):
    """Under Flux, jsrun, PALS and MVAPICH2 each of n ranks thought that it was the only one."""
    with pytest.raises(ConfigError, match=f"got {next(iter(env))}=.*export RANK, WORLD_SIZE"):
        World.from_env(env)


@pytest.mark.parametrize(
    "env",
    [
        {"PMIX_RANK": "0"},  # srun --mpi=pmix of one task
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
        {"FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "1", "FLUX_JOB_NNODES": "1"},
        {"LOCAL_RANK": "0", "MPI_LOCALRANKID": "0"},
    ],
    ids=str,
)
def test_one_rank_of_any_launcher_is_alone(env):
    assert World.from_env(env).size == 1


@pytest.mark.parametrize("outer", ["jsrun", "flux", "pals", "slurm"])
def test_mpirun_inside_a_scheduler_s_own_launcher_is_believed(outer):
    """Open MPI starts its daemons with it, and their variables are left in the ranks."""
    daemon = EACH[outer] | {launchers._VARIABLES[outer][0]: "1", "PMI_SIZE": "2"}
    w = World.from_env(daemon | OPENMPI)
    assert (w.launcher, w.rank) == ("openmpi", 5)


def test_flux_brokers_started_by_another_launcher_are_not_its_ranks():
    broker = JSRUN | {"JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "2"}
    assert World.from_env(broker | FLUX).launcher == "flux"


def test_flux_nodes_of_unequal_ranks_need_an_address():
    uneven = without(FLUX, "MASTER_ADDR") | {"FLUX_JOB_NNODES": "3", "FLUX_TASK_LOCAL_ID": "0"}
    with pytest.raises(ConfigError, match="MASTER_ADDR must name the host of rank 0"):
        World.from_env(uneven)
    assert World.from_env(uneven | {"FLUX_JOB_NNODES": "1"}).master_addr == "127.0.0.1"


def test_torchrun_inside_mpirun_is_believed():
    outer = OPENMPI | {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    assert World.from_env(outer | TORCHRUN).rank == 5


def test_srun_with_pmi2_over_nodes_is_slurm_with_its_place_in_the_node():
    """It was taken for an MPICH that says no local rank: refused, or local rank 5 of 8."""
    w = World.from_env(SLURM | {"PMI_RANK": "5", "PMI_SIZE": "8"})
    assert w == World.from_env(SLURM) and (w.local_rank, w.local_size, w.node) == (1, 4, 1)


def test_srun_with_pmi2_is_slurm_even_around_mpirun():
    outer = SLURM | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    outer |= {"PMI_RANK": "1", "PMI_SIZE": "2"}
    assert World.from_env(outer | OPENMPI).rank == 5


def test_agreeing_launchers_are_fine():
    w = World.from_env(OPENMPI | {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert (w.launcher, w.rank) == ("openmpi", 5)


@pytest.mark.parametrize(
    "env, named",
    [
        (OPENMPI | {"RANK": "0", "WORLD_SIZE": "2"}, ["OMPI_COMM_WORLD_RANK=5", "RANK=0"]),
        (OPENMPI | {"WORLD_SIZE": "2"}, ["OMPI_COMM_WORLD_SIZE=8", "WORLD_SIZE=2"]),
        (SLURM | {"RANK": "0", "WORLD_SIZE": "2"}, ["SLURM_PROCID=5", "WORLD_SIZE=2"]),
        (OPENMPI | HOROVOD | {"HOROVOD_RANK": "1"}, ["HOROVOD_RANK=1", "OMPI_COMM_WORLD_RANK=5"]),
        (OPENMPI | MPICH | {"PMI_RANK": "2"}, ["PMI_RANK=2", "OMPI_COMM_WORLD_RANK=5"]),
    ],
)
def test_launchers_that_contradict_are_refused_in_one_sentence_naming_both(env, named):
    with pytest.raises(ConfigError) as error:
        World.from_env(env)
    assert all(name in str(error.value) for name in named)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "env, says",
    [
        ({"WORLD_SIZE": "4"}, "must be set together, got RANK=None WORLD_SIZE=4"),
        ({"RANK": "3"}, "must be set together"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR must name the host of rank 0"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK must be a whole number, got 'x'"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT must be a whole number"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT must be below 65536, got 70000"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x"}, "SLURM_TASKS_PER_NODE must be like"),
    ],
)
def test_half_or_wrong_variables_are_refused(env, says):
    with pytest.raises(ConfigError, match=says):
        World.from_env(env)


def test_the_local_rank_flag_fills_a_gap_but_may_not_contradict():
    env = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "n0"}
    assert World.from_env(env, local_rank=1).local_rank == 1
    assert World.from_env(DEEPSPEED, local_rank=1).local_rank == 1
    assert World.from_env(DEEPSPEED, local_rank=-1).local_rank == 1
    with pytest.raises(ConfigError, match="--local_rank contradicts LOCAL_RANK, got 3 and 1"):
        World.from_env(DEEPSPEED, local_rank=3)


def fake_mpi(size: int) -> SimpleNamespace:
    comm = SimpleNamespace(Get_size=lambda: size, bcast=lambda mine, root: mine or ("n00", 777))
    return SimpleNamespace(
        MPI=SimpleNamespace(COMM_WORLD=comm, Get_library_version=lambda: "MPICH 4, x")
    )


def test_mpirun_over_nodes_asks_mpi_for_the_address(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", fake_mpi(8))
    w = World.from_env(without(OPENMPI, "MASTER_ADDR"))
    assert (w.master_addr, w.master_port) == ("n00", 777)


@pytest.mark.parametrize(
    "mpi4py, says", [(None, "mpi4py"), (fake_mpi(1), "uses another MPI .MPICH 4")]
)
def test_mpirun_over_nodes_without_mpi4py_says_what_to_pass(monkeypatch, mpi4py, says):
    monkeypatch.setitem(sys.modules, "mpi4py", mpi4py)
    with pytest.raises(ConfigError, match=f"{says}.*-x MASTER_ADDR=HOST"):
        World.from_env(without(OPENMPI, "MASTER_ADDR"))


def test_mpirun_on_one_node_needs_no_address():
    w = World.from_env(without(OPENMPI, "MASTER_ADDR") | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"})
    assert w.master_addr == "127.0.0.1" and w.master_port != launchers.DEFAULT_PORT


@pytest.mark.parametrize(
    "text, names",
    [
        ("n1", ["n1"]),
        ("a,b", ["a", "b"]),
        ("node[1-3,07-09],x1", ["node1", "node2", "node3", "node07", "node08", "node09", "x1"]),
        ("n[09-11]", ["n09", "n10", "n11"]),
        ("r[1-2]c[3,5]s", ["r1c3s", "r1c5s", "r2c3s", "r2c5s"]),
        ("gpu-[001],b-2.x.org", ["gpu-001", "b-2.x.org"]),
    ],
)
def test_host_lists_expand_as_slurm_writes_them(text, names):
    assert hostlist.expand(text) == names


@pytest.mark.parametrize("text", ["n[1-", "n[a-b]", "n]1", ",", "a,,b"])
def test_what_is_no_host_list_is_refused(text):
    with pytest.raises(ValueError, match="not a"):
        hostlist.expand(text)


def test_scontrol_helps_where_our_expansion_gives_up(monkeypatch):
    shown = subprocess.CompletedProcess([], 0, stdout="odd1\nodd2\n")
    monkeypatch.setattr(launchers.shutil, "which", lambda _: "/usr/bin/scontrol")
    monkeypatch.setattr(launchers.subprocess, "run", lambda *a, **k: shown)
    assert World.from_env(SLURM | {"SLURM_STEP_NODELIST": "odd[x]"}).master_addr == "odd1"


def test_two_real_ranks_add_and_print_one_line_each():
    command = "-m torch.distributed.run --nproc_per_node 2"
    command += " -m dist_looksam.world --device cpu --megabytes 1"
    launched = subprocess.run(
        [sys.executable, *command.split()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert launched.returncode == 0, launched.stderr
    for line in ("rank 0/2", "rank 1/2", "launcher torchrun", "over 2 ranks: right", "GB/s"):
        assert line in launched.stdout
