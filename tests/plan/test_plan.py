"""`dist-looksam plan`: its arithmetic, held against hand counts, a played ring and allocations."""

import json
import re
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_looksam import models
from dist_looksam.cli import main as cli
from dist_looksam.errors import ConfigError
from dist_looksam.plan import Machine, calibrate, machine, machines, plan
from dist_looksam.plan.layouts import zero
from dist_looksam.plan.machines import Network, at_share
from dist_looksam.plan.network import Call, Topology, seconds, wire_bytes
from dist_looksam.plan.times import behind
from dist_looksam.plan.workload import counted, workload
from dist_looksam.settings import config

pytestmark = pytest.mark.slow

IMAGENET = ["--data", "folder", "--data_dir", "x", "--model", "vit_b16"]
EXAMPLE = [*IMAGENET, "--optimizer", "look_layer_sam", "--batch_size", "32768", "--zero_stage", "2"]
EXAMPLE += ["--precision", "bf16", "--epochs", "300"]


def planned(*flags: str, argv=EXAMPLE, **how):
    return plan(config.parse([*argv, *flags]), **{"gpus": 64, **how})


def ring(ranks: int, size: int, rounds: int) -> int:
    """Bytes that a rank sends when `ranks` pass on parts of `size` bytes for so many rounds."""
    part, sent = size // ranks, 0
    for _ in range(rounds):
        sent += part
    return sent


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_wire_bytes_are_those_of_a_ring(ranks):
    """Reduce-scatter: each part goes round once, one sum at each rank, so ranks - 1 sends of a
    part; all-gather the same; all-reduce is one after the other."""
    size = 4 * 120 * ranks
    once = ring(ranks, size, ranks - 1)
    call = Call(kind="all_reduce", elements=size // 4, size=4)
    assert wire_bytes(call, ranks) == pytest.approx(2 * once)
    scatter = Call(kind="reduce_scatter", elements=size // 4, size=4)
    assert wire_bytes(scatter, ranks) == pytest.approx(once)
    assert wire_bytes(scatter, ranks, gloo=True) == pytest.approx(2 * once)
    gather = Call(kind="all_gather", elements=size // 4 // ranks, size=4)
    assert wire_bytes(gather, ranks) == pytest.approx(once)


def test_between_nodes_a_node_sends_what_it_holds_once_over_all_its_cables():
    """1 GB over 4 nodes of 8: each node's cables carry 2 x 3/4 GB, each GPU's links 2 x 7/8 GB."""
    net = machine("h100", "infiniband-400").network
    call = Call(kind="all_reduce", elements=500_000_000, size=2)
    took = seconds(call, Topology(total=32, per_node=8), net)
    bytes_apart = 2 * 0.75e9 / net.bandwidth + 2 * 0.875e9 / net.inner_bandwidth
    assert took == pytest.approx(bytes_apart, rel=0.02)
    assert took > bytes_apart


@pytest.mark.parametrize("on", ["cpu", "cuda"])
@pytest.mark.parametrize("apart", [False, True])
def test_calibration_finds_the_latency_that_a_plan_counts(monkeypatch, on, apart):
    """A latency was measured over 2 (n-1) messages, and NCCL's all-reduces between nodes were then
    planned with 2 log2 n of it: over 8 nodes they came out 2.3 times too fast. Here all-reduces
    take what a plan says, over a network of known latency."""
    net = Network(name="x", latency=3e-5, inner_latency=7e-6, bandwidth=1e9, inner_bandwidth=1e10,
                  gloo=on == "cpu", source="")  # fmt: skip
    ranks = Topology(total=8, per_node=1 if apart else 8)

    def takes(group, count: int, where) -> float:
        return seconds(Call(kind="all_reduce", elements=count // 4, size=4), ranks, net)

    monkeypatch.setattr(calibrate, "_all_reduce", takes)
    monkeypatch.setattr(calibrate.dist, "new_group", lambda members: members)
    monkeypatch.setattr(calibrate.dist, "get_rank", lambda: 0)
    found = calibrate._speed([list(range(8))], torch.device(on), apart=apart)
    assert found is not None
    assert found[0] == pytest.approx(net.latency if apart else net.inner_latency, rel=0.02)
    assert found[1] == pytest.approx(net.bandwidth if apart else net.inner_bandwidth, rel=0.02)


def test_every_default_of_deepspeed_that_a_plan_knows_is_used_in_it():
    """stage3_max_live_parameters stood among them and was read nowhere."""
    text = Path(zero.__file__).read_text()
    assert set(zero._DEFAULTS) <= {*re.findall(r'_setting\(run, "(\w+)"', text)}


def test_nothing_is_sent_by_one_rank():
    one = planned(argv=[*IMAGENET, "--batch_size", "256", "--optimizer", "sam"], gpus=1)
    assert one.wire == {"base": 0, "look": 0, "mean": 0}
    assert one.times["mean"].communication == 0


def test_the_last_bucket_of_a_backward_cannot_hide():
    assert behind([1.0], [100], backward=5.0) == 1.0  # one bucket is full when backward ends
    assert behind([1.0, 1.0], [50, 50], backward=4.0) == 1.0  # the first hides
    assert behind([3.0, 1.0], [50, 50], backward=4.0) == 2.0  # it ends a second late
    assert behind([1.0, 1.0], [50, 50], backward=0.0) == 2.0


def test_a_gpu_may_be_spelt_as_its_maker_does():
    assert machine("A100", "InfiniBand-400") == machine("a100", "infiniband-400")


def test_a_gpu_alone_takes_the_time_of_its_products_and_of_its_activations():
    """105.5 GFLOP an image forward and backward at 56 % of 989 TFLOP/s, and 68 MB an image 8.5
    times at 70 % of 4.8 TB/s: 2,770 images/s; with --mfu 0.3, 30 % of 989 TFLOP/s: 2,812."""
    flags = {"gpus": 1, "argv": [*EXAMPLE, "--batch_size", "256"]}
    alone = planned("--optimizer", "lamb", **flags)
    assert 256 / alone.times["mean"].compute == pytest.approx(2770, rel=0.01)
    assert alone.images_per_s < 2770  # the update comes on top
    device = at_share(machine().device, 0.3)
    share = planned("--optimizer", "lamb", machine=device, **flags)
    assert 256 / share.times["mean"].compute == pytest.approx(2812, rel=0.01)


def test_looks_cost_a_second_pass_every_kth_step():
    found = planned()
    # Every fifth of the run's steps, the first among them.
    assert found.times["mean"].compute == pytest.approx(1.2 * found.times["base"].compute, rel=1e-3)
    assert found.wire["mean"] == pytest.approx(1.2 * found.wire["base"], rel=1e-3)
    sam = planned("--optimizer", "layer_sam")
    assert sam.times["mean"].compute == pytest.approx(2 * sam.times["base"].compute)
    assert sam.memory.g_v == 0 < found.memory.g_v


def test_ranks_share_the_state_and_the_time_and_wait_for_a_slow_network():
    some, more = planned(), planned(gpus=8192)
    assert more.memory.base_state < some.memory.base_state / 100
    assert more.hours < some.hours and more.gpu_hours > some.gpu_hours
    slow = planned(network="ethernet-10")
    assert slow.times["base"].exposed > 100 * some.times["base"].exposed
    assert slow.times["base"].compute == some.times["base"].compute
    assert more.accumulation * more.micro_batch * 8192 == 32768


def test_the_largest_micro_batch_is_the_last_divisor_that_fits():
    found = planned("--batch_size", "1048576", "--micro_batch", "256")
    largest = found.largest_micro_batch
    most = planned("--batch_size", "1048576", "--micro_batch", str(largest)).memory
    room = 0.92 * 141e9
    assert most.peak <= room < most.peak + most.activations
    with pytest.raises(ConfigError, match=rf"use --micro_batch {largest}\."):
        planned("--batch_size", "1048576", "--micro_batch", str(2 * largest))
    smaller = planned("--batch_size", "1048576", "--micro_batch", "256", machine="h100")
    assert smaller.largest_micro_batch == largest // 2


def test_without_micro_batch_the_largest_that_fits_is_planned_for():
    """train.py's default, 256, does not fit ViT-L/16 in fp32 into 40 GB."""
    big = planned("--precision", "fp32", "--model", "vit_l16", machine="a100-40")
    assert big.micro_batch == big.largest_micro_batch < 256


WRONG = {
    "no gpus": (["--batch_size", "64"], "gpus must be given"),
    "many gpus": (["--gpus", "8193"], r"gpus must be in \[1, 8,192\], got 8,193"),
    "half a node": (["--gpus", "12"], "whole nodes of 8, got 12; use 8 or 16"),
    "batch": (["--gpus", "64", "--batch_size", "100"], "got 100; use 64 or 128"),
    "gpu": (["--gpus", "8", "--gpu", "h20"], "gpu must be one of .*did you mean h200"),
    "network": (["--gpus", "8", "--network", "token-ring"], "network must be one of infiniband"),
    "mfu": (["--gpus", "8", "--mfu", "40"], r"mfu must be in \(0, 1\], got 40"),
    "bandwidth": (["--gpus", "8", "--bandwidth", "0"], "bandwidth must be > 0 and finite, got 0"),
    "machine": (["--gpus", "8", "--machine", "/no/such"], "machine must be a file of --calibrate"),
    "both": (["--gpus", "8", "--machine", "x", "--gpu", "h100"], "leave one out"),
    "flag": (["--gpus", "8", "--bandwith", "3"], "got --bandwith; did you mean --bandwidth"),
    "offload": (["--gpus", "8", "--offload", "--zero_stage", "2"], "no offload .*got offload"),
    "fp16": (["--gpus", "8", "--precision", "fp16", "--zero_stage", "0"], "fp16 needs ZeRO stage"),
    "horovod": (["--gpus", "8", "--backend", "horovod"], "plain, ddp, zero and fsdp2, got horovod"),
    "no room": (
        ["--gpus", "8", "--model", "vit_l16", "--gpu", "v100", "--batch_size", "8",
         "--deepspeed_config", "BUCKETS", "--zero_stage", "2"],
        "memory must hold micro_batch 1, which needs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_run_that_cannot_be_is_one_sentence(name, capsys, tmp_path):
    flags, said = WRONG[name]
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"reduce_bucket_size": 9e9}}')
    flags = [str(tmp_path / "ds.json") if f == "BUCKETS" else f for f in flags]
    assert cli.main(["plan", "--model", "vit_b16", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(said, error)


def test_the_command_prints_a_page_or_json(capsys):
    flags = [f for f in EXAMPLE if f not in ("--data", "folder", "--data_dir", "x")]
    assert cli.main(["plan", "--gpus", "64", *flags]) == 0
    page = capsys.readouterr().out
    for word in ("look_layer_sam on lamb", "g_v", "images/s", "GPU-hours", "assumed", "mean, k=5"):
        assert word in page
    assert cli.main(["plan", "--gpus", "64", "--json", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gpu_hours"] == pytest.approx(64 * found["hours"])
    assert f"{found['images_per_s']:,.0f} images/s" in page


def test_where_images_grow_the_time_is_the_mean_over_their_sizes(capsys):
    growing = planned("--image_size", "224", "--image_size_from", "192", "--micro_batch", "64")
    each = [planned("--image_size", size, "--micro_batch", "64") for size in ("192", "208", "224")]
    assert growing.hours == pytest.approx(sum(p.hours for p in each) / 3)
    assert growing.step_seconds == pytest.approx(sum(p.step_seconds for p in each) / 3)
    assert growing.images_per_s == pytest.approx(32768 / growing.step_seconds)
    assert (growing.memory, growing.wire) == (each[-1].memory, each[-1].wire)
    assert each[0].hours < growing.hours < each[-1].hours
    small = ["--image_size", "128", "--image_size_from", "32", "--micro_batch", "64", "--model"]
    auto, named = (planned(*small, model) for model in ("auto", "vit_s16"))
    assert auto.hours == named.hours  # it was another network at the small sizes
    flags = [f for f in EXAMPLE if f not in ("--data", "folder", "--data_dir", "x")]
    assert cli.main(["plan", "--gpus", "64", *flags, "--image_size_from", "192"]) == 0
    assert "Images grow from 192 to 224 pixels" in capsys.readouterr().out
    assert cli.main(["plan", "--gpus", "64", *flags, "--image_size_from", "200"]) == 2
    assert "multiple of the model's patch of 16" in capsys.readouterr().err


def test_a_machine_comes_back_from_its_file(tmp_path):
    own = machines.changed(machine("a100", "ethernet-25"), latency=1e-4)
    machines.save(own, tmp_path / "m.yaml")
    assert machines.load(tmp_path / "m.yaml") == own
    (tmp_path / "bad.yaml").write_text("device: 3\n")
    with pytest.raises(ConfigError, match="machine must have a device with name, flops"):
        machines.load(tmp_path / "bad.yaml")


def test_calibrating_one_process_measures_what_a_plan_then_uses(tmp_path, capsys):
    file = tmp_path / "m.yaml"
    flags = ["--data", "digits", "--model", "vit_8", "--batch_size", "64"]
    assert cli.main(["plan", "--calibrate", str(file), *flags]) == 0
    found = machines.load(file)
    assert isinstance(found, Machine)
    assert 1e8 < found.device.flops["fp32"] < 1e13  # a CPU's, of which one pass takes milliseconds
    capsys.readouterr()
    assert cli.main(["plan", "--gpus", "1", "--machine", str(file), "--json", *flags]) == 0
    told = json.loads(capsys.readouterr().out)
    flops = 3 * models.flops_per_image(
        models.create("vit_8", num_classes=10, image_shape=(1, 8, 8)), (1, 8, 8)
    )
    compute = found.device.pass_seconds + 64 * flops / found.device.flops["fp32"]
    assert told["times"]["base"]["compute"] == pytest.approx(compute)


class Allocated(TorchDispatchMode):
    """The most bytes that tensors made inside hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self._add(t.untyped_storage())
        self.peak = max(self.peak, self.live)
        return out

    def _add(self, storage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place not in self.known:
            self.known.add(place)
            self.live += size
            weakref.finalize(storage, self._drop, place, size)

    def _drop(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.live -= size


def allocated(name: str, shape: tuple, images: int, weights: torch.dtype, autocast) -> int:
    model = models.create(name, num_classes=100, image_shape=shape).to(weights)
    for p in model.parameters():  # gradients are not activations
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch, labels = torch.zeros(images, *shape), torch.zeros(images, dtype=torch.long)
    with Allocated() as found:
        found.known |= {p.untyped_storage()._cdata for p in model.parameters()}
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = torch.nn.functional.cross_entropy(model(batch.to(weights)).float(), labels)
        loss.backward()
    return found.peak


PRECISIONS = {
    "fp32": (torch.float32, None, 4, 4),
    "bf16": (torch.bfloat16, None, 2, 2),
    "autocast": (torch.float32, torch.bfloat16, 2, 4),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name, shape", [("vit_28", (1, 28, 28)), ("vit_ti16", (3, 64, 64))])
def test_activations_are_those_that_are_allocated(name, shape, precision):
    weights, autocast, arithmetic, residual = PRECISIONS[precision]
    few, many = (allocated(name, shape, n, weights, autocast) for n in (16, 48))
    work = workload(name, 100, shape)
    planned = work.activations(32, arithmetic=arithmetic, residual=residual)
    assert planned == pytest.approx(many - few, rel=0.05)


def test_a_model_without_a_formula_is_counted():
    """Counting our own ViT gives what its formula says: so do other models' counts."""
    net = models.create("vit_28", num_classes=10, image_shape=(1, 28, 28))
    own, residual, fp32 = workload("vit_28", 10, (1, 28, 28)).saved
    saved, _ = counted(net, (1, 28, 28))
    assert saved[0] == pytest.approx(own + residual + fp32, rel=0.03)


def test_a_batch_too_small_for_its_ranks_is_told_the_micro_batch_that_fits(capsys):
    """It said "use 4194304", a batch of 128 times as much."""
    recipe = ["--batch_size", "32768", "--micro_batch", "512", "--gpus", "8192"]
    with pytest.raises(ConfigError, match="use --micro_batch 4, or batch_size 4194304"):
        cli._dispatch(["plan", "--model", "vit_b16", *recipe])


def test_a_pass_is_not_planned_shorter_than_its_host_needs_to_ask_for_it(capsys):
    """A pass of 1.41 ms was planned without a word, for which a host needs 40 to 92 ms."""
    flags = ["plan", "--model", "vit_b16", "--precision", "bf16", "--gpus", "8192"]
    assert cli.main([*flags, "--batch_size", "32768", "--micro_batch", "4"]) == 0
    told = capsys.readouterr().out
    assert "The host sets this time, not the GPU: it needs 41.22 ms" in told
    assert cli.main([*flags[:-1], "64", "--batch_size", "32768", "--micro_batch", "128"]) == 0
    assert "The host" not in capsys.readouterr().out
