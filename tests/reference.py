"""The truth: what every optimizer here must compute. Whole tensors, float64, plain NumPy.

One rank, no shards, no micro-batches, no autograd, and nothing imported from the package. To be
read beside section 2 of the design, point by point; the numbers in brackets are its points. m is in
section 7.

Words: a *layer* is one weight tensor. w the weights, g the gradient at w, g_s the gradient at
w + eps over the same samples, g_v what g_s says that g does not. Every one is a list of arrays,
one per layer. A *look* is a step that computes g_s. m samples in a row, a *group*, share one eps.
"""

from dataclasses import dataclass, field

import numpy as np

#  name             ascent   looks             between looks  default base
TABLE = {
    "sgd":            (None,    "never",          None,    "sgd"),
    "adamw":          (None,    "never",          None,    "adamw"),
    "lamb":           (None,    "never",          None,    "lamb"),
    "lars":           (None,    "never",          None,    "lars"),
    "sam":            ("model", "every step",     None,    "adamw"),
    "sam_k":          ("model", "every k steps",  "plain", "adamw"),
    "look_sam":       ("model", "every k steps",  "reuse", "adamw"),
    "layer_sam":      ("layer", "every step",     None,    "lamb"),
    "look_layer_sam": ("layer", "every k steps",  "reuse", "lamb"),
    "gsam":           ("model", "every step",     None,    "adamw"),
    "msam":           ("model", "never",          None,    "adamw"),
}  # fmt: skip


@dataclass
class Result:
    """What a run leaves behind.

    weights: after each step, [steps][layers]. records: one dict a step, with look, skipped, loss,
    grad_norm (of g), update_norm (of what the base got, after clipping; 0 where skipped), gv_norm
    (of the g_v in memory, 0 without one). g_v: the last one, or None. base_state: one dict a layer.
    """

    weights: list = field(default_factory=list)
    records: list = field(default_factory=list)
    g_v: list | None = None
    base_state: list = field(default_factory=list)


def dot(xs, ys):
    """Inner product over the whole model."""
    return sum(float(np.sum(x * y)) for x, y in zip(xs, ys, strict=True))


def norm(xs):
    """2-norm over the whole model."""
    return np.sqrt(dot(xs, xs))


def finite(xs):
    return all(np.isfinite(x).all() for x in xs)


# --- eps: where to look -------------------------------------------------------------------------


def ascend_model(g, rho, p):
    """[1] eps = rho sign(g) |g|^(q-1) / (||g||_q^q)^(1/p), q = p/(p-1). rho: one number a layer."""
    if norm(g) == 0:
        return [np.zeros_like(x) for x in g]
    q = 1.0 if p == np.inf else p / (p - 1)
    norm_to_the_q = sum(float(np.sum(np.abs(x) ** q)) for x in g)
    return [
        r * np.sign(x) * np.abs(x) ** (q - 1) / norm_to_the_q ** (1 / p)
        for x, r in zip(g, rho, strict=True)
    ]


def ascend_layer(w, g, rho, layer_ascent):
    """[2] eps_i = rho ||w_i|| g_i / ||g_i||; "literal": rho (||w_i|| / ||g_i||) sign(g_i)."""
    eps = []
    for w_i, g_i, r in zip(w, g, rho, strict=True):
        if norm([w_i]) == 0 or norm([g_i]) == 0:
            eps.append(np.zeros_like(w_i))
        elif layer_ascent == "scaled":
            eps.append(r * norm([w_i]) * g_i / norm([g_i]))
        elif layer_ascent == "literal":
            eps.append(r * (norm([w_i]) / norm([g_i])) * np.sign(g_i))
        else:
            raise ValueError(layer_ascent)
    return eps


# --- g_v: what the look learned, and how it is used again ----------------------------------------


