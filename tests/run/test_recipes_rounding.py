"""Whether forward sees a recipe's perturbation in 16 bits. `pytest -s` shows the cosines."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dist_looksam import models
from dist_looksam.run import recipes
from dist_looksam.run.advice import FAITHFUL
from dist_looksam.run.dryrun import LEAST_RHO

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "launch" / "recipes"
NORM = {"vit_s16": 207.8, "vit_b16": 293.5}  # of the weights that training starts from, seed 0


@pytest.fixture(scope="module", params=NORM)
def named(request) -> tuple[str, nn.Module]:
    """The network as a run starts it, with the gradient of two random images."""
    torch.manual_seed(0)
    model = models.create(request.param, num_classes=1000, image_shape=(3, 224, 224))
    images, labels = torch.randn(2, 3, 224, 224), torch.randint(1000, (2,))
    nn.functional.cross_entropy(model(images), labels).backward()
    return request.param, model


def perturbation(model: nn.Module, scope: str, rho: float) -> list[Tensor]:
    pairs = [(p.detach(), p.grad) for p in model.parameters()]
    if scope == "layer":
        return [rho * w.norm() * g / g.norm() if g.norm() else 0 * g for w, g in pairs]
    total = torch.stack([g.norm() for _, g in pairs]).norm()
    return [rho * g / total for _, g in pairs]


def cosine(model: nn.Module, eps: list[Tensor], dtype: torch.dtype) -> float:
    """Between eps and what weights of `dtype` show of it."""
    seen = [
        (w + e).to(dtype).float() - w.to(dtype).float()
        for w, e in zip((p.detach() for p in model.parameters()), eps, strict=True)
    ]
    product = sum(float((a * b).sum()) for a, b in zip(seen, eps, strict=True))
    norms = [sum(float(t.norm()) ** 2 for t in ts) ** 0.5 for ts in (seen, eps)]
    return product / (norms[0] * norms[1])


@pytest.mark.parametrize("method", ["look_sam", "look_layer_sam"])
def test_fp16_shows_the_perturbation_of_a_recipe_and_bf16_does_not(named, method):
    """bf16, usual for ViTs, was the first choice for all recipes: most of eps was rounded away."""
    name, model = named
    settings = recipes.checked(FOLDER / f"{name}-{method}-4k.yaml").settings
    assert settings.precision == "fp16"
    scope = settings.rule.ascent
    eps = perturbation(model, scope, settings.rho)
    fp16, bf16 = cosine(model, eps, torch.float16), cosine(model, eps, torch.bfloat16)
    print(f"\n{name} {scope} rho {settings.rho:g}: bf16 {bf16:.2f}, fp16 {fp16:.2f}")
    assert fp16 >= FAITHFUL > bf16
    enough = perturbation(model, scope, LEAST_RHO[scope])
    assert cosine(model, enough, torch.bfloat16) >= FAITHFUL


def test_layer_scope_starts_with_a_perturbation_as_long_as_model_scope(named):
    name, model = named
    norm = float(sum(p.detach().double().pow(2).sum() for p in model.parameters()) ** 0.5)
    assert norm == pytest.approx(NORM[name], abs=0.05)
    rho = {m: recipes.checked(FOLDER / f"{name}-{m}-64k.yaml").settings.rho
           for m in ("sam", "layer_sam")}  # fmt: skip
    assert rho["layer_sam"] == pytest.approx(rho["sam"] / norm, abs=5e-5)
