"""Checkpoints that commit 2b4ea09 has written are resumed."""

import shutil

import old_run
import pytest
import torch
from safetensors.torch import load_file

from dist_looksam import restore


@pytest.mark.parametrize("method", ["look_sam", "look_layer_sam"])
def test_a_checkpoint_of_an_old_commit_goes_on_in_mid_cycle_to_the_old_weights(method, tmp_path):
    """Within rounding: the weights after eight steps were computed on another machine."""
    folder = tmp_path / method
    shutil.copytree(old_run.OLD / method, folder)
    resumed = old_run.engine(method)
    with torch.no_grad():
        for p in resumed.module.parameters():
            p.zero_()
    found = restore(resumed, folder)
    assert (found.step, found.extra["epoch"]) == (old_run.BEFORE, 1)
    old_run.train(resumed, old_run.BEFORE, old_run.STEPS)
    got, want = resumed.backend.full_weights(), load_file(folder / "end.safetensors")
    assert got.keys() == want.keys()
    assert max(float((got[n] - want[n]).abs().max()) for n in want) < 2e-5
    assert resumed.passes == old_run.STEPS + 2  # looks at steps 0 and 4
