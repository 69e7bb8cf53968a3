"""The engine of ``csrc/engine.h`` as one persistent Triton kernel.

A worker is a program. Programs claim items in list order from one ticket; every item waits only for
items with smaller tickets, so any number of programs ends. `date_kernels.triton_plan` makes the
tables; their columns and words are named below.

Note [Who sees what]. A program's scalar atomics and scalar stores are one thread's, its tiles are
all threads'. Before a release all threads meet at a barrier, so that what they wrote is part of it;
after an acquire they meet again, so that all read what was released.

Note [Two paths]. A leaf that is whole, of an aligned layer, loads and stores 16 bytes at a time; a
mask, whose bound no compiler can know, would make that single elements. So a leaf's text is
compiled twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

LEAF = tl.constexpr(4096)
"""Elements of one partial sum."""

TAIL = tl.constexpr(512)
"""Elements at a time of tails, of tiny and of misaligned layers."""

SUMS = tl.constexpr(1024)
"""Slots that are added up at a time."""

KEEP = tl.constexpr("")
STREAM = tl.constexpr("evict_first")
"""Cache hints: what UPDATE touches is not read again, and leaves room for what MEASURE read. (An
H100, LARS on ResNet-50: 253 us instead of 266; ``evict_last`` for MEASURE costs 10 to 30%.)"""

# Kinds of items (`date_kernels.items.Kind`).
PLAIN = tl.constexpr(0)
WHOLE = tl.constexpr(1)
MEASURE = tl.constexpr(2)
SCAN = tl.constexpr(3)
UPDATE = tl.constexpr(4)

# Columns of an item: first leaf, leaves, layer, kind.
ITEM = tl.constexpr(4)

# Columns of a layer. ROUNDED is a 16-bit parameter, WEIGHTS then its master copy, or 0.
LAYER = tl.constexpr(13)
WEIGHTS = tl.constexpr(0)
ROUNDED = tl.constexpr(1)
STATES = tl.constexpr(2)  # and two more
STEP = tl.constexpr(5)
SIZE = tl.constexpr(6)
SLOT = tl.constexpr(7)
MEASURES = tl.constexpr(8)
OPTIONS = tl.constexpr(9)
GRADIENT_TYPE = tl.constexpr(10)

# Words of what changes from step to step; numbers are float64 in the same words.
HEADER = tl.constexpr(8)
SCALE_ADDRESS = tl.constexpr(0)
FOUND_ADDRESS = tl.constexpr(1)
SCALE = tl.constexpr(2)
FOUND = tl.constexpr(3)
MAX_NORM = tl.constexpr(4)
SKIPS = tl.constexpr(5)
ONE = tl.constexpr(6)

COMMON_FIELDS = (
    "lr",
    "lr_address",
    "lr_double",
    "lr_decay",
    "lr_inside",
    "ratio_inside",
    "sign",
    "gradient_decay",
    "update_decay",
    "weights_decay",
    "of_update",
    "measured_decay",
    "coefficient",
    "lower",
    "upper",
    "trust_eps",
    "zero_norm",
    "added_decay",
    "weight_norm_lower",
    "weight_norm_upper",
    "clip_by_lr",
    "moving",
    "final",
    "gamma",
)
"""Numbers of a row of options, of which the rule's own follow; the address is an integer."""

