"""The Triton kernels. Each program works on one block of one layer.

`pointers` holds an address for each list and layer, [lists, layers]; `blocks`, [3, num_blocks], the
layer, the position in it in blocks, and the number of entries of each block. Columns, one float64
number per layer of the model, are read at `places`. Partial sums, [rows, num_blocks], are added by
`add_blocks` in a fixed order: no atomics, so that the same step gives the same bits.
"""

import triton
import triton.language as tl


@triton.jit
def _locate(blocks, num_blocks, BLOCK: tl.constexpr):
    """(layer, first entry, number of entries) of this program's block."""
    block = tl.program_id(0)
    layer = tl.load(blocks + block)
    start = tl.load(blocks + num_blocks + block).to(tl.int64) * BLOCK
    count = tl.load(blocks + 2 * num_blocks + block)
    return layer, start, count


@triton.jit
def _at(pointers, row, layers, layer, start, ALIGNED: tl.constexpr):
    """The block's first entry in list `row`."""
    pointer = tl.load(pointers + row * layers + layer).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@triton.jit
def _get(pointer, offsets, count, FULL: tl.constexpr):
    if FULL:
        return tl.load(pointer + offsets)
    else:
        return tl.load(pointer + offsets, mask=offsets < count, other=0.0)


@triton.jit
def _put(pointer, offsets, count, values, FULL: tl.constexpr):
    if FULL:
        tl.store(pointer + offsets, values)
    else:
        tl.store(pointer + offsets, values, mask=offsets < count)


@triton.jit
def _number(column, place, USED: tl.constexpr):
    if USED:
        return tl.load(column + place).to(tl.float32)
    else:
        return 1.0


@triton.jit
def _combined(x, y, last, kept, scale, LAST: tl.constexpr, KEPT: tl.constexpr, CLIP: tl.constexpr):
    """scale (last x + kept y)"""
    g = x
    if LAST:
        g = g * last
    if KEPT:
        g += y * kept
    if CLIP:
        g = g * scale
    return g


# Sums.


@triton.jit
def _sums(
    x, y, partial, num_blocks, count, TWO: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr
):
    block = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    a = _get(x, offsets, count, FULL)
    tl.store(partial + block, tl.sum(a * a, 0))
    if TWO:
        b = _get(y, offsets, count, FULL)
        tl.store(partial + num_blocks + block, tl.sum(a * b, 0))
        tl.store(partial + 2 * num_blocks + block, tl.sum(b * b, 0))