def new_part(g_s, g, decompose):
    """[3] g_v = g_s - (g_s.g / ||g||^2) g, over the whole model or layer by layer."""
    if decompose == "layer":
        return [new_part([s], [x], "model")[0] for s, x in zip(g_s, g, strict=True)]
    assert decompose == "model", decompose
    share = dot(g_s, g) / dot(g, g) if dot(g, g) > 0 else 0.0
    return [s - share * x for s, x in zip(g_s, g, strict=True)]


def reuse_part(g, g_v, alpha, decompose, reuse):
    """[4] g + alpha (||g|| / ||g_v||) g_v, or g + alpha g_v. alpha: one number a layer."""
    if decompose == "layer":
        return [
            reuse_part([x], [v], [a], "model", reuse)[0]
            for x, v, a in zip(g, g_v, alpha, strict=True)
        ]
    assert decompose == "model", decompose
    if reuse == "natural" or norm(g_v) == 0:
        scale = 1.0
    else:
        assert reuse == "paper", reuse
        scale = norm(g) / norm(g_v)
    return [x + a * scale * v for x, v, a in zip(g, g_v, alpha, strict=True)]


# --- gsam: what the base gets on a look ----------------------------------------------------------


def without_gap(g_s, g, alpha, decompose):
    """g_s - alpha g_o, where g_o is the part of g orthogonal to g_s. alpha: one number a layer.

    Algorithm 1 of arXiv:2203.08065: g is taken apart along g_s, not g_s along g as in [3].
    """
    if decompose == "layer":
        return [
            without_gap([s], [x], [a], "model")[0] for s, x, a in zip(g_s, g, alpha, strict=True)
        ]
    assert decompose == "model", decompose
    if norm(g_s) == 0:
        return g_s
    unit = [s / norm(g_s) for s in g_s]
    along = dot(g, unit)
    return [s - a * (x - along * u) for s, x, u, a in zip(g_s, g, unit, alpha, strict=True)]


# --- msam: where the only gradient of a step is taken --------------------------------------------


def added_up(state, w):
    """What a base has added up of one layer's gradients; zeros before its first step."""
    return state.get("buf", state.get("m", np.zeros_like(w)))


# --- bases: from one layer's weights and what it got to its new weights ---------------------------


def sgd(w, d, state, *, lr, weight_decay, momentum, **_):
    """torch.optim.SGD: coupled decay, then momentum."""
    d = d + weight_decay * w
    buf = momentum * state["buf"] + d if "buf" in state else d
    return w - lr * buf, {"buf": buf}


def adam_direction(d, state, betas, eps):
    """mhat / (sqrt(vhat) + eps), and the new moments."""
    step = state.get("step", 0) + 1
    m = betas[0] * state.get("m", 0.0) + (1 - betas[0]) * d
    v = betas[1] * state.get("v", 0.0) + (1 - betas[1]) * d**2
    m_hat = m / (1 - betas[0] ** step)
    v_hat = v / (1 - betas[1] ** step)
    return m_hat / (np.sqrt(v_hat) + eps), {"step": step, "m": m, "v": v}


def adamw(w, d, state, *, lr, weight_decay, betas, eps, **_):
    """torch.optim.AdamW: decoupled decay."""
    u, state = adam_direction(d, state, betas, eps)
    return w * (1 - lr * weight_decay) - lr * u, state


def trust_ratio(w, u, weight_decay):
    """[10] ||w_i|| / ||u_i||; 1 where either is 0 and for layers without weight decay."""
    if weight_decay == 0 or norm([w]) == 0 or norm([u]) == 0:
        return 1.0
    return norm([w]) / norm([u])


def lamb(w, d, state, *, lr, weight_decay, betas, eps, **_):
    """[10] u = mhat / (sqrt(vhat) + eps) + wd w; w -= lr ratio u."""
    u, state = adam_direction(d, state, betas, eps)
    u = u + weight_decay * w
    return w - lr * trust_ratio(w, u, weight_decay) * u, state


def lars(w, d, state, *, lr, weight_decay, momentum, **_):
    """[10] the same on the SGD direction: u = buf + wd w; w -= lr ratio u."""
    buf = momentum * state["buf"] + d if "buf" in state else d
    u = buf + weight_decay * w
    return w - lr * trust_ratio(w, u, weight_decay) * u, {"buf": buf}