COMMON = tl.constexpr(len(COMMON_FIELDS))
LR = tl.constexpr(COMMON_FIELDS.index("lr"))
LR_ADDRESS = tl.constexpr(COMMON_FIELDS.index("lr_address"))
LR_DOUBLE = tl.constexpr(COMMON_FIELDS.index("lr_double"))
LR_DECAY = tl.constexpr(COMMON_FIELDS.index("lr_decay"))
LR_INSIDE = tl.constexpr(COMMON_FIELDS.index("lr_inside"))
RATIO_INSIDE = tl.constexpr(COMMON_FIELDS.index("ratio_inside"))
SIGN = tl.constexpr(COMMON_FIELDS.index("sign"))
GRADIENT_DECAY = tl.constexpr(COMMON_FIELDS.index("gradient_decay"))
UPDATE_DECAY = tl.constexpr(COMMON_FIELDS.index("update_decay"))
WEIGHTS_DECAY = tl.constexpr(COMMON_FIELDS.index("weights_decay"))
OF_UPDATE = tl.constexpr(COMMON_FIELDS.index("of_update"))
MEASURED_DECAY = tl.constexpr(COMMON_FIELDS.index("measured_decay"))
COEFFICIENT = tl.constexpr(COMMON_FIELDS.index("coefficient"))
LOWER = tl.constexpr(COMMON_FIELDS.index("lower"))
UPPER = tl.constexpr(COMMON_FIELDS.index("upper"))
EPS = tl.constexpr(COMMON_FIELDS.index("trust_eps"))
ZERO_NORM = tl.constexpr(COMMON_FIELDS.index("zero_norm"))
ADDED_DECAY = tl.constexpr(COMMON_FIELDS.index("added_decay"))
WEIGHT_NORM_LOWER = tl.constexpr(COMMON_FIELDS.index("weight_norm_lower"))
WEIGHT_NORM_UPPER = tl.constexpr(COMMON_FIELDS.index("weight_norm_upper"))
CLIP_BY_LR = tl.constexpr(COMMON_FIELDS.index("clip_by_lr"))
MOVING = tl.constexpr(COMMON_FIELDS.index("moving"))
FINAL = tl.constexpr(COMMON_FIELDS.index("final"))
GAMMA = tl.constexpr(COMMON_FIELDS.index("gamma"))

# Words of the clock, each on a cache line of its own.
LINE = tl.constexpr(32)
TICKET = tl.constexpr(0)
LEFT = tl.constexpr(1)
SCANNED = tl.constexpr(2)
JUDGED = tl.constexpr(3)
EPOCH = tl.constexpr(4)
CLOCK = tl.constexpr(5)

# Numbers of the verdict.
TOTAL_NORM = tl.constexpr(0)
CLIP = tl.constexpr(1)
STOP = tl.constexpr(2)

# Numbers of a report, in the order of ``csrc/plan.h``.
REPORT = tl.constexpr(6)
WEIGHT_NORM = tl.constexpr(0)
MEASURED_NORM = tl.constexpr(1)
RAW_RATIO = tl.constexpr(2)
RATIO = tl.constexpr(3)
CLAMP = tl.constexpr(4)
SKIPPED = tl.constexpr(5)

LARGEST = tl.constexpr(1.7976931348623157e308)


@triton.jit
def arrive(counter, of):
    """Whether this program is the last of `of`: Note [Who sees what]."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") + 1 == of
    tl.debug_barrier()
    return last


@triton.jit
def publish(flag, epoch):
    """Let others go on that wait for this epoch."""
    tl.debug_barrier()
    tl.atomic_xchg(flag, epoch, sem="release")


@triton.jit
def wait_for(flag, epoch):
    """Wait until the flag holds the epoch: by plain reads, and then one atomic to acquire."""
    while tl.load(flag, volatile=True) != epoch:
        pass
    tl.atomic_add(flag, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def load(
    address, at, n, TYPE: tl.constexpr, EVICT: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr
):
    """A block from element `at` on. The hint must follow the cast to be believed."""
    pointer = address.to(tl.pointer_type(TYPE)) + at
    lanes = tl.arange(0, BLOCK)
    if FULL:
        return tl.load(tl.multiple_of(pointer, 16) + lanes, eviction_policy=EVICT)
    else:
        return tl.load(pointer + lanes, mask=lanes < n, other=0, eviction_policy=EVICT)


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """To the nearest, ties to even.

    For bfloat16 in integers, as ``csrc/convert.h``: Triton's interpreter would truncate.
    """
    if TYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where(x != x, 0x7FC0, nearest)
        return nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(TYPE)


@triton.jit
def store(
    address,
    at,
    n,
    x,
    TYPE: tl.constexpr,
    EVICT: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    """Round x into a block's elements."""
    pointer = address.to(tl.pointer_type(TYPE)) + at
    lanes = tl.arange(0, BLOCK)
    if FULL:
        tl.store(tl.multiple_of(pointer, 16) + lanes, rounded(x, TYPE), eviction_policy=EVICT)
    else:
        tl.store(pointer + lanes, rounded(x, TYPE), mask=lanes < n, eviction_policy=EVICT)


