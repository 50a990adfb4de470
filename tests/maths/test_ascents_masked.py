"""A perturbation of some layers only does not depend on the others' gradients, however large."""

import pytest
import torch

from dist_looksam.maths.ascent import model_perturbation
from dist_looksam.maths.shards import whole


@pytest.mark.parametrize("p", [1.5, 2.0, 3.0, float("inf")])
def test_gradients_of_other_layers_may_be_huge(p):
    """A power of them overflowed; infinity times the mask of 0 is NaN: every look was skipped."""
    grads = [torch.full((4,), 1e-8), torch.full((4,), 100.0)]
    mask = torch.tensor([1.0, 0.0], dtype=torch.float64)
    found = model_perturbation(grads, rho=0.05, p=p, mask=mask, reduce=whole)
    alone = model_perturbation(grads[:1], rho=0.05, p=p, reduce=whole)
    assert found.size[1] == 0 and bool(found.finite)
    eps = next(iter(found.eps(grads)))
    torch.testing.assert_close(eps, next(alone.eps(grads[:1])))