BASES = {"sgd": sgd, "adamw": adamw, "lamb": lamb, "lars": lars}


# --- when to look, and how far --------------------------------------------------------------------


def in_window(t, look_from, look_until):
    """Steps before look_from and from look_until on never look, and have no g_v."""
    return t >= look_from and (look_until is None or t < look_until)


def wants_to_look(t, squares, looked, k, look_from):
    """AE-SAM (arXiv:2304.14647) two steps later: is step t-2's ||g||^2 >= E + c sqrt(V)?

    squares: ||g||^2 of the steps before t, None for a skipped one. looked: which of them looked.
    E, V: running mean and variance, decay .9. c: how many looks there were in the window beyond
    one in k steps. Without variance the norm lies at 0 standard deviations.
    """
    if t < 2 or squares[t - 2] is None:
        return False
    numbers = [x for x in squares[: t - 1] if x is not None]
    mean, variance = numbers[0], 0.0
    for x in numbers[1:]:
        mean = 0.9 * mean + 0.1 * x
        variance = 0.9 * variance + 0.1 * (x - mean) ** 2
    in_deviations = (numbers[-1] - mean) / variance**0.5 if variance > 0 else 0.0
    surplus = sum(looked[look_from:]) - max(0, t - look_from) / k
    return in_deviations >= surplus


# --- training ------------------------------------------------------------------------------------