@triton.jit(do_not_specialize=["layers", "num_blocks"])
def sums(
    pointers, blocks, partial, layers, num_blocks,
    TWO: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x.x, and with TWO lists x.y and y.y. Lists: x, y."""
    layer, start, count = _locate(blocks, num_blocks, BLOCK)
    x = _at(pointers, 0, layers, layer, start, ALIGNED)
    y = x
    if TWO:
        y = _at(pointers, 1, layers, layer, start, ALIGNED)
    if count == BLOCK:
        _sums(x, y, partial, num_blocks, count, TWO, True, BLOCK)
    else:
        _sums(x, y, partial, num_blocks, count, TWO, False, BLOCK)


@triton.jit(do_not_specialize=["layers", "num_blocks"])
def add_blocks(partial, first, out, layers, num_blocks, BLOCK: tl.constexpr):
    """out[row, layer] = float64 sum of partial[row, first[layer]:first[layer + 1]]."""
    layer, row = tl.program_id(0), tl.program_id(1)
    low, high = tl.load(first + layer), tl.load(first + layer + 1)
    total = tl.zeros([BLOCK], tl.float64)
    for at in range(low, high, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        values = tl.load(partial + row * num_blocks + offsets, mask=offsets < high, other=0.0)
        total += values.to(tl.float64)
    tl.store(out + row * layers + layer, tl.sum(total, 0))


# Perturbation.


@triton.jit
def _rounded(x, ROUND: tl.constexpr):
    if ROUND == 1:
        return x.to(tl.bfloat16).to(tl.float32)
    else:
        return x.to(tl.float16).to(tl.float32)


@triton.jit
def _perturb(
    w_at, g_at, size, partial, num_blocks, count,
    SIGN: tl.constexpr, ROUND: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    w = _get(w_at, offsets, count, FULL)
    g = _get(g_at, offsets, count, FULL)
    if SIGN:
        g = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, g))
    eps = g * size
    moved = w + eps
    _put(w_at, offsets, count, moved, FULL)
    if ROUND:
        applied = _rounded(moved, ROUND) - _rounded(w, ROUND)
        tl.store(partial + block, tl.sum(applied * eps, 0))
        tl.store(partial + num_blocks + block, tl.sum(applied * applied, 0))
        tl.store(partial + 2 * num_blocks + block, tl.sum(eps * eps, 0))


@triton.jit(do_not_specialize=["layers", "num_blocks"])
def perturb(
    pointers, blocks, places, sizes, partial, layers, num_blocks,
    SIGN: tl.constexpr, ROUND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """w += eps, eps = size g or size sign(g). Lists: w, g.

    ROUND: 1 for bfloat16, 2 for float16: sums of (a.eps, a.a, eps.eps), a the rounded change.
    """
    layer, start, count = _locate(blocks, num_blocks, BLOCK)
    w = _at(pointers, 0, layers, layer, start, ALIGNED)
    g = _at(pointers, 1, layers, layer, start, ALIGNED)
    size = tl.load(sizes + tl.load(places + layer)).to(tl.float32)
    if count == BLOCK:
        _perturb(w, g, size, partial, num_blocks, count, SIGN, ROUND, True, BLOCK)
    else:
        _perturb(w, g, size, partial, num_blocks, count, SIGN, ROUND, False, BLOCK)


# The base's gradient.


@triton.jit
def _combine(
    x_at, y_at, last, kept, new, count,
    LAST: tl.constexpr, KEPT: tl.constexpr, NEW: tl.constexpr,
    FULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.arange(0, BLOCK)
    x = _get(x_at, offsets, count, FULL)
    y = _get(y_at, offsets, count, FULL)
    if LAST or KEPT:
        _put(x_at, offsets, count, _combined(x, y, last, kept, 1.0, LAST, KEPT, False), FULL)
    if NEW:
        _put(y_at, offsets, count, x + y * new, FULL)


@triton.jit(do_not_specialize=["layers", "num_blocks"])
def combine(
    pointers, blocks, places, lasts, kepts, news, layers, num_blocks,
    LAST: tl.constexpr, KEPT: tl.constexpr, NEW: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x = last x + kept y, and with NEW y = x + new y, of the x before. Lists: x, y."""
    layer, start, count = _locate(blocks, num_blocks, BLOCK)
    place = tl.load(places + layer)
    last, kept = _number(lasts, place, LAST), _number(kepts, place, KEPT)
    new = _number(news, place, NEW)
    x = _at(pointers, 0, layers, layer, start, ALIGNED)
    y = _at(pointers, 1, layers, layer, start, ALIGNED)
    if count == BLOCK:
        _combine(x, y, last, kept, new, count, LAST, KEPT, NEW, True, BLOCK)
    else:
        _combine(x, y, last, kept, new, count, LAST, KEPT, NEW, False, BLOCK)


# Base optimizers. settings, [7, groups] float64: lr, b1, b2, log b1, log b2, eps, weight_decay.


@triton.jit
def _alive(finite, CHECKED: tl.constexpr):
    if CHECKED:
        return tl.load(finite).to(tl.int32)
    else:
        return 1


@triton.jit(do_not_specialize=["params", "groups"])
def count_steps(
    pointers, group_of, settings, corrections, finite, params, groups,
    WIDE: tl.constexpr, CHECKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step more for each parameter, unless not finite. Lists: the steps, 0-dim, float64 if
    WIDE and else float32. corrections, [2, params], become 1 - b1^step and 1 - b2^step."""
    numbers = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = numbers < params
    addresses = tl.load(pointers + numbers, mask=inside, other=0)
    if WIDE:
        at = addresses.to(tl.pointer_type(tl.float64))
    else:
        at = addresses.to(tl.pointer_type(tl.float32))
    step = tl.load(at, mask=inside, other=0.0).to(tl.float64) + _alive(finite, CHECKED)
    if WIDE:
        tl.store(at, step, mask=inside)
    else:
        tl.store(at, step.to(tl.float32), mask=inside)
    step = tl.where(step < 1.0, 1.0, step)
    group = tl.load(group_of + numbers, mask=inside, other=0)
    for row in tl.static_range(2):
        log = tl.load(settings + (3 + row) * groups + group, mask=inside, other=0.0)
        tl.store(corrections + row * params + numbers, 1.0 - tl.exp(step * log), mask=inside)


@triton.jit
def _gv(x, y, new, gv_at, partial, block, offsets, count, STORE: tl.constexpr, FULL: tl.constexpr):
    """g_v = x + new y: its partial sum of squares, and itself."""
    gv = x + y * new
    if not FULL:
        gv = tl.where(offsets < count, gv, 0.0)  # an infinite `new` times 0
    tl.store(partial + block, tl.sum(gv * gv, 0))
    if STORE:
        _put(gv_at, offsets, count, gv, FULL)


@triton.jit
def _moments(g, m_at, v_at, b1, b2, o1, o2, offsets, count, FULL: tl.constexpr):
    m = b1 * _get(m_at, offsets, count, FULL) + o1 * g
    v = b2 * _get(v_at, offsets, count, FULL) + o2 * g * g
    _put(m_at, offsets, count, m, FULL)
    _put(v_at, offsets, count, v, FULL)
    return m, v


@triton.jit
def _base(
    pointers, layers, layer, start, count, place, partial, num_blocks,
    lasts, kepts, news, scales, setting, corrections, params, owner, groups,
    LAMB: tl.constexpr, LAST: tl.constexpr, KEPT: tl.constexpr, CLIP: tl.constexpr,
    NEW: tl.constexpr, STORE: tl.constexpr,
    ALIGNED: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    w_at = _at(pointers, 0, layers, layer, start, ALIGNED)
    w = _get(w_at, offsets, count, FULL)
    x = _get(_at(pointers, 1, layers, layer, start, ALIGNED), offsets, count, FULL)
    y = x
    if KEPT or NEW:
        y = _get(_at(pointers, 5, layers, layer, start, ALIGNED), offsets, count, FULL)
    last, kept = _number(lasts, place, LAST), _number(kepts, place, KEPT)
    g = _combined(x, y, last, kept, _number(scales, 0, CLIP), LAST, KEPT, CLIP)
    b1, b2 = tl.load(setting + groups), tl.load(setting + 2 * groups)
    o1, o2 = (1.0 - b1).to(tl.float32), (1.0 - b2).to(tl.float32)
    m, v = _moments(
        g, _at(pointers, 2, layers, layer, start, ALIGNED),
        _at(pointers, 3, layers, layer, start, ALIGNED),
        b1.to(tl.float32), b2.to(tl.float32), o1, o2, offsets, count, FULL,
    )  # fmt: skip
    lr, decay = tl.load(setting), tl.load(setting + 6 * groups)
    eps = tl.load(setting + 5 * groups).to(tl.float32)
    c1, c2 = tl.load(corrections + owner), tl.load(corrections + params + owner)
    if LAMB:
        u = m * (1.0 / c1).to(tl.float32)
        u = u / (tl.sqrt(v * (1.0 / c2).to(tl.float32)) + eps) + decay.to(tl.float32) * w
        if not FULL:
            u = tl.where(offsets < count, u, 0.0)  # eps may be 0
        _put(_at(pointers, 4, layers, layer, start, ALIGNED), offsets, count, u, FULL)
        tl.store(partial + block, tl.sum(w * w, 0))
        tl.store(partial + num_blocks + block, tl.sum(u * u, 0))
    else:
        root = (1.0 / tl.sqrt(c2)).to(tl.float32)
        w = w * (1.0 - lr * decay).to(tl.float32)
        w = w - (lr / c1).to(tl.float32) * m / (tl.sqrt(v) * root + eps)
        _put(w_at, offsets, count, w, FULL)
    if NEW:
        gv_at = w_at
        if STORE:
            gv_at = _at(pointers, 6, layers, layer, start, ALIGNED)
        row = 2 * num_blocks if LAMB else 0
        new = _number(news, place, NEW)
        _gv(x, y, new, gv_at, partial + row, block, offsets, count, STORE, FULL)


@triton.jit(do_not_specialize=["layers", "num_blocks", "params", "groups"])
def base(
    pointers, blocks, index, partial, lasts, kepts, news, scales, settings, corrections, finite,
    layers, num_blocks, params, groups,
    LAMB: tl.constexpr, LAST: tl.constexpr, KEPT: tl.constexpr, CLIP: tl.constexpr,
    NEW: tl.constexpr, STORE: tl.constexpr, CHECKED: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """AdamW's whole step; or LAMB's states, its u = direction + weight_decay w, and sums of w.w and
    u.u. With NEW g_v = x + new y as well, and its sum of squares. Nothing where not finite, but the
    sum of g_v is NaN there. Lists: w, x, m, v, u, y, g_v.

    index: [3, layers]: each layer's place in columns, parameter, and group."""
    layer, start, count = _locate(blocks, num_blocks, BLOCK)
    place = tl.load(index + layer)
    owner, group = tl.load(index + layers + layer), tl.load(index + 2 * layers + layer)
    if _alive(finite, CHECKED) == 0:
        if NEW:
            row = 2 * num_blocks if LAMB else 0
            tl.store(partial + row + tl.program_id(0), float("nan"))
    else:
        if count == BLOCK:
            _base(
                pointers, layers, layer, start, count, place, partial, num_blocks,
                lasts, kepts, news, scales, settings + group, corrections, params, owner, groups,
                LAMB, LAST, KEPT, CLIP, NEW, STORE, ALIGNED, True, BLOCK,
            )  # fmt: skip
        else:
            _base(
                pointers, layers, layer, start, count, place, partial, num_blocks,
                lasts, kepts, news, scales, settings + group, corrections, params, owner, groups,
                LAMB, LAST, KEPT, CLIP, NEW, STORE, ALIGNED, False, BLOCK,
            )  # fmt: skip


@triton.jit
def _descend(w_at, u_at, size, count, FULL: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    w = _get(w_at, offsets, count, FULL) - size * _get(u_at, offsets, count, FULL)
    _put(w_at, offsets, count, w, FULL)


@triton.jit(do_not_specialize=["layers", "num_blocks", "groups", "trusted"])
def descend(
    pointers, blocks, slots, group_of, squares, settings, finite,
    layers, num_blocks, groups, trusted,
    CHECKED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """w -= lr ratio u. Lists: w, u.

    squares: [2, trusted], ||w||^2 and ||u||^2 of the layers with a ratio; slots: each layer's
    column in it, -1 for a ratio of 1."""
    layer, start, count = _locate(blocks, num_blocks, BLOCK)
    if _alive(finite, CHECKED) != 0:
        slot = tl.load(slots + layer)
        size = tl.load(settings + tl.load(group_of + layer))
        if slot >= 0:
            w2, u2 = tl.load(squares + slot), tl.load(squares + trusted + slot)
            none = (w2 == 0) | (u2 == 0)
            size = tl.where(none, size, size * tl.sqrt(w2 / tl.where(none, 1.0, u2)))
        w = _at(pointers, 0, layers, layer, start, ALIGNED)
        u = _at(pointers, 1, layers, layer, start, ALIGNED)
        if count == BLOCK:
            _descend(w, u, size.to(tl.float32), count, True, BLOCK)
        else:
            _descend(w, u, size.to(tl.float32), count, False, BLOCK)
