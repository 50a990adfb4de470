"""The Triton kernels against the formulas on tensors of torch, which are their reference.

Needs pytest and torch alone, and runs on a GPU; with TRITON_INTERPRET=1 on CPU tensors
(tests/optim/test_kernels_interpreted.py). `pytest -s` on a GPU prints the bandwidth of each kernel.
"""

import copy
import itertools
import os

import pytest
import torch

from dist_looksam import Lamb, LookLayerSAM, LookSAM, kernels
from dist_looksam.kernels.lists import addresses
from dist_looksam.maths import ascent, look, shards
from dist_looksam.optim import at_once
from dist_looksam.optim.base import step_unless

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRETED), reason="needs a GPU or TRITON_INTERPRET=1"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
# Layers of part of a block of 2048, of none, of a whole one, of more, and of one number.
SIZES = [(3, 5), (0,), (33, 64), (2048,), ()]
SIZES += [] if INTERPRETED else [(4097,), (7,), (1,)]  # each block takes the interpreter its time
DECAYED = [0, 1, 2]
STEPS = 2 if INTERPRETED else 3


@pytest.fixture(autouse=True)
def without_changes_to_the_switch(monkeypatch):
    monkeypatch.delenv("DIST_LOOKSAM_KERNELS", raising=False)


@pytest.fixture
def off(monkeypatch):
    """Calls a function without the kernels."""

    def call(function, *args):
        with monkeypatch.context() as inside:
            inside.setenv("DIST_LOOKSAM_KERNELS", "off")
            return function(*args)

    return call


def tensors(seed=0, sizes=SIZES, scale=1.0):
    numbers = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(s, generator=numbers)).to(DEVICE) for s in sizes]


def copies(xs):
    return [x.clone() for x in xs]


def close(xs, ys, rtol=2e-6, atol=1e-7):
    assert len(xs) == len(ys)
    for n, (x, y) in enumerate(zip(xs, ys, strict=True)):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, msg=lambda m, n=n: f"layer {n}: {m}")


def same(xs, ys):
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def column(seed=3):
    return (
        torch.randn(len(SIZES), generator=torch.Generator().manual_seed(seed)).double().to(DEVICE)
    )


def test_sums_are_those_in_float64():
    xs, ys = tensors(0), tensors(1)
    got = shards.products((xs, xs), (xs, ys), (ys, ys))
    pairs = ((xs, xs), (xs, ys), (ys, ys))
    want = [[(a.double() * b.double()).sum() for a, b in zip(*pair)] for pair in pairs]
    torch.testing.assert_close(
        got.cpu(), torch.tensor(want, dtype=torch.float64), rtol=1e-5, atol=1e-4
    )
    some = shards.products((ys, xs), (xs, xs))
    assert torch.equal(some, got[[1, 0]])
    assert torch.equal(shards.dots(xs, xs), got[0])


def test_a_product_with_an_equal_list_is_the_square_to_the_bit():
    xs = tensors(sizes=[(100_003,), (5, 7)])
    first, second, third = shards.products((xs, xs), (xs, copies(xs)), (xs, xs))
    assert torch.equal(first, second) and torch.equal(first, third)


def test_the_same_sums_have_the_same_bits_each_time():
    xs, ys = tensors(0), tensors(1)
    assert torch.equal(shards.dots(xs, ys), shards.dots(copies(xs), copies(ys)))


def test_a_sum_of_a_layer_of_zero_entries_alone_is_zero():
    xs = tensors(sizes=[(0,), (0, 3)])
    assert shards.dots(xs, xs).tolist() == [0.0, 0.0]


def rounded(x, dtype):
    """x in 16 bits; Triton's interpreter cuts bfloat16 where a GPU rounds to the nearest."""
    if INTERPRETED and dtype == torch.bfloat16:
        return (x.view(torch.int32) & ~0xFFFF).view(torch.float32)
    return x.to(dtype).float()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("power", [1.0, 0.0])
def test_a_perturbation_is_that_of_torch_and_measures_itself(power, dtype):
    grads, weights, before = tensors(1), tensors(0), tensors(0)
    grads[3][5:9] = 0.0
    plan = ascent.Perturbation(size=0.1 * column(), grad_sq_norms=column().square(), power=power)
    sums = ascent.perturb_(weights, grads, plan, visible_dtype=dtype)
    eps = list(plan.eps(grads))
    close(weights, [w + e for w, e in zip(before, eps, strict=True)])
    if dtype is None:
        assert sums is None
        return
    applied = [rounded(w + e, dtype) - rounded(w, dtype) for w, e in zip(before, eps, strict=True)]
    pairs = ((applied, eps), (applied, applied), (eps, eps))
    want = torch.stack([torch.stack([(a * b).sum() for a, b in zip(*p)]) for p in pairs])
    # An entry at the border between two numbers of 16 bits may fall to either side.
    torch.testing.assert_close(sums, want.double(), rtol=5e-3, atol=1e-4)


