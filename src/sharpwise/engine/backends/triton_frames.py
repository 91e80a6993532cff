"""Frames of the Triton kernels: how programs find their tensors, and in which order they go over them.

A program looks up its *chunk* (a job, and a number within it) and the *job* (a row of a table: addresses, sizes). Jobs
are rectangles of memory, so that one launch moves tensors of all shapes. `$NAME` is filled in by `triton_print`.

Offsets within a tensor have 64 bits, those within a tile 32. Sums of squares are in fp64: of finite gradients they are
finite. Nothing but pointers is passed, and nothing is specialized on: no number compiles anything.
"""

HEAD = """import triton
import triton.language as tl

@triton.jit
def address(at, T: tl.constexpr, ALIGN: tl.constexpr):
    p = at.to(tl.pointer_type(T))
    if ALIGN == 16:
        p = tl.multiple_of(p, 16)
    return p

@triton.jit
def larger(a, b):
    return tl.where((a > b) | (a != a), a, b)

@triton.jit
def most(x, mask):
    # Along a line; tl.max leaves NaN out.
    found = tl.max(tl.where(mask, x, -float("inf")), axis=-1, keep_dims=True)
    lacks = tl.max((mask & (x != x)).to(tl.int32), axis=-1, keep_dims=True)
    return tl.where(lacks > 0, float("nan"), found)

@triton.jit
def nearest(x):
    # To even where two are as near. From 2**23 on all are whole.
    whole = (tl.abs(x) + 8388608.0) - 8388608.0
    whole = tl.where(whole == 0, x * 0.0, tl.where(x < 0, -whole, whole))
    return tl.where(tl.abs(x) < 8388608.0, whole, x)
"""

_JOB = """    row = jobs + tl.load(chunks + 2 * tl.program_id(0)).to(tl.int64) * $width
    k = tl.load(chunks + 2 * tl.program_id(0) + 1)
"""

_RECTANGLE = """    columns = tl.load(row + $columns)
    pitch = tl.multiple_of(tl.load(row + $pitch), G)
    per = tl.load(row + $per)
    span = tl.load(row + $span)
    across = (columns + span - 1) // span
    r0 = (k // across) * per
    c0 = (k % across) * span
    n = tl.multiple_of(tl.minimum(span, columns - c0).to(tl.int32), G)
"""

TILES = f"""
@triton.jit(do_not_specialize=$args)
def tiles($moves, rates, $aligned, BY: tl.constexpr, BLOCK: tl.constexpr):
    # Elements. BY: the step is looked up by row or column of the rectangle.
    if tl.load(ok_) == 0:
        return
{_JOB}
$elements_head
{_RECTANGLE.rstrip()}
    if BY:
        first = tl.load(row + $first)
        by_row = tl.load(row + $by_row)
        size = tl.load(row + $size).to(tl.int32)
        by_column = tl.load(row + $by_column)
    for r in range(r0, tl.minimum(r0 + per, tl.load(row + $rows))):
        at = tl.multiple_of(r * pitch + c0, G)
        for c in range(0, n, BLOCK):
            i = c + tl.arange(0, BLOCK)
            mask = i < n
            rate = step
            if BY:
                b = first + r * by_row + ((c0.to(tl.int32) + i) // size) * by_column
$factors
            move($moved, at, i, mask, rate)
"""

RATE = "rate = tl.load(rates + b, mask=mask, other=0.0)"
CELL = (
    "rate = tl.load(rates + 2 * b, mask=mask, other=0.0)",
    "shrunk = tl.load(rates + 2 * b + 1, mask=mask, other=0.0)",
)
"""What elements move by: a step, or under a control the step of a cell and its factor of decay."""

LARGEST = """
@triton.jit
def largest(x, mask):
    # Magnitude along a line, by the bits: these are in the same order, and NaN comes last.
    bits = tl.where(mask, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    return tl.max(bits, axis=-1, keep_dims=True).to(tl.float32, bitcast=True)
"""

