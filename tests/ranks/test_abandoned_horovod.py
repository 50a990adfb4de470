"""A step that an exception breaks off under Horovod is as if it had never begun."""

import json

import pytest
import task
import torch
from test_abandoned import BREAKS

from launch import horovodrun

pytestmark = pytest.mark.needs("horovod")

BACKENDS = [{"stage": 0}, {"stage": 1}, {"stage": 0, "theirs": True}]
GROUPED = [  # two groups: the calls are first pass, second, first of the second group, second
    {**b, "m": m, "place": "backward", "pass": p, "micro": n}
    for b in BACKENDS
    for m in (6, 12)
    for p, n in ((1, 1), (2, 0), (2, 1))
]
CASES = [{"optimizer": "look_layer_sam", **b, **x} for b in BACKENDS for x in BREAKS]
CASES += [{"optimizer": "look_layer_sam", **x} for x in GROUPED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the results."""
    folder = tmp_path_factory.mktemp("abandoned-horovod")
    (folder / "cases.json").write_text(json.dumps(CASES))
    horovodrun(2, "abandoned_horovod_worker.py", folder / "cases.json", folder, timeout=600)
    return folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: json.dumps(CASES[n]))
def test_a_step_that_was_broken_off_has_never_begun(folder, number):
    """Gradients of the broken pass were on their way under the names that the next pass uses."""
    for rank in torch.load(task.result_file(folder, number)):
        assert rank["back"], "something is left of it"
        assert rank["same"], "the steps after it are not those of a run without it"