def test_some_layers_take_their_own_numbers_from_a_column():
    grads, weights = tensors(1)[2:4], tensors(0)[2:4]
    size = column()
    want = [w + g * float(size[n]) for w, g, n in zip(weights, grads, (2, 3))]
    plan = ascent.Perturbation(size=size, grad_sq_norms=size)
    ascent.perturb_(weights, grads, plan, layers=[2, 3])
    close(weights, want)


def an_update(last, kept, new, finite=True, clip=1.0):
    number = torch.tensor(1.0, dtype=torch.float64, device=DEVICE)
    columns = [column(10 + n) if used else None for n, used in enumerate((last, kept, new))]
    return look.Update(
        last=columns[0], kept=columns[1], new_kept=columns[2], scale=number * clip,
        grad_sq_norm=number, update_sq_norm=number, gv_sq_norm=number,
        finite=torch.tensor(finite, device=DEVICE),
    )  # fmt: skip


FLAGS = list(itertools.product([False, True], repeat=3))


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_a_combination_is_that_of_torch(off, flags):
    update, outcomes = an_update(*flags), []
    for call in (lambda f: f(), off):
        xs, ys = tensors(0), tensors(1)
        call(lambda a=xs, b=ys: update.combine_(a, b))
        outcomes.append(xs + ys)
    close(*outcomes, rtol=1e-5, atol=1e-6)


def base_of(name, params):
    groups = [
        {"params": [p for n, p in enumerate(params) if (n in DECAYED) == decayed], **settings}
        for decayed, settings in (
            (True, {"weight_decay": 0.1, "lr": 0.02}),
            (False, {"weight_decay": 0.0, "lr": 0.05}),
        )
    ]
    if name == "lamb":
        return Lamb(groups, betas=(0.8, 0.95), eps=1e-4)
    return torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-4, fused=True)


def held(base, params):
    """Weights and all states."""
    return [*params, *(base.state[p][k] for p in params for k in sorted(base.state[p]))]


def split(params, like):
    return list(like)


def stepped(name, flags, *, clip=None, finite=True, steps=STEPS):
    """(weights and states, gradients of g_v, norms) after steps by parts, the kernels on or off."""
    params = [torch.nn.Parameter(w) for w in tensors(0)]
    base, gvs, norms = base_of(name, params), tensors(9), []
    for p, g in zip(params, tensors(8), strict=True):
        p.grad = g
    base.step()  # makes the states
    before = copies(held(base, params) + gvs)
    for t in range(steps):
        xs, ys = tensors(20 + t), tensors(30 + t)
        update = an_update(*flags, clip=1.0 if clip is None else clip)
        parts = at_once.Parts(
            xs=xs, ys=ys, gvs=gvs, numbers=range(len(xs)), update=update,
            clips=clip is not None, finite=None if finite is None else update.finite & finite,
        )  # fmt: skip
        work = at_once.work_of(base, params, parts, groups=base.param_groups, split=split)
        if work is None:
            new = copies(ys)
            update.combine_(xs, new)
            gvs = new if flags[2] else gvs
            norms.append(shards.dots(gvs, gvs) if flags[2] else None)
            update.clip_(xs) if clip is not None else None
            for p, x in zip(params, xs, strict=True):
                p.grad = x.view_as(p)
            base.step()
        else:
            norms.append(work())
    return before, held(base, params) + gvs, norms


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("name", ["lamb", "adamw"])
def test_a_step_from_parts_is_the_step_from_their_gradient(off, name, flags, clip):
    _, ours, norms = stepped(name, flags, clip=clip)
    _, theirs, expected = off(lambda: stepped(name, flags, clip=clip))
    close(ours, theirs, rtol=2e-5, atol=2e-6)
    for a, b in zip(norms, expected, strict=True):
        assert (a is None) == (b is None) == (not flags[2])
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flags", [(False, True, False), (True, False, True)], ids=str)
@pytest.mark.parametrize("name", ["lamb", "adamw"])
def test_a_step_that_is_not_finite_changes_no_bit(name, flags):
    before, after, norms = stepped(name, flags, clip=0.3, finite=False)
    assert same(before, after)
    assert not flags[2] or all(n.isnan().sum() == len(SIZES) - 1 for n in norms)  # one is empty


@pytest.mark.parametrize("name", ["lamb", "adamw"])
def test_the_same_step_has_the_same_bits_each_time(name):
    first, second = (stepped(name, (True, True, True), clip=0.3)[1] for _ in range(2))
    assert same(first, second)


def test_a_step_of_lamb_itself_uses_the_kernels_and_found_inf(off):
    def run():
        params = [torch.nn.Parameter(w) for w in tensors(0)]
        base = base_of("lamb", params)
        for t in range(3):
            for p, g in zip(params, tensors(50 + t), strict=True):
                p.grad = g
            step_unless(base, torch.tensor(float(t == 1), device=DEVICE))
        return held(base, params)

    close(run(), off(run), rtol=2e-5, atol=2e-6)