@triton.jit
def load_weights(
    layer,
    at,
    n,
    W: tl.constexpr,
    T: tl.constexpr,
    EVICT: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    """The weights in the arithmetic's type: of the master copy where there is one."""
    weights = tl.load(layer + WEIGHTS)
    if W == T:
        w = load(weights, at, n, T, EVICT, BLOCK, FULL)
    else:
        if weights != 0:
            w = load(weights, at, n, T, EVICT, BLOCK, FULL)
        else:
            w = load(tl.load(layer + ROUNDED), at, n, W, EVICT, BLOCK, FULL).to(T)
    return w


@triton.jit
def store_weights(
    layer, at, n, w, W: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr
):
    """The new weights, and their rounding where the parameter has 16 bits."""
    weights = tl.load(layer + WEIGHTS)
    if W == T:
        store(weights, at, n, w, T, STREAM, BLOCK, FULL)
    else:
        if weights != 0:
            store(weights, at, n, w, T, STREAM, BLOCK, FULL)
        store(tl.load(layer + ROUNDED), at, n, w, W, STREAM, BLOCK, FULL)


@triton.jit
def load_state(
    entry,
    at,
    n,
    USED: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    EVICT: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    """A state's block; zeros where no layer, or not this one, uses it."""
    s = tl.zeros([BLOCK], T)
    if USED:
        address = tl.load(entry)
        if address != 0:
            s = load(address, at, n, S, EVICT, BLOCK, FULL).to(T)
    return s


@triton.jit
def store_state(
    entry,
    at,
    n,
    s,
    USED: tl.constexpr,
    S: tl.constexpr,
    EVICT: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    """A state's block, where the layer uses it."""
    if USED:
        address = tl.load(entry)
        if address != 0:
            store(address, at, n, s, S, EVICT, BLOCK, FULL)


@triton.jit
def load_states(
    layer,
    at,
    n,
    USES: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    EVICT: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    """All three; `USES` has a bit for each that any layer uses."""
    s0 = load_state(layer + STATES, at, n, USES & 1 != 0, S, T, EVICT, BLOCK, FULL)
    s1 = load_state(layer + STATES + 1, at, n, USES & 2 != 0, S, T, EVICT, BLOCK, FULL)
    s2 = load_state(layer + STATES + 2, at, n, USES & 4 != 0, S, T, EVICT, BLOCK, FULL)
    return s0, s1, s2


@triton.jit
def store_states(
    layer,
    at,
    n,
    s0,
    s1,
    s2,
    USES: tl.constexpr,
    S: tl.constexpr,
    EVICT: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    """All three, as `load_states`."""
    store_state(layer + STATES, at, n, s0, USES & 1 != 0, S, EVICT, BLOCK, FULL)
    store_state(layer + STATES + 1, at, n, s1, USES & 2 != 0, S, EVICT, BLOCK, FULL)
    store_state(layer + STATES + 2, at, n, s2, USES & 4 != 0, S, EVICT, BLOCK, FULL)


@triton.jit
def squares(x, n, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Partial sums of squares of neighbours, which one thread holds.

    In float64, where the square of a float32 is exact and cannot overflow.
    """
    x = x.to(tl.float64)
    x = x * x
    if not FULL:
        x = tl.where(tl.arange(0, BLOCK) < n, x, 0.0)
    return tl.sum(x)


@triton.jit
def decayed(x, decay, w):
    """Return x + decay*w; without decay the weights stay out of it: 0 * inf would be NaN."""
    return tl.where(decay == 0, x, x + decay * w)


@triton.jit
def number_at(address, value):
    """What a float32 tensor on this device holds, or where there is none the value."""
    x = tl.load(value)
    tensor = tl.load(address)
    if tensor != 0:
        x = tl.load(tensor.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return x


@triton.jit
def clamp(x, lower, upper):
    """Selections, which keep a NaN where min and max would not."""
    return tl.where(x < lower, lower, tl.where(x > upper, upper, x))


@triton.jit
def step_of(layer):
    """The layer's step, 1-based; 1 where it counts none."""
    k = tl.full((), 1, tl.int32)
    counter = tl.load(layer + STEP)
    if counter != 0:
        k += tl.load(counter.to(tl.pointer_type(tl.float32))).to(tl.int32)
    return k


@triton.jit
def rate_of(row, k):
    """The learning rate of step k: a number of the row, or what a tensor on this device holds."""
    rate = tl.load(row + LR)
    address = tl.load(row + LR_ADDRESS).to(tl.int64, bitcast=True)
    if address != 0:
        if tl.load(row + LR_DOUBLE) != 0:
            rate = tl.load(address.to(tl.pointer_type(tl.float64)))
        else:
            rate = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return rate / (1 + (k - 1) * tl.load(row + LR_DECAY))


@triton.jit
def place(ratio, rate, row, T: tl.constexpr):
    """Where rate and ratio go: what scales the buffer's input, and what the direction."""
    rate_inside = tl.load(row + LR_INSIDE) != 0
    ratio_inside = tl.load(row + RATIO_INSIDE) != 0
    inside = tl.where(rate_inside, rate, 1.0) * tl.where(ratio_inside, ratio, 1.0)
    outside = tl.where(rate_inside, 1.0, rate) * tl.where(ratio_inside, 1.0, ratio)
    return inside.to(T), outside.to(T)


@triton.jit
def conclude_layer(report, weight, measured, row, k, skips):
    """The bounded trust ratio from two sums of squares (``csrc/trust_ratio.h``).

    A norm that is not finite gives NaN, decided before clamping; a zero norm takes `zero_norm`.
    """
    w = tl.sqrt(weight)
    x = tl.sqrt(measured)
    denominator = x + tl.load(row + ADDED_DECAY) * w
    lower = tl.load(row + LOWER)
    upper = tl.load(row + UPPER)
    if tl.load(row + MOVING) != 0:
        final = tl.load(row + FINAL)
        gamma = tl.load(row + GAMMA)
        lower = final * (1 - 1 / (gamma * k + 1))
        upper = final * (1 + 1 / (gamma * k))
    finite = w + denominator <= LARGEST
    phi = clamp(w, tl.load(row + WEIGHT_NORM_LOWER), tl.load(row + WEIGHT_NORM_UPPER))
    raw = tl.load(row + COEFFICIENT) * phi / (denominator + tl.load(row + EPS))
    if tl.load(row + CLIP_BY_LR) != 0:
        rate = rate_of(row, k)
        raw = tl.where(raw < rate, raw / rate, 1.0)
    raw = tl.where((w > 0) & (denominator > 0), raw, tl.load(row + ZERO_NORM))
    raw = tl.where(finite, raw, float("nan"))
    ratio = clamp(raw, lower, upper)
    tl.store(report + WEIGHT_NORM, w)
    tl.store(report + MEASURED_NORM, x)
    tl.store(report + RAW_RATIO, raw)
    tl.store(report + RATIO, ratio)
    tl.store(report + CLAMP, tl.where(raw < ratio, -1.0, tl.where(raw > ratio, 1.0, 0.0)))
    tl.store(report + SKIPPED, (skips & (finite == 0)).to(tl.float64))


@triton.jit
def add_up(slots, n):
    """The sums of n slots, in an order that knows nothing of items: (weights, measured)."""
    lanes = tl.arange(0, SUMS)
    weight = tl.zeros([SUMS], tl.float64)
    measured = tl.zeros([SUMS], tl.float64)
    at = n * 0
    while at < n:
        slot = slots + 2 * (at + lanes)
        weight += tl.load(slot, mask=at + lanes < n, other=0)
        measured += tl.load(slot + 1, mask=at + lanes < n, other=0)
        at += SUMS
    return tl.sum(weight), tl.sum(measured)


@triton.jit
def judge(verdict, slots, n_slots, max_norm, skips):
    """One clip factor and one decision from the sums of all SCANs."""
    _, measured = add_up(slots, n_slots)
    norm = tl.sqrt(measured)
    # A norm that is NaN stays NaN and one that is infinite gives 0, as in torch's clip_grad_norm_.
    clip = tl.where((max_norm < norm) | (norm != norm), max_norm / norm, 1.0)
    clip = tl.where(max_norm == float("inf"), 1.0, clip)
    tl.store(verdict + TOTAL_NORM, norm)
    tl.store(verdict + CLIP, clip)
    tl.store(verdict + STOP, (skips & ((norm <= LARGEST) == 0)).to(tl.float64))


@triton.jit
def scan_leaf(gradient, at, size, scale, G: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """A leaf's sum of squares of the unscaled gradient."""
    T: tl.constexpr = tl.float64 if G == tl.float64 else tl.float32
    sums = tl.full((), 0, tl.float64)
    end = tl.minimum(at + LEAF, size)
    while at < end:
        n = tl.minimum(size - at, BLOCK).to(tl.int32)
        g = load(gradient, at, n, G, KEEP, BLOCK, FULL).to(T)
        sums += squares(scale.to(T) * g, n, BLOCK, FULL)
        at += BLOCK
    return sums


@triton.jit
def scan(gradient, at, size, scale, G: tl.constexpr, TILE: tl.constexpr):
    """A leaf: Note [Two paths]."""
    if ((gradient & 15) == 0) & (at + LEAF <= size):
        total = scan_leaf(gradient, at, size, scale, G, TILE, True)
    else:
        total = scan_leaf(gradient, at, size, scale, G, TAIL, False)
    return total


@triton.jit
def scan_any(gradient, at, size, scale, code, TILE: tl.constexpr):
    """A leaf of any type: `code` counts as ``csrc/plan.h`` does."""
    if code == 0:
        total = scan(gradient, at, size, scale, tl.float32, TILE)
    elif code == 1:
        total = scan(gradient, at, size, scale, tl.float64, TILE)
    elif code == 2:
        total = scan(gradient, at, size, scale, tl.bfloat16, TILE)
    else:
        total = scan(gradient, at, size, scale, tl.float16, TILE)
    return total


@triton.jit
def measure_leaf(
    layer,
    gradient,
    row,
    at,
    size,
    scale,
    of_rule,
    early,
    DIRECTION: tl.constexpr,
    USES: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    """A leaf's two sums of squares; `early`: the states of an update are committed on the way."""
    weight = tl.full((), 0, tl.float64)
    measured = tl.full((), 0, tl.float64)
    end = tl.minimum(at + LEAF, size)
    while at < end:
        n = tl.minimum(size - at, BLOCK).to(tl.int32)
        w = load_weights(layer, at, n, W, T, KEEP, BLOCK, FULL)
        g = scale * load(gradient, at, n, G, KEEP, BLOCK, FULL).to(T)
        if tl.load(row + OF_UPDATE) != 0:
            s0, s1, s2 = load_states(layer, at, n, USES, S, T, KEEP, BLOCK, FULL)
            d = decayed(g, tl.load(row + GRADIENT_DECAY).to(T), w)
            x, s0, s1, s2 = DIRECTION(d, s0, s1, s2, tl.full((), 1, T), of_rule)
            x = decayed(x, tl.load(row + UPDATE_DECAY).to(T), w)
            if early:
                store_states(layer, at, n, s0, s1, s2, USES, S, KEEP, BLOCK, FULL)
        else:
            x = decayed(g, tl.load(row + MEASURED_DECAY).to(T), w)
        weight += squares(w, n, BLOCK, FULL)
        measured += squares(x, n, BLOCK, FULL)
        at += BLOCK
    return weight, measured


@triton.jit
def update_leaf(
    layer,
    gradient,
    row,
    at,
    size,
    scale,
    of_rule,
    inside,
    outside,
    kept,
    committed,
    DIRECTION: tl.constexpr,
    CONCLUDE: tl.constexpr,
    USES: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    """Advance a leaf's weights and, unless they were committed, its states."""
    end = tl.minimum(at + LEAF, size)
    while at < end:
        n = tl.minimum(size - at, BLOCK).to(tl.int32)
        w = load_weights(layer, at, n, W, T, STREAM, BLOCK, FULL)
        s0, s1, s2 = load_states(layer, at, n, USES, S, T, STREAM, BLOCK, FULL)
        if committed:
            u = CONCLUDE(s0, s1, s2, of_rule)
        else:
            g = scale * load(gradient, at, n, G, STREAM, BLOCK, FULL).to(T)
            d = decayed(g, tl.load(row + GRADIENT_DECAY).to(T), w)
            u, s0, s1, s2 = DIRECTION(d, s0, s1, s2, inside, of_rule)
            store_states(layer, at, n, s0, s1, s2, USES, S, STREAM, BLOCK, FULL)
        u = decayed(u, inside * tl.load(row + UPDATE_DECAY).to(T), w)
        store_weights(layer, at, n, kept * w - outside * u, W, T, BLOCK, FULL)
        at += BLOCK


@triton.jit
def bounds_of(item, layers):
    """An item's layer, and the elements it covers: (id, layer, begin, end, size)."""
    id = tl.load(item + 2)
    layer = layers + LAYER * id.to(tl.int64)
    size = tl.load(layer + SIZE)
    begin = tl.load(item).to(tl.int64) * LEAF
    end = tl.minimum(begin + tl.load(item + 1).to(tl.int64) * LEAF, size)
    return id, layer, begin, end, size


@triton.jit
def unscale_of(words, values, row):
    """What gradients are multiplied by: the inverse of their scale, negative to ascend."""
    return tl.load(row + SIGN) / number_at(words + SCALE_ADDRESS, values + SCALE)


@triton.jit
def full_end_of(layer, gradient, size):
    """Where a layer's last full leaf may begin: Note [Two paths]."""
    bits = tl.load(layer + WEIGHTS) | tl.load(layer + ROUNDED) | gradient
    bits |= tl.load(layer + STATES) | tl.load(layer + STATES + 1) | tl.load(layer + STATES + 2)
    return tl.where((bits & 15) == 0, size, 0) - LEAF


@triton.jit
def scan_item(
    item, layers, words, values, gradients, width, slots, G: tl.constexpr, TILE: tl.constexpr
):
    """Leave the sums of squares of an item's unscaled gradient in its slots."""
    id, layer, at, end, size = bounds_of(item, layers)
    gradient = tl.load(gradients + id)
    unscale = unscale_of(words, values, values + HEADER + width * tl.load(layer + OPTIONS))
    slot = slots + 2 * (tl.load(layer + SLOT) + at // LEAF)
    while at < end:
        if G is None:
            code = tl.load(layer + GRADIENT_TYPE)
            total = scan_any(gradient, at, size, unscale, code, TILE)
        else:
            total = scan(gradient, at, size, unscale, G, TILE)
        tl.store(slot, 0.0)
        tl.store(slot + 1, total)
        slot += 2
        at += LEAF


@triton.jit
def measure_item(
    item,
    layers,
    words,
    values,
    gradients,
    width,
    slots,
    clip,
    PREPARE: tl.constexpr,
    DIRECTION: tl.constexpr,
    USES: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    TILE: tl.constexpr,
):
    """Leave an item's sums of squares in its slots."""
    id, layer, at, end, size = bounds_of(item, layers)
    gradient = tl.load(gradients + id)
    row = values + HEADER + width * tl.load(layer + OPTIONS)
    scale = (unscale_of(words, values, row) * tl.load(clip)).to(T)
    of_rule = PREPARE(row + COMMON, step_of(layer), T)
    early = of_rule[0] & (tl.load(words + SKIPS) == 0) & (S == T)
    full_end = full_end_of(layer, gradient, size)
    slot = slots + 2 * (tl.load(layer + SLOT) + at // LEAF)
    while at < end:
        if at <= full_end:
            weight, measured = measure_leaf(
                layer, gradient, row, at, size, scale, of_rule, early,
                DIRECTION, USES, W, G, S, T, TILE, True,
            )  # fmt: skip
        else:
            weight, measured = measure_leaf(
                layer, gradient, row, at, size, scale, of_rule, early,
                DIRECTION, USES, W, G, S, T, TAIL, False,
            )  # fmt: skip
        tl.store(slot, weight)
        tl.store(slot + 1, measured)
        slot += 2
        at += LEAF


@triton.jit
def conclude_item(item, layers, words, values, width, slots, reports):
    """Work out the ratio of an item's layer from the sums of all its leaves."""
    id, layer, _, _, size = bounds_of(item, layers)
    row = values + HEADER + width * tl.load(layer + OPTIONS)
    of_layer = slots + 2 * tl.load(layer + SLOT)
    weight, measured = add_up(of_layer, (size + LEAF - 1) // LEAF)
    report = reports + REPORT * id.to(tl.int64)
    conclude_layer(report, weight, measured, row, step_of(layer), tl.load(words + SKIPS) != 0)


@triton.jit
def update_item(
    item,
    layers,
    words,
    values,
    gradients,
    width,
    reports,
    clip,
    measured,
    PREPARE: tl.constexpr,
    DIRECTION: tl.constexpr,
    CONCLUDE: tl.constexpr,
    USES: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    TILE: tl.constexpr,
):
    """Advance an item's elements by their layer's ratio, which is 1 unless it was `measured`."""
    id, layer, at, end, size = bounds_of(item, layers)
    report = reports + REPORT * id.to(tl.int64)
    ratio = tl.full((), 1, tl.float64)
    if measured:
        ratio = tl.load(report + RATIO)
        if tl.load(report + SKIPPED) != 0:
            at = end
    gradient = tl.load(gradients + id)
    row = values + HEADER + width * tl.load(layer + OPTIONS)
    scale = (unscale_of(words, values, row) * tl.load(clip)).to(T)
    k = step_of(layer)
    rate = rate_of(row, k)
    inside, outside = place(ratio, rate, row, T)
    kept = (1 - rate * tl.load(row + WEIGHTS_DECAY)).to(T)
    of_rule = PREPARE(row + COMMON, k, T)
    early = of_rule[0] & (tl.load(words + SKIPS) == 0) & (S == T)
    committed = measured & early & (tl.load(row + OF_UPDATE) != 0)
    full_end = full_end_of(layer, gradient, size)
    while at < end:
        if at <= full_end:
            update_leaf(
                layer, gradient, row, at, size, scale, of_rule, inside, outside, kept, committed,
                DIRECTION, CONCLUDE, USES, W, G, S, T, TILE, True,
            )  # fmt: skip
        else:
            update_leaf(
                layer, gradient, row, at, size, scale, of_rule, inside, outside, kept, committed,
                DIRECTION, CONCLUDE, USES, W, G, S, T, TAIL, False,
            )  # fmt: skip
        at += LEAF


@triton.jit(
    do_not_specialize=["n_items", "n_scans", "judged", "first", "n_layers", "n_slots", "width"]
)
def layerwise_step(
    items,
    n_items,
    n_scans,
    judged,
    layers,
    first,
    n_layers,
    words,
    values,
    gradients,
    width,
    slots,
    n_slots,
    reports,
    verdict,
    arrived,
    published,
    clock,
    PREPARE: tl.constexpr,
    DIRECTION: tl.constexpr,
    CONCLUDE: tl.constexpr,
    USES: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    TILE: tl.constexpr,
):
    """One step of the layers whose parameters hold `W`, gradients `G` and states `S`.

    Without `G` it scans gradients of all dtypes, and no more; `judged` is 1 in the launches behind
    such a one, whose verdict stands. Each part of an item's visit reads again what it needs of the
    tables, which are in the cache: registers are scarcer.
    """
    epoch = tl.load(clock + EPOCH * LINE) + 1  # stable: only the last program to leave writes it
    stopped = number_at(words + FOUND_ADDRESS, values + FOUND) != 0
    clip = values + ONE
    known = n_scans == 0
    if judged != 0:
        stopped = stopped | (tl.load(verdict + STOP) != 0)
        clip = verdict + CLIP

    ticket = n_items
    if stopped == 0:
        ticket = tl.atomic_add(clock + TICKET * LINE, 1, sem="relaxed")
    while ticket < n_items:
        item = items + ITEM * ticket.to(tl.int64)
        kind = tl.load(item + 3)
        if kind == SCAN:
            scan_item(item, layers, words, values, gradients, width, slots, G, TILE)
            if arrive(clock + SCANNED * LINE, n_scans):
                skips = tl.load(words + SKIPS) != 0
                judge(verdict, slots, n_slots, tl.load(values + MAX_NORM), skips)
                tl.store(clock + SCANNED * LINE, 0)
                publish(clock + JUDGED * LINE, epoch)
        elif known == 0:
            wait_for(clock + JUDGED * LINE, epoch)
            stopped = tl.load(verdict + STOP) != 0
            clip = verdict + CLIP
            known = judged == 0

        if G is not None:
            if ((kind == MEASURE) | (kind == WHOLE)) & (stopped == 0):
                measure_item(
                    item, layers, words, values, gradients, width, slots, clip,
                    PREPARE, DIRECTION, USES, W, G, S, T, TILE,
                )  # fmt: skip
                last = kind == WHOLE
                id = tl.load(item + 2)
                if kind == MEASURE:
                    measures = tl.load(layers + LAYER * id.to(tl.int64) + MEASURES).to(tl.int32)
                    last = arrive(arrived + id, measures)
                if last:
                    tl.debug_barrier()
                    conclude_item(item, layers, words, values, width, slots, reports)
                    if kind == MEASURE:
                        tl.store(arrived + id, 0)
                        publish(published + id, epoch)
            if ((kind == PLAIN) | (kind == WHOLE) | (kind == UPDATE)) & (stopped == 0):
                if kind == UPDATE:
                    wait_for(published + tl.load(item + 2), epoch)
                tl.debug_barrier()
                update_item(
                    item, layers, words, values, gradients, width, reports, clip, kind != PLAIN,
                    PREPARE, DIRECTION, CONCLUDE, USES, W, G, S, T, TILE,
                )  # fmt: skip

        ticket = n_items
        if stopped == 0:
            ticket = tl.atomic_add(clock + TICKET * LINE, 1, sem="relaxed")

    # A counter of its own, not the last ticket: it orders every program's reads before the writes
    # below.
    if arrive(clock + LEFT * LINE, tl.num_programs(0)):
        found = number_at(words + FOUND_ADDRESS, values + FOUND) != 0
        if (judged == 0) & ((n_scans == 0) | found):
            tl.store(verdict + TOTAL_NORM, float("nan"))
            tl.store(verdict + CLIP, 1.0)
            tl.store(verdict + STOP, found.to(tl.float64))
            tl.debug_barrier()
        # Not `stopped`: a program that found no item left has not asked what was decided.
        if tl.load(verdict + STOP) == 0:
            advance_steps(layers, first, first + n_layers, reports)
        tl.store(clock + TICKET * LINE, 0)
        tl.store(clock + LEFT * LINE, 0)
        tl.store(clock + EPOCH * LINE, epoch)


@triton.jit
def advance_steps(layers, first, end, reports):
    """Count the step of each layer that took it, once all items have read the counts."""
    at = first
    while at < end:
        ids = at + tl.arange(0, SUMS)
        known = ids < end
        ids = ids.to(tl.int64)
        counter = tl.load(layers + LAYER * ids + STEP, mask=known, other=0)
        skipped = tl.load(reports + REPORT * ids + SKIPPED, mask=known, other=1.0)
        counted = known & (counter != 0) & (skipped == 0)
        pointer = counter.to(tl.pointer_type(tl.float32))
        tl.store(pointer, tl.load(pointer, mask=counted, other=0) + 1, mask=counted)
        at += SUMS
