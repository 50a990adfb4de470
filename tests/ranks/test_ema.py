"""Moving averages of the weights on every backend: the reference's, sent by nobody, resumed."""

import cases
import ema_worker
import pytest
import reference
import task
import torch

ON = ("ddp", "fsdp2", 0, 1, 2, 3)
SGD = {"optimizer": "look_sam", "base": "sgd"}
PLAIN = [{"on": on, **SGD} for on in ON]
CASES = {
    2: [*PLAIN, {"on": 2, "optimizer": "msam"}, {"on": 2, **SGD, "precision": "bf16"}],
    3: [{"on": on, **SGD} for on in ("fsdp2", 1, 3)],
}
ALL = CASES[2] + CASES[3]
NUMEL = sum(p.numel() for p in task.net().parameters())

pytestmark = pytest.mark.needs("deepspeed")


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    return cases.results(tmp_path_factory.mktemp, "ema_worker.py", CASES)


def forward(weights):
    net = task.net()
    net.load_state_dict(weights)
    return net(task.batch(99)[0])


@pytest.mark.parametrize("ranks, number", cases.everywhere(CASES, ALL))
def test_the_average_is_the_references_and_forward_sees_it(results, ranks, number):
    case, got = CASES[ranks][number], results(ranks, number)["end"]
    want = task.truth(case["optimizer"], case.get("base"))
    coarse = "precision" in case
    limit = 1e-2 if coarse else task.tolerance(case["optimizer"], case.get("base"))
    assert task.worst(got["weights"], want) < limit
    average = reference.average(want.weights, ema_worker.DECAY)
    names = [n for n, _ in task.net().named_parameters()]
    for name, wanted in zip(names, average, strict=True):
        assert float((got["ema"][name].double() - torch.from_numpy(wanted)).abs().max()) < limit
    apart = max(float((got["ema"][n] - got["weights"][n]).abs().max()) for n in names)
    assert apart > 1e-3  # 1000 times the limit: the average is not w
    with torch.no_grad():
        assert torch.allclose(got["inside"], forward(got["ema"]), atol=2e-2 if coarse else 1e-5)


@pytest.mark.parametrize("ranks, number", cases.everywhere(CASES, ALL))
def test_evaluation_changes_nothing_and_a_run_goes_on_to_the_same_average(results, ranks, number):
    got = results(ranks, number)
    for which in ("end", "resumed"):
        assert got[which]["same"], "forward after `averaged` computes as before it"
    for kind in ("ema", "weights"):
        for name, tensor in got["end"][kind].items():
            assert torch.equal(tensor, got["resumed"][kind][name]), (kind, name)


@pytest.mark.parametrize("ranks, number", cases.everywhere(CASES, ALL))
def test_an_average_sends_nothing_and_takes_four_bytes_a_weight_of_the_own_shard(
    results, ranks, number
):
    case, got = CASES[ranks][number], results(ranks, number)
    assert got["sent"] == 0
    whole = 4 * NUMEL
    if case["on"] in ("ddp", 0):
        assert got["bytes"] == [whole] * ranks
    else:  # equal parts, with padding
        assert whole <= sum(got["bytes"]) <= whole + 4 * ranks * 64
        assert max(got["bytes"]) < whole * 0.75