LINES = f"""
@triton.jit(do_not_specialize=$args)
def lines($moves, rates, $aligned, BY: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr):
    # Elements of lines, cut into blocks of Q that are coded together; a tile is [blocks, Q].
    # BY: the step is looked up by line or column of the rectangle.
    if tl.load(ok_) == 0:
        return
{_JOB}
$elements_head
    columns = tl.multiple_of(tl.load(row + $columns).to(tl.int32), G)
    pitch = tl.multiple_of(tl.load(row + $pitch), G)
    per = tl.load(row + $per).to(tl.int32)
    across = (columns + Q - 1) // Q
    stored = ((pitch + Q - 1) // Q).to(tl.int32)
    first = tl.load(row + $first)
    by_row = tl.load(row + $by_row)
    size = tl.load(row + $size).to(tl.int32)
    by_column = tl.load(row + $by_column)
    i = tl.arange(0, Q)[None, :]
    end = tl.minimum(k * per + per, tl.load(row + $rows).to(tl.int32))
    for b0 in range(k * per, end, BLOCK // Q):
        b = b0 + tl.arange(0, BLOCK // Q)[:, None]
        held = b < end
        r = b // across
        c = b % across * Q
        at = r.to(tl.int64) * pitch + c
        mask = held & (i < columns - c)
        rate = step
        if BY:
            rate = tl.load(rates + first + r // size * by_row + (c + i) // size * by_column, mask=mask, other=0.0)
        move($elements, at, i, mask, rate, r.to(tl.int64) * stored + b % across, held)
"""

ROWS = f"""
@triton.jit(do_not_specialize=$args)
def rows($moves, $aligned, PER: tl.constexpr, BLOCK: tl.constexpr):
    # Blocks of adjacent elements, of one length: summed up, then moved while the gradient is in the cache.
    if tl.load(ok_) == 0:
        return
{_JOB}
$elements_head
$blocks_head
    n = tl.multiple_of(tl.load(row + $columns).to(tl.int32), G)
    count = tl.load(row + $rows).to(tl.int32)
    per = tl.load(row + $per).to(tl.int32)
    for b0 in range(k * per, tl.minimum(k * per + per, count), PER):
        b = b0 + tl.arange(0, PER)
        held = b < count
        base = b.to(tl.int64)[:, None] * n
        sums = tl.zeros([PER, BLOCK], tl.float64)
        for c in range(0, n, BLOCK):
            j = c + tl.arange(0, BLOCK)
            mask = held[:, None] & (j < n)[None, :]
            x = tl.load(g_ + base + j[None, :], mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float64)
            sums += x * x
        mean = tl.sum(sums, axis=1) / tl.load(counts_ + b, mask=held, other=1.0) * clip64 * clip64
        rate = block_step($blocks, b, held, held, mean)[:, None]
        for c in range(0, n, BLOCK):
            j = c + tl.arange(0, BLOCK)
            mask = held[:, None] & (j < n)[None, :]
            move($elements, base, j[None, :], mask, rate)
"""

COLUMNS = f"""
@triton.jit(do_not_specialize=$args)
def columns($moves, $aligned, BR: tl.constexpr, BC: tl.constexpr):
    # Blocks that are columns, or up to BC adjacent ones.
    if tl.load(ok_) == 0:
        return
{_JOB}
$elements_head
$blocks_head
    count = tl.load(row + $rows).to(tl.int32)
    pitch = tl.multiple_of(tl.load(row + $pitch), G)
    size = tl.load(row + $size).to(tl.int32)
    wide = tl.multiple_of(tl.load(row + $span).to(tl.int32), G)
    c0 = tl.multiple_of(k * wide, G)
    n = tl.multiple_of(tl.minimum(wide, tl.load(row + $columns).to(tl.int32) - c0), G)
    lane = tl.arange(0, BC)
    held = lane < n
    b = tl.where(size == 1, c0 + lane, k)
    sums = tl.zeros([BC], tl.float64)
    for r0 in range(0, count, BR):
        r = r0 + tl.arange(0, BR)
        at = r.to(tl.int64)[:, None] * pitch + c0
        mask = (r < count)[:, None] & held[None, :]
        x = tl.load(g_ + at + lane[None, :], mask=mask, other=0.0).to(tl.float64)
        sums += tl.sum(x * x, axis=0)
    total = tl.where(size == 1, sums, tl.sum(sums))
    mean = total / tl.load(counts_ + b, mask=held, other=1.0) * clip64 * clip64
    first = lane < tl.where(size == 1, n, 1)
    rate = block_step($blocks, b, held, first, mean)[None, :]
    for r0 in range(0, count, BR):
        r = r0 + tl.arange(0, BR)
        at = r.to(tl.int64)[:, None] * pitch + c0
        mask = (r < count)[:, None] & held[None, :]
        move($elements, at, lane[None, :], mask, rate)
"""

