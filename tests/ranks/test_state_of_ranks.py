"""restore(engine, path) on two ranks of every backend: frozen, tied, with statistics."""

import pytest
from cases import results

pytestmark = pytest.mark.needs("deepspeed")

ON = ["ddp", "fsdp2", 0, 1, 2, 3]
KEPT_OUT = {"stage3_param_persistence_threshold": 0}
CASES = [{"kind": "goes on", "on": on, "base": base} for on in ON for base in ("AdamW", "SGD")]
CASES += [{"kind": "goes on", "on": 3, "base": "AdamW", "zero": KEPT_OUT}]
CASES += [{"kind": "goes on", "on": on, "base": "Adafactor"} for on in ("ddp", 0)]
ACROSS = [
    {"kind": "across", "on": on, "to": to, "base": "AdamW"}
    for on, to in zip(ON, [3, "ddp", "fsdp2", 3, 0, "fsdp2"], strict=True)
]
REFUSED = [{"kind": "refused", "on": on, "base": "Adafactor"} for on in ("fsdp2", 1, 2, 3)]
REFUSED += [{"kind": "refused", "on": on, "base": "Muon"} for on in ("fsdp2", 2)]
THEIRS = {"kind": "refused", "on": 2, "base": "SOAP", "of": "pytorch_optimizer"}
ENTRYWISE = [
    {"kind": "refused", "on": 2, "base": base, "of": "torch.optim"}
    for base in ("Adagrad", "NAdam", "RAdam", "RMSprop")
] + [{"kind": "refused", "on": 2, "base": "Lion", "of": "pytorch_optimizer"}]
TAKEN = [{"kind": "distributed", "on": on, "base": "AdamW"} for on in ("ddp", "fsdp2")]
ALL = [*CASES, *ACROSS, *REFUSED, *TAKEN, *ENTRYWISE, THEIRS]
NAMES = [
    "conv.weight", "conv.bias", "norm.weight", "norm.bias", "norm.running_mean",
    "norm.running_var", "norm.num_batches_tracked", "fixed.weight", "fixed.bias", "into.weight",
    "out.weight", "out.bias", "last.weight", "last.bias",
]  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return results(tmp_path_factory.mktemp, "state_worker.py", {2: ALL}, TMPDIR="/tmp")


def of(result, case):
    return result(2, ALL.index(case))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_a_run_goes_on_bit_for_bit_with_frozen_layers_and_names_of_the_module(result, case):
    """Frozen layers and aliases were not among ZeRO's full_weights, and frozen layers that stage 3
    and FSDP2 cut up in no checkpoint; Adafactor's state of rows and columns neither."""
    got = of(result, case)
    assert got["differ"] == []
    assert got["names"] == NAMES and set(got["held"]) == {*NAMES} - {"out.weight"}
    assert got["dtypes"] == {"torch.float32", "torch.int64"}
    assert (got["step"], got["extra"], got["rhos"]) == (5, {"epoch": 1}, [0.07, 0.07])
    assert got["passes"] == 9 + 3  # looks at steps 0, 3 and 6


@pytest.mark.parametrize("case", ACROSS, ids=lambda case: "{on}-to-{to}".format(**case))
def test_another_backend_reads_frozen_layers_and_groups(result, case):
    got = of(result, case)
    assert got["differ"] == [] and got["decays"] == [0.1, 0.01]


@pytest.mark.needs("pytorch_optimizer")
@pytest.mark.parametrize("case", [*REFUSED, THEIRS], ids=lambda case: "{on}-{base}".format(**case))
def test_a_base_that_needs_whole_layers_is_refused_on_shards(result, case):
    """On flats Adafactor and SOAP computed other numbers than on layers without a word; on FSDP2
    Adafactor was refused, but at its first step."""
    says = of(result, case)["says"]
    assert says.startswith("a base optimizer on shards must update each weight by itself")
    assert case["base"] in says and "\n" not in says


@pytest.mark.needs("pytorch_optimizer")
@pytest.mark.parametrize("case", ENTRYWISE, ids=lambda case: case["base"])
def test_a_base_that_updates_each_weight_by_itself_trains_on_flats(result, case):
    assert of(result, case)["says"] is None


def test_torch_distributed_checkpoint_works_on_ddp_and_is_refused_on_fsdp2(result):
    """After Engine on FSDP2 it ended in KeyError: 0."""
    ddp, fsdp2 = (of(result, case)["said"] for case in TAKEN)
    assert ddp[0] == ddp[1] and "conv.weight" in ddp[0]
    assert all("must be left to" in said and "\n" not in said for said in fsdp2)