def test_layers_inside_one_flat_parameter_at_odd_offsets_step_as_layers(off):
    """As under ZeRO: an address is not always a multiple of 16 bytes, and the end is padding."""
    lengths = [15, 2049, 2048, 1]
    starts = list(itertools.accumulate([1, *lengths]))

    def pieces(param, like):
        return [like.view(-1)[a : a + n] for a, n in zip(starts, lengths)]

    def run():
        flat = torch.nn.Parameter(tensors(0, [(sum(lengths) + 6,)])[0])
        base = Lamb([flat], lr=0.02, eps=1e-4, weight_decay=0.1)
        base.pieces = pieces
        for t in range(3):
            flat.grad = tensors(60 + t, [flat.shape])[0]
            flat.grad[0], flat.grad[starts[-1] :] = 0.0, 0.0
            base.step()
        return held(base, [flat])

    close(run(), off(run), rtol=2e-5, atol=2e-6)


def test_wide_loads_are_for_addresses_at_multiples_of_16_bytes_alone():
    row = torch.zeros(64, device=DEVICE)
    at_even, at_odd = [row[:8], row[8:16]], [row[:8], row[9:16]]
    assert addresses([at_even], row.device)[1]
    assert not addresses([at_even, at_odd], row.device)[1]


@pytest.mark.parametrize("base", ["lamb", "adamw", "sgd"])
@pytest.mark.parametrize("method", [LookSAM, LookLayerSAM])
def test_whole_steps_of_a_method_are_those_without_kernels(off, method, base):
    def run():
        params = [torch.nn.Parameter(w) for w in tensors(0, scale=0.5)]
        if base == "sgd":
            inner = torch.optim.SGD(params, lr=0.05, momentum=0.9)
        else:
            inner = base_of(base, params)
        optimizer = method(params, inner, rho=0.05, alpha=0.7, k=3)
        optimizer.clip = 2.0
        for t in range(5):
            targets = tensors(70 + t)

            def closure(targets=targets):
                optimizer.zero_grad()
                pairs = zip(params, targets, strict=True)
                loss = sum(((p - x).square() * (1 + p.square())).sum() for p, x in pairs) / 100
                loss.backward()
                return loss

            optimizer.step(closure)
        gv = [optimizer.state[p]["g_v"] for p in params]
        return [p.detach() for p in params], gv, optimizer.seen

    (ours, gv, seen), (theirs, expected, expected_seen) = run(), off(run)
    close(ours, theirs, rtol=1e-4, atol=2e-5)
    close(gv, expected, rtol=1e-3, atol=1e-4)
    for name in ("grad_norm", "update_norm", "gv_norm"):
        torch.testing.assert_close(
            getattr(seen, name), getattr(expected_seen, name), rtol=1e-3, atol=1e-6
        )


def test_the_states_are_those_of_torch_and_load_into_it():
    params = [torch.nn.Parameter(w) for w in tensors(0)]
    base = base_of("adamw", params)
    optimizer = LookSAM(params, base, rho=0.05, alpha=0.7, k=2)

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    assert {k for s in base.state.values() for k in s} == {"step", "exp_avg", "exp_avg_sq", "g_v"}
    assert {float(s["step"]) for s in base.state.values()} == {4.0}
    other = base_of("adamw", [torch.nn.Parameter(p.detach().clone()) for p in params])
    other.load_state_dict(copy.deepcopy(base.state_dict()))


def test_a_write_by_a_kernel_is_seen_by_autograd():
    """Backward through weights that have changed since must be an error, not a wrong gradient."""
    p = torch.nn.Parameter(tensors(0, [(5,)])[0])
    base = Lamb([p], lr=0.02, weight_decay=0.1)
    loss = p.square().sum()
    p.grad = torch.ones_like(p)
    base.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "odd",
    [
        lambda x: x.double(),
        lambda x: x.bfloat16(),
        lambda x: x.t() if x.ndim == 2 else x,
        lambda x: x if INTERPRETED else x.cpu(),
    ],
    ids=["float64", "bfloat16", "strided", "device"],
)
def test_tensors_that_do_not_fit_are_left_to_torch(odd):
    xs = tensors(0)
    others = [*xs[:2], odd(xs[2]), *xs[3:]]
    assert kernels.fit(xs) is not None
    if not (INTERPRETED and others[2] is xs[2]):
        assert kernels.fit(others) is None and kernels.fit(xs, others) is None


def test_the_environment_turns_the_kernels_off(monkeypatch):
    monkeypatch.setenv("DIST_LOOKSAM_KERNELS", "off")
    assert kernels.fit(tensors(0)) is None


def test_ranks_agree_on_the_kernels(monkeypatch):
    """Replicas that round differently would drift apart without a word."""
    monkeypatch.setattr(kernels, "_not_on_all_ranks", set())
    monkeypatch.setattr(kernels, "usable", lambda device: True)
    device = torch.device("cuda:0")
    kernels.agree(device, lambda mine: [mine, True])
    assert not kernels._not_on_all_ranks
    kernels.agree(device, lambda mine: [mine, False])
    assert kernels._not_on_all_ranks == {device}


def test_where_one_rank_has_no_kernels_no_rank_uses_them(monkeypatch):
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu")
    assert kernels.usable(device)
    monkeypatch.setattr(kernels, "_not_on_all_ranks", {device})
    assert not kernels.usable(device) and kernels.fit(tensors(0)) is None