PHASE = f"""
@triton.jit(do_not_specialize=$args)
def phase(jobs, chunks, partial, starts, scalars, clip_, ok_, rates, BLOCK: tl.constexpr):
    # Block state and the step of one block per program, from partial sums at starts[i] .. starts[i + 1].
    if tl.load(ok_) == 0:
        return
{_JOB}
$scalars_head
$blocks_head
    place = tl.load(row + $first) + k
    begin = tl.load(starts + place)
    end = tl.load(starts + place + 1)
    sums = tl.zeros([BLOCK], tl.float64)
    for i in range(begin, end, BLOCK):
        lane = i + tl.arange(0, BLOCK)
        sums += tl.load(partial + lane, mask=lane < end, other=0.0)
    b = k + tl.arange(0, 1)
    held = b >= 0
    mean = tl.sum(sums) / tl.load(counts_ + b, mask=held, other=1.0) * clip64 * clip64
    tl.store(rates + tl.load(row + $by_row) + b, block_step($blocks, b, held, held, mean), mask=held)
"""

AIM = f"""
@triton.jit(do_not_specialize=$args)
def aim($moves, rates, sums, $aligned, BY: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    # Sums of u u, p u and p p for a control: of each row of a chunk, of each of its columns, or of all of it.
    if tl.load(ok_) == 0:
        return
{_JOB}
$elements_head
{_RECTANGLE.rstrip()}
    c0 = tl.multiple_of(c0, G)
    kind = tl.load(row + $kind)
    sums += 3 * tl.load(row + $sums)
    if BY:
        first = tl.load(row + $first)
        by_row = tl.load(row + $by_row)
        size = tl.load(row + $size).to(tl.int32)
        by_column = tl.load(row + $by_column)
    lane = tl.arange(0, BC)[None, :]
    uu = tl.zeros([BR, BC], tl.float64)
    pu = tl.zeros([BR, BC], tl.float64)
    pp = tl.zeros([BR, BC], tl.float64)
    end = tl.minimum(r0 + per, tl.load(row + $rows))
    for r1 in range(r0, end, BR):
        r = r1 + tl.arange(0, BR)[:, None]
        held = r < end
        at = r * pitch + c0
        for c in range(0, n, BC):
            i = c + lane
            mask = held & (i < n)
            rate = step
            if BY:
                b = first + r * by_row + ((c0.to(tl.int32) + i) // size) * by_column
                rate = tl.load(rates + b, mask=mask, other=0.0)
            x, u = aimed($elements, at, i, mask, rate)
            x = tl.where(mask, x, 0.0).to(tl.float64)
            u = tl.where(mask, u, 0.0).to(tl.float64)
            uu += u * u
            pu += x * u
            pp += x * x
        if kind == 0:
            to = sums + 3 * (r * across + k % across)
            tl.store(to, tl.sum(uu, axis=1, keep_dims=True), mask=held)
            tl.store(to + 1, tl.sum(pu, axis=1, keep_dims=True), mask=held)
            tl.store(to + 2, tl.sum(pp, axis=1, keep_dims=True), mask=held)
            uu = tl.zeros([BR, BC], tl.float64)
            pu = tl.zeros([BR, BC], tl.float64)
            pp = tl.zeros([BR, BC], tl.float64)
    if kind == 1:
        to = sums + 3 * ((k // across) * columns + c0 + lane)
        tl.store(to, tl.sum(uu, axis=0, keep_dims=True), mask=lane < n)
        tl.store(to + 1, tl.sum(pu, axis=0, keep_dims=True), mask=lane < n)
        tl.store(to + 2, tl.sum(pp, axis=0, keep_dims=True), mask=lane < n)
    if kind == 2:
        tl.store(sums + 3 * k, tl.sum(uu))
        tl.store(sums + 3 * k + 1, tl.sum(pu))
        tl.store(sums + 3 * k + 2, tl.sum(pp))
"""

