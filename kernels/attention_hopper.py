"""Flash attention, forward, for sm_90: one producer and two consumer warpgroups (Gluon).

The structure is that of Shah et al. 2024, FlashAttention-3, arXiv:2407.08608, sec. 3: the producer fills
rings of keys and values by TMA; each consumer holds 64 queries, issues S = Q Kᵀ of the next block, then
P V of this one, and computes the exponentials of the next block while P V runs (sec. 3.2); the two take
turns, so that one's exponentials run beside the other's products (sec. 3.1).  P stays in registers.

Key blocks go from the last to the first: those that the causal rule or the end of the keys cuts are all at
the start, and only they are masked.  Programs stay for several tiles; tiles are ordered so that the heads
which run together have keys and values that fit the L2 cache, long tiles before short ones, and every
second round is dealt in reverse, which pairs long with short.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

_LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def tile_of(round_, work, ROWS: gl.constexpr, CAUSAL: gl.constexpr):
    """(batch, head, block of rows) of this program's tile in a round; the head is -1 behind the last tile."""
    batch, heads, _, s_q, _, _, section = work
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    if CAUSAL and round_ % 2 == 1:
        place = programs - 1 - place
    tile = round_ * programs + place
    blocks = gl.cdiv(s_q, ROWS)
    first = tile // (section * blocks) * section
    width = gl.maximum(gl.minimum(section, batch * heads - first), 1)
    inner = tile % (section * blocks)
    head = first + inner % width
    block = blocks - 1 - inner // width
    if tile >= batch * heads * blocks:
        head = -1
    return head // heads, head, block


@gluon.jit
def key_blocks(block, work, BLOCK_N: gl.constexpr, ROWS: gl.constexpr, CAUSAL: gl.constexpr):
    """How many blocks of keys a tile of rows sees; at least one, which is masked."""
    _, _, _, s_q, s_k, diagonal, _ = work
    end = s_k
    if CAUSAL:
        end = gl.minimum(end, gl.maximum(gl.minimum((block + 1) * ROWS, s_q) + diagonal, 0))
    return gl.maximum(gl.cdiv(end, BLOCK_N), 1)


@gluon.jit
def next_slot(slot, phase, STAGES: gl.constexpr):
    """The ring's next slot, and the parity of its barriers."""
    slot += 1
    if slot == STAGES:
        slot = 0
        phase = phase ^ 1
    return slot, phase