def train(
    weights,
    gradient,
    *,
    optimizer,
    base=None,
    steps,
    lr,
    groups,
    rho,
    alpha=0.7,
    k=5,
    p=2.0,
    layer_ascent="scaled",
    decompose="model",
    reuse="paper",
    clip=None,
    betas=(0.9, 0.999),
    eps=1e-8,
    momentum=0.9,
    m=None,
    batch_size=None,
    part_gradient=None,
    looks="periodic",
    look_from=0,
    look_until=None,
    rho_scale=None,
):
    """Train for `steps` steps from copies of `weights`; everything that happened is in the Result.

    gradient: (weights, t) -> (loss, [arrays]), of the mean loss over step t's global batch.
    m: samples that share one eps, a group; None: the global batch. Step t's batch is `batch_size`
        stream positions, group c the positions [c m, (c+1) m) of it, and part_gradient:
        (weights, t, low, high) -> [arrays], of the mean loss over positions [low, high).
    lr: a number, or t -> a number; rho, alpha: numbers. None where every group has its own.
    groups: dicts {"layers": [indices], "weight_decay": x}, and, where they differ from the rest,
        "lr" (instead of lr), "lr_scale" (times lr), "rho", "alpha", "perturb" (False: eps is 0 in
        these layers, and they count in no norm of eps). Every layer is in one.
    clip: largest whole-model 2-norm of what the base gets [7], or None.
    looks: "periodic" or "adaptive", within the window of steps look_from <= t < look_until.
    rho_scale: None, or t -> the factor of every rho at step t.
    """
    ascent, often, between, default_base = TABLE[optimizer]
    update_layer = BASES[base or default_base]
    group = {i: each for each in groups for i in each["layers"]}
    assert sorted(group) == list(range(len(weights))), "every layer is in one group"
    layers = range(len(weights))
    rhos = [group[i].get("rho", rho) for i in layers]
    alphas = [group[i].get("alpha", alpha) for i in layers]

    def ascend(w, g):
        moved = [group[i].get("perturb", True) for i in layers]
        g = [x if may_move else np.zeros_like(x) for x, may_move in zip(g, moved, strict=True)]
        if ascent == "layer":
            return ascend_layer(w, g, rhos, layer_ascent)
        return ascend_model(g, rhos, p)

    def look_at(w, g, t):
        """(g, g_s), means over groups: of the same samples, each group's g_s at its w + eps."""
        if m is None:
            return g, gradient(add(w, ascend(w, g)), t)[1]
        assert batch_size % m == 0, "m divides the batch"
        gs, g_ss = [], []
        for low in range(0, batch_size, m):
            g_c = part_gradient(w, t, low, low + m)
            eps_c = ascend(w, g_c)
            gs.append(g_c)
            g_ss.append(part_gradient(add(w, eps_c), t, low, low + m))
        return mean(gs), mean(g_ss)

    def lr_of(i, t):
        if "lr" in group[i]:
            return group[i]["lr"]
        return (lr(t) if callable(lr) else lr) * group[i].get("lr_scale", 1.0)

    w = [np.array(x, dtype=np.float64) for x in weights]
    result = Result(base_state=[{} for _ in layers])
    look_failed = False
    constant_rhos, squares = list(rhos), []

    for t in range(steps):
        at = w
        if optimizer == "msam":  # w - rho v / ||v||, arXiv:2401.12033, Algorithm 1
            v = [added_up(result.base_state[i], w[i]) for i in layers]
            at = [x - eps_i for x, eps_i in zip(w, ascend(w, v), strict=True)]
        loss, g = gradient(at, t)

        # [5] When to look; [8] and once more after a look that had to be skipped.
        inside = in_window(t, look_from, look_until)
        if not inside:
            result.g_v = None
        look = often == "every step" and inside
        if often == "every k steps" and inside:
            no_g_v = between == "reuse" and result.g_v is None
            if looks == "adaptive":
                looked = [record["look"] for record in result.records]
                due = wants_to_look(t, squares, looked, k, look_from)
            else:
                due = (t - look_from) % k == 0
            look = due or no_g_v or look_failed
        if rho_scale is not None:
            rhos[:] = [rho_scale(t) * r for r in constant_rhos]

        # What the base will get.
        skipped = not finite(g)
        update, g_v = g, result.g_v
        if look and not skipped:
            g, g_s = look_at(w, g, t)
            skipped = not finite(g) or not finite(g_s)
            update = g_s
            if optimizer == "gsam":
                update = without_gap(g_s, g, alphas, decompose)
            if between == "reuse" and not skipped:
                g_v = new_part(g_s, g, decompose)
        elif between == "reuse" and inside and not skipped:
            update = reuse_part(g, g_v, alphas, decompose, reuse)

        # [7] Clipped once, at the end.
        if clip is not None and not skipped and norm(update) > 0:
            update = [min(1.0, clip / norm(update)) * x for x in update]

        # [8] A skipped step leaves everything as it was, but time goes on.
        look_failed = look and skipped
        squares.append(None if skipped else dot(g, g))
        if not skipped:
            result.g_v = g_v
            for i in layers:
                w[i], result.base_state[i] = update_layer(
                    w[i], update[i], result.base_state[i],
                    lr=lr_of(i, t), weight_decay=group[i]["weight_decay"],
                    betas=betas, eps=eps, momentum=momentum,
                )  # fmt: skip

        result.weights.append([x.copy() for x in w])
        result.records.append({
            "look": look,
            "skipped": skipped,
            "loss": float(loss),
            "grad_norm": norm(g),
            "update_norm": 0.0 if skipped else norm(update),
            "gv_norm": 0.0 if result.g_v is None else norm(result.g_v),
        })  # fmt: skip
    return result


def add(xs, ys):
    return [x + y for x, y in zip(xs, ys, strict=True)]


def mean(per_group):
    return [sum(xs) / len(per_group) for xs in zip(*per_group, strict=True)]


def average(weights, decay):
    """The moving average of w after each step: of w_1 in full, then with a decay that grows to
    `decay` as 1 - t^(-2/3). weights: one list of layers per step."""
    kept = weights[0]
    for t, w in enumerate(weights[1:], start=2):
        d = min(decay, 1.0 - t ** (-2.0 / 3.0))
        kept = [d * a + (1.0 - d) * x for a, x in zip(kept, w, strict=True)]
    return kept