BOUND = f"""
@triton.jit
def sine(x):
    # In fp64, of up to a few turns; that of libdevice keeps a table on the stack.
    turns = tl.floor(x * 0.3183098861837907 + 0.5)
    r = (x - turns * 3.141592653589793) - turns * 1.2246467991473532e-16
    found = r * 0.0 + 1.0
    for k in tl.static_range(20, 0, -2):
        found = 1.0 - r * r / (k * (k + 1)) * found
    return tl.where(turns - 2.0 * tl.floor(turns * 0.5) == 0.0, r, -r) * found

@triton.jit(do_not_specialize=$args)
def bound(jobs, chunks, sums, scalars, clip_, ok_, rates, cells, snr, $tile):
    # What a control makes of units: steps and factors of decay of their cells, and norms that are held.
    if tl.load(ok_) == 0:
        return
{_JOB}
$scalars_head
    unit = k * U + tl.arange(0, U)
    here = unit < tl.load(row + $rows)
    parts = tl.load(row + $pitch)
    begin = tl.load(row + $sums) + unit[:, None] * tl.load(row + $per)
    uu = tl.zeros([U, W], tl.float64)
    pu = tl.zeros([U, W], tl.float64)
    pp = tl.zeros([U, W], tl.float64)
    for j in range(0, parts, W):
        part = j + tl.arange(0, W)[None, :]
        mask = here[:, None] & (part < parts)
        at = sums + 3 * (begin + part * tl.load(row + $span))
        uu += tl.load(at, mask=mask, other=0.0)
        pu += tl.load(at + 1, mask=mask, other=0.0)
        pp += tl.load(at + 2, mask=mask, other=0.0)
    uu = tl.sum(uu, axis=1)
    pu = tl.sum(pu, axis=1)
    pp = tl.sum(pp, axis=1)
    elements = tl.load(row + $size).to(tl.float64)
    kind = tl.load(row + $kind)
    some = unit < tl.where(kind < 2, tl.load(row + $rows), 0)
    held_ = address(tl.load(row + $counts), tl.float32, 1)
    holds = unit < tl.where(tl.load(row + $counts) != 0, tl.load(row + $rows), 0)
    held = tl.load(held_ + unit, mask=holds, other=0.0).to(tl.float64)
    snr_ = snr + tl.load(row + $view)
    zero = tl.zeros([U], tl.float64)
$worked_out
    # Every thread reads what one of them writes.
    tl.debug_barrier()
    tl.store(held_ + unit, $held.to(tl.float32), mask=holds)
    a = tl.where(some, $a, 1.0)[:, None]
    shrunk = tl.where(some, $decay, decay.to(tl.float64))[:, None]
    many = tl.load(row + $columns)
    for j in range(0, many, W):
        cell = j + tl.arange(0, W)[None, :]
        mask = here[:, None] & (cell < many)
        rate = step
        if BY:
            b = tl.load(row + $first) + unit[:, None] * tl.load(row + $by_row) + cell * tl.load(row + $by_column)
            rate = tl.load(rates + b, mask=mask, other=0.0)
        to = cells + 2 * (tl.load(row + $cell) + unit[:, None] * many + cell)
        tl.store(to, (a * rate).to(tl.float32), mask=mask)
        tl.store(to + 1, (shrunk + cell * 0.0).to(tl.float32), mask=mask)
"""

SQUARES = f"""
@triton.jit(do_not_specialize=$args)
def squares(jobs, chunks, grads, partial, $aligned, BLOCK: tl.constexpr):
    # The sum of g*g over a chunk, to where the chunk says.
    chunk = chunks + 3 * tl.program_id(0)
    row = jobs + tl.load(chunk).to(tl.int64) * $width
    k = tl.load(chunk + 1)
    g_ = address(tl.load(grads + tl.load(row + $view)) + tl.load(row + $from_gradient), $gradient, ALIGN)
{_RECTANGLE.rstrip()}
    sums = tl.zeros([BLOCK], tl.float64)
    for r in range(r0, tl.minimum(r0 + per, tl.load(row + $rows))):
        at = tl.multiple_of(r * pitch + c0, G)
        for c in range(0, n, BLOCK):
            i = c + tl.arange(0, BLOCK)
            x = tl.load(g_ + at + i, mask=i < n, other=0.0).to(tl.float64)
            sums += x * x
    tl.store(partial + tl.load(chunk + 2), tl.sum(sums))
"""

GUARD = """
@triton.jit(do_not_specialize=$args)
def guard(total, most, clip_, ok_, taken, skipped, CLIPS: tl.constexpr, SKIPS: tl.constexpr):
    # What the sum of all squares means for a step: the factor on gradients, and whether it is taken.
    squares = tl.load(total)
    if CLIPS:
        factor = tl.load(most) / (tl.sqrt(squares) + 1e-6)
        tl.store(clip_, tl.where(factor > 1.0, 1.0, factor))
    if SKIPS:
        ok = squares < float("inf")  # NaN is not
        tl.store(ok_, ok.to(tl.uint8))
        tl.store(taken, ok.to(tl.float32))
        tl.store(skipped, tl.load(skipped) + tl.where(ok, 0, 1))
"""

SCALARS = """
@triton.jit(do_not_specialize=$args)
def scalars_of_step(hyper, counts, scalars):
    # The scalars of a step, per segment: hyperparameters from the host, the number of the step from the device.
    row = hyper + tl.program_id(0) * $inputs
    t = tl.load(tl.load(counts + tl.program_id(0)).to(tl.pointer_type(tl.float32))).to(tl.float64)
$worked_out
    out = scalars + tl.program_id(0) * $outputs
$stores
"""
