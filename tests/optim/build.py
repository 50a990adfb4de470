"""An optimizer of the package by the reference's name for it, over the layers of `problem`."""

import problem
import torch

from dist_looksam import SAM, Lamb, Lars, LookLayerSAM, LookSAM

BASES = ("sgd", "adamw", "lamb", "lars")
SHARP = ("sam", "sam_k", "look_sam", "layer_sam", "look_layer_sam", "gsam", "msam")
LOOKS = ("look_sam", "look_layer_sam")
WEIGHTED = (*LOOKS, "gsam")  # with an alpha


def build_base(params, base, *, eps=1e-8, groups=problem.GROUPS):
    torch_groups = [
        {
            "params": [params[i] for i in group["layers"]],
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
        }
        for group in groups
    ]
    if base == "sgd":
        return torch.optim.SGD(torch_groups, lr=0.1, momentum=0.9)
    if base == "adamw":
        return torch.optim.AdamW(torch_groups, lr=0.1, eps=eps)
    if base == "lamb":
        return Lamb(torch_groups, lr=0.1, eps=eps)
    return Lars(torch_groups, lr=0.1, momentum=0.9)


def build(params, name, base="sgd", *, k=3, eps=1e-8, groups=problem.GROUPS, **how):
    """The optimizer `name` around `base`. Each group has its own lr, decay, rho and alpha."""
    inner = build_base(params, base, eps=eps, groups=groups)
    if name == base:
        return inner
    keys = ("rho", "alpha") if name in WEIGHTED else ("rho",)
    outer = [
        {"params": [params[i] for i in group["layers"]]}
        | {x: group[x] for x in (*keys, "perturb") if x in group}
        for group in groups
    ]
    if name == "sam":
        return SAM(outer, inner, **how)
    if name == "gsam":
        return SAM(outer, inner, alpha=0.5, **how)  # its groups have their own
    if name == "msam":
        return SAM(outer, inner, along="momentum", **how)
    if name == "sam_k":
        return SAM(outer, inner, k=k, **how)
    if name == "look_sam":
        return LookSAM(outer, inner, k=k, **how)
    if name == "layer_sam":
        return SAM(outer, inner, scope="layer", **how)
    return LookLayerSAM(outer, inner, k=k, **how)


def g_v_of(optimizer, params):
    return [optimizer.state[x]["g_v"] for x in params]


def same_bits(xs, ys) -> bool:
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def copies(params):
    return [x.detach().clone() for x in params]


def bowl(params, curvatures):
    return sum((c * x * x).sum() for x, c in zip(params, curvatures, strict=True)) / 2


def parameters(*values):
    return [torch.nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in values]
