"""Triton kernels of `gated_lora_linear` on what is small, gates and matrices of rank r: fold, columns and dz.

The equations are in `gated_lora_linear_triton`. Gates are read, or sampled where they are used, with the words of `philox` and
the noise and sample of `sample_gates`.
"""

import triton
import triton.language as tl

from cobra_kernels.gates_math_triton import philox


@triton.jit
def _concrete(logits, ranks, draw_ptr, temperature):
    """z of gates `ranks`: the noise of `gate_noise` and the sample of `concrete_gates`, fp64 rounded once."""
    zero = tl.full(ranks.shape, 0, tl.uint32)
    block = (ranks // 4).to(tl.uint32)
    key_0, key_1 = zero + tl.load(draw_ptr).to(tl.uint32), zero + tl.load(draw_ptr + 1).to(tl.uint32)
    step_0, step_1 = zero + tl.load(draw_ptr + 2).to(tl.uint32), zero + tl.load(draw_ptr + 3).to(tl.uint32)
    w0, w1, w2, w3 = philox(block, zero + tl.load(draw_ptr + 4).to(tl.uint32), step_0, step_1, key_0, key_1)
    word = tl.where(ranks % 4 < 2, tl.where(ranks % 4 == 0, w0, w1), tl.where(ranks % 4 == 2, w2, w3))
    u = ((word >> 8).to(tl.float64) + 0.5) * 5.9604644775390625e-08
    noise = (tl.log(u) - tl.log(1.0 - u)).to(tl.float32)
    score = (logits.to(tl.float64) + noise.to(tl.float64)) / temperature.to(tl.float64)
    return (1.0 / (1.0 + tl.exp(-score))).to(tl.float32)


@triton.jit
def _partition(gate_ptr, lanes, r, stride_gate, BLOCK_R: tl.constexpr, SCAN: tl.constexpr):
    """source of `lanes` with the open gates first, -1 between; the ends of the open and of the closed ones."""
    opened = 0
    for start in range(0, r, SCAN):
        k = start + tl.arange(0, SCAN)
        gate = tl.load(gate_ptr + k * stride_gate, mask=k < r, other=0.0)
        opened += tl.reduce((gate != 0).to(tl.int32), 0, tl.standard._sum_combine)
    open_end = (opened + BLOCK_R - 1) // BLOCK_R * BLOCK_R
    end = open_end + (r - opened + BLOCK_R - 1) // BLOCK_R * BLOCK_R
    source = tl.full(lanes.shape, -1, tl.int32)
    before = 0
    for start in range(0, r, SCAN):
        k = start + tl.arange(0, SCAN)
        gate = tl.load(gate_ptr + k * stride_gate, mask=k < r, other=0.0)
        is_open = (gate != 0).to(tl.int32)
        up_to = before + tl.associative_scan(is_open, 0, tl.standard._sum_combine)
        place = tl.where(is_open == 1, up_to - 1, open_end + k - up_to)
        here = (place[None, :] == lanes[:, None]) & (k < r)[None, :]
        found = tl.where(here, k[None, :], -1)
        source = tl.maximum(source, tl.reduce(found, 1, tl.standard._elementwise_max))
        before += tl.reduce(is_open, 0, tl.standard._sum_combine)
    return source, open_end, end


@triton.jit
def _pack(
    small_ptr, out_ptr, source, lanes, factor, tile, width, stride_rank, stride_col, COLUMNS: tl.constexpr, FOLD: tl.constexpr
):
    """Rows `source` of a small operand, times their factor or as they are, into rows `lanes` of out (R, width)."""
    offs = tile.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = offs[None, :] < width
    ptrs = small_ptr + source[:, None].to(tl.int64) * stride_rank + offs[None, :] * stride_col
    values = tl.load(ptrs, mask=mask & (source >= 0)[:, None], other=0.0)
    if FOLD:
        values = values.to(tl.float32) * factor[:, None]
    out_ptrs = out_ptr + lanes[:, None].to(tl.int64) * width + offs[None, :]
    tl.store(out_ptrs, values.to(out_ptr.dtype.element_ty), mask=mask & (lanes >= 0)[:, None])


@triton.jit
def _fold_kernel(
    a_ptr,
    b_ptr,
    gate_ptr,
    temperature_ptr,
    draw_ptr,
    z_ptr,
    source_ptr,
    extent_ptr,
    packed_a_ptr,
    packed_b_ptr,
    r,
    K,
    N,
    scaling,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    stride_gate,
    GATES: tl.constexpr,
    KEEP_CLOSED: tl.constexpr,
    FOLD_A: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (R / ROWS, column tiles of A, then of Bᵀ): both small operands in the order of the gates, one times s z.

    GATES: "open" z = 1, "given" z is gate (r,), "sampled" gate holds logits, "known" z and source are a forward's
    """
    lanes = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    if GATES == "known":
        source = tl.load(source_ptr + lanes)
        z = tl.load(z_ptr + source, mask=source >= 0, other=0.0)
    else:
        if GATES == "given":
            source, open_end, end = _partition(gate_ptr, lanes, r, stride_gate, BLOCK_R, SCAN=128)
            z = tl.load(gate_ptr + source * stride_gate, mask=source >= 0, other=0.0).to(tl.float32)
        else:
            source = tl.where(lanes < r, lanes, -1)
            open_end = (r + BLOCK_R - 1) // BLOCK_R * BLOCK_R
            end = open_end
            if GATES == "sampled":
                logits = tl.load(gate_ptr + source * stride_gate, mask=source >= 0, other=0.0)
                temperature = tl.load(temperature_ptr)
                z = _concrete(logits, lanes, draw_ptr, temperature)
            else:
                z = tl.full((ROWS,), 1.0, tl.float32)
        if tile == 0:
            tl.store(source_ptr + lanes, source)
            tl.store(z_ptr + source, z, mask=source >= 0)
            if tl.program_id(0) == 0:
                tl.store(extent_ptr, open_end)
                tl.store(extent_ptr + 1, end if KEEP_CLOSED else open_end)
    factor = z * scaling
    tiles_of_a = (K + COLUMNS - 1) // COLUMNS
    if tile < tiles_of_a:
        _pack(a_ptr, packed_a_ptr, source, lanes, factor, tile, K, stride_ar, stride_ak, COLUMNS, FOLD_A)
    else:
        _pack(b_ptr, packed_b_ptr, source, lanes, factor, tile - tiles_of_a, N, stride_br, stride_bn, COLUMNS, not FOLD_A)


@triton.jit
def _columns_kernel(
    sums_ptr,
    small_ptr,
    z_ptr,
    source_ptr,
    extent_ptr,
    out_ptr,
    partial_ptr,
    N,
    R,
    planes,
    scaling,
    stride_sp,
    stride_small_r,
    stride_small_n,
    stride_or,
    stride_on,
    CLOSED: tl.constexpr,
    WITH_DZ: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (R / ROWS, column tiles): S = Σ planes, out[k, n] = s z_k S[k, n] at each gate's own k, 0 where it is closed.

    WITH_DZ: partial[tile, lane] = Σ_n small[k, n] S[k, n] too, over the tile's columns
    """
    lanes = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1).to(tl.int64)
    source = tl.load(source_ptr + lanes)
    z = tl.load(z_ptr + source, mask=source >= 0, other=0.0)
    offs_n = tile * COLUMNS + tl.arange(0, COLUMNS)
    mask = (source >= 0)[:, None] & (offs_n < N)[None, :]
    summed = mask & (lanes < tl.load(extent_ptr + CLOSED))[:, None]
    sums_ptrs = sums_ptr + lanes[:, None].to(tl.int64) * N + offs_n[None, :]
    total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for _ in range(0, planes):
        total += tl.load(sums_ptrs, mask=summed, other=0.0)
        sums_ptrs += stride_sp
    out = tl.where((z != 0)[:, None], total * (scaling * z)[:, None], 0.0)
    out_ptrs = out_ptr + source[:, None].to(tl.int64) * stride_or + offs_n[None, :] * stride_on
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)
    if WITH_DZ:
        small_ptrs = small_ptr + source[:, None].to(tl.int64) * stride_small_r + offs_n[None, :] * stride_small_n
        small = tl.load(small_ptrs, mask=summed, other=0.0).to(tl.float32)
        tl.store(partial_ptr + tile * R + lanes, tl.reduce(small * total, 1, tl.standard._sum_combine))


@triton.jit
def _dz_kernel(
    partial_ptr, z_ptr, temperature_ptr, source_ptr, dz_ptr, R, tiles, scaling, SAMPLED: tl.constexpr, ROWS: tl.constexpr
):
    """Grid (R / ROWS,): dz[k] = s Σ_tiles partial at each gate's own k;  SAMPLED: times dz/da of the concrete sample."""
    lanes = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source = tl.load(source_ptr + lanes)
    total = tl.full((ROWS,), 0.0, tl.float32)
    partial_ptrs = partial_ptr + lanes
    for _ in range(0, tiles):
        total += tl.load(partial_ptrs)
        partial_ptrs += R
    total *= scaling
    if SAMPLED:
        z = tl.load(z_ptr + source, mask=source >= 0, other=0.0)
        total = total * z * (1.0 - z) / tl.load(temperature_ptr)
    tl.store(dz_ptr + source, total.to(dz_ptr.dtype.element_ty), mask=source >= 0)