@gluon.jit
def _producer(q, k, v, shared, bars, work, STAGES: gl.constexpr, CAUSAL: gl.constexpr):
    q_s, k_s, v_s, _ = shared
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _ = bars
    batch, heads, group, s_q, _, _, _ = work
    HALF: gl.constexpr = q.block_shape[2]
    BLOCK_N: gl.constexpr = k.block_shape[2]
    ROWS: gl.constexpr = 2 * HALF
    slot, phase = 0, 1
    rounds = gl.cdiv(batch * heads * gl.cdiv(s_q, ROWS), gl.num_programs(0))
    for i in range(rounds):
        b, head, block = tile_of(i, work, ROWS, CAUSAL)
        if head >= 0:
            h = head % heads
            for c in gl.static_range(2):
                mbarrier.wait(q_empty.index(c), (i & 1) ^ 1)
                mbarrier.expect(q_full.index(c), q.nbytes_per_cta)
                row = block * ROWS + c * HALF
                tma.async_load(q, [b, h, row, 0], q_full.index(c), q_s.index(c))
            count = key_blocks(block, work, BLOCK_N, ROWS, CAUSAL)
            for j in range(count):
                row = (count - 1 - j) * BLOCK_N
                mbarrier.wait(k_empty.index(slot), phase)
                mbarrier.expect(k_full.index(slot), k.nbytes_per_cta)
                tma.async_load(k, [b, h // group, row, 0], k_full.index(slot), k_s.index(slot))
                mbarrier.wait(v_empty.index(slot), phase)
                mbarrier.expect(v_full.index(slot), v.nbytes_per_cta)
                tma.async_load(v, [b, h // group, row, 0], v_full.index(slot), v_s.index(slot))
                slot, phase = next_slot(slot, phase, STAGES)


@gluon.jit
def _softmax(s, top, total, scale, rows, cols, work, EDGE: gl.constexpr, CAUSAL: gl.constexpr):
    """(p, top, total, shrink) after a block of raw scores, the online softmax in base 2."""
    _, _, _, _, s_k, diagonal, _ = work
    if EDGE:
        s = gl.where((cols < s_k)[None, :], s, float("-inf"))
        if CAUSAL:
            s = gl.where(cols[None, :] <= rows[:, None] + diagonal, s, float("-inf"))
    above = gl.maximum(top, gl.max(s, axis=1) * scale)
    shift = above
    if EDGE:
        shift = gl.where(above == float("-inf"), 0.0, above)  # no key seen yet
    p = gl.exp2(s * scale - shift[:, None])
    shrink = gl.exp2(top - shift)
    return p, above, total * shrink + gl.sum(p, axis=1), shrink


@gluon.jit
def _step(
    acc, p, top, total, q, shared, bars, slot, phase, turn, scale, rows, first_col, work,
    CONSUMER: gl.constexpr, STAGES: gl.constexpr, EDGE: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """P V of the block whose P is given, in registers, and the scores and exponentials of the next one."""
    _, k_s, v_s, _ = shared
    _, _, k_full, k_empty, v_full, v_empty, turns = bars
    ROWS: gl.constexpr = q.shape[0]
    BLOCK_N: gl.constexpr = k_s.shape[3]
    S: gl.constexpr = top.type.layout.parent
    before, before_phase = slot, phase
    slot, phase = next_slot(slot, phase, STAGES)
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=S)
    mbarrier.wait(k_full.index(slot), phase)
    mbarrier.wait(turns.index(CONSUMER), turn)
    keys = k_s.index(slot).reshape([BLOCK_N, k_s.shape[4]])
    s = warpgroup_mma(q, keys.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), before_phase)
    values = v_s.index(before).reshape([BLOCK_N, v_s.shape[4]])
    added = warpgroup_mma(p, values, acc, is_async=True)
    mbarrier.arrive(turns.index(1 - CONSUMER), count=1)
    s = warpgroup_mma_wait(num_outstanding=1, deps=(s,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    cols = first_col + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S))
    prob, top, total, shrink = _softmax(s, top, total, scale, rows, cols, work, EDGE, CAUSAL)
    # This wait is over before it begins.  It begins a basic block, above which ptxas cannot move the wait
    # for P V; it would move it before the exponentials, and the two would not overlap.
    mbarrier.wait(v_full.index(before), before_phase)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(added,))
    mbarrier.arrive(v_empty.index(before), count=1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    p = gl.convert_layout(prob.to(v_s.dtype), gl.DotOperandLayout(0, acc.type.layout, 2))
    return acc, p, top, total, slot, phase, turn ^ 1


@gluon.jit
def _attend(
    acc, q, shared, bars, slot, phase, turn, scale, first_row, count, work,
    CONSUMER: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """(acc, top, total) of 64 queries over `count` blocks of keys, and where the ring stands then."""
    _, k_s, v_s, _ = shared
    _, q_empty, k_full, k_empty, v_full, v_empty, _ = bars
    s_k, diagonal = work[4], work[5]
    HALF: gl.constexpr = q.shape[0]
    BLOCK_N: gl.constexpr = k_s.shape[3]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    rows = first_row + gl.arange(0, HALF, layout=gl.SliceLayout(1, S))
    whole = s_k // BLOCK_N  # blocks that every row sees all of
    if CAUSAL:
        whole = gl.minimum(whole, gl.maximum(first_row + diagonal + 1, 0) // BLOCK_N)
    whole = gl.minimum(whole, count - 1)

    slot, phase = next_slot(slot, phase, STAGES)
    mbarrier.wait(k_full.index(slot), phase)
    keys = k_s.index(slot).reshape([BLOCK_N, k_s.shape[4]])
    zero = gl.zeros([HALF, BLOCK_N], gl.float32, layout=S)
    s = warpgroup_mma(q, keys.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(num_outstanding=0, deps=(s,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    top = gl.full([HALF], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S))
    total = gl.zeros([HALF], gl.float32, layout=gl.SliceLayout(1, S))
    cols = (count - 1) * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S))
    prob, top, total, _shrink = _softmax(s, top, total, scale, rows, cols, work, True, CAUSAL)
    p = gl.convert_layout(prob.to(v_s.dtype), gl.DotOperandLayout(0, acc.type.layout, 2))
    for j in range(count - 1 - whole):
        acc, p, top, total, slot, phase, turn = _step(
            acc, p, top, total, q, shared, bars, slot, phase, turn, scale, rows, (count - 2 - j) * BLOCK_N,
            work, CONSUMER, STAGES, True, CAUSAL,
        )  # fmt: skip
    for j in range(whole):
        acc, p, top, total, slot, phase, turn = _step(
            acc, p, top, total, q, shared, bars, slot, phase, turn, scale, rows, (whole - 1 - j) * BLOCK_N,
            work, CONSUMER, STAGES, False, CAUSAL,
        )  # fmt: skip
    mbarrier.arrive(q_empty.index(CONSUMER), count=1)
    mbarrier.wait(v_full.index(slot), phase)
    values = v_s.index(slot).reshape([BLOCK_N, v_s.shape[4]])
    added = warpgroup_mma(p, values, acc, is_async=True)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(added,))
    mbarrier.arrive(v_empty.index(slot), count=1)
    return acc, top, total, slot, phase, turn


@gluon.jit
def _consumer(
    o, lse, shared, bars, work, scale,
    CONSUMER: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    q_s, k_s, v_s, o_s = shared
    batch, heads, s_q = work[0], work[1], work[3]
    HALF: gl.constexpr = q_s.shape[3]
    ROWS: gl.constexpr = 2 * HALF
    DIM_V: gl.constexpr = v_s.shape[4]
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM_V, 16])
    q = q_s.index(CONSUMER).reshape([HALF, q_s.shape[4]])
    slot, phase, turn = STAGES - 1, 1, 1 - CONSUMER
    rounds = gl.cdiv(batch * heads * gl.cdiv(s_q, ROWS), gl.num_programs(0))
    for i in range(rounds):
        b, head, block = tile_of(i, work, ROWS, CAUSAL)
        if head >= 0:
            first_row = block * ROWS + CONSUMER * HALF
            count = key_blocks(block, work, k_s.shape[3], ROWS, CAUSAL)
            acc = gl.zeros([HALF, DIM_V], gl.float32, layout=OUT)
            mbarrier.wait(bars[0].index(CONSUMER), i & 1)
            acc, top, total, slot, phase, turn = _attend(
                acc, q, shared, bars, slot, phase, turn, scale, first_row, count, work,
                CONSUMER, STAGES, CAUSAL,
            )  # fmt: skip
            rows = first_row + gl.arange(0, HALF, layout=top.type.layout)
            natural = gl.where(total == 0.0, float("-inf"), (top + gl.log2(total)) * _LN2)
            gl.store(lse + gl.cast(head, gl.int64) * s_q + rows, natural, mask=rows < s_q)
            share = gl.where(total == 0.0, 0.0, 1.0 / total)
            acc = acc * gl.convert_layout(share, gl.SliceLayout(1, OUT))[:, None]
            tma.store_wait(pendings=0)  # of the tile before
            out = o_s.index(CONSUMER)
            out.reshape([HALF, DIM_V]).store(acc.to(o.dtype))
            fence_async_shared()
            tma.async_store(o, [b, head % heads, first_row, 0], out)
    tma.store_wait(pendings=0)


@gluon.jit
def hopper_forward_kernel(
    q, k, v, o, lse, batch, heads, group, s_q, s_k, diagonal, section, scale,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """q, o: descriptors of (B, H, S, D) with boxes of 64 rows; k, v: of BLOCK_N rows; lse (B, H, S_q).

    A row i sees the keys up to i + diagonal, with CAUSAL; section: heads that run together; scale times
    log2(e).
    """
    HALF: gl.constexpr = q.block_shape[2]
    BLOCK_N: gl.constexpr = k.block_shape[2]
    q_s = gl.allocate_shared_memory(q.dtype, [2, 1, 1, HALF, q.block_shape[3]], q.layout)
    k_s = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BLOCK_N, k.block_shape[3]], k.layout)
    v_s = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BLOCK_N, v.block_shape[3]], v.layout)
    o_s = gl.allocate_shared_memory(o.dtype, [2, 1, 1, HALF, o.block_shape[3]], o.layout)
    q_full = mbarrier.allocate_mbarrier(batch=2)
    q_empty = mbarrier.allocate_mbarrier(batch=2)
    k_full = mbarrier.allocate_mbarrier(batch=STAGES)
    k_empty = mbarrier.allocate_mbarrier(batch=STAGES)
    v_full = mbarrier.allocate_mbarrier(batch=STAGES)
    v_empty = mbarrier.allocate_mbarrier(batch=STAGES)
    turns = mbarrier.allocate_mbarrier(batch=2)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
        mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    shared = (q_s, k_s, v_s, o_s)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turns)
    work = (batch, heads, group, s_q, s_k, diagonal, section)
    gl.warp_specialize(
        [
            (_consumer, (o, lse, shared, bars, work, scale, 0, STAGES, CAUSAL)),
            (_consumer, (o, lse, shared, bars, work, scale, 1, STAGES, CAUSAL)),
            (_producer, (q, k, v, shared, bars, work, STAGES, CAUSAL)),
        ],
        [4, 1],
        [240, 24],
    )
