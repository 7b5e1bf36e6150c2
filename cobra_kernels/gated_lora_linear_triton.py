"""Triton kernels of `gated_lora_linear`: the low-rank products ride on the frozen layer's own.

    fold      P = A[σ], F = s (z ∘ Bᵀ)[σ]  forward;  P = Bᵀ[σ], F = s (z ∘ A)[σ]  backward
    shrink    h = x Pᵀ                      g = dy Pᵀ
    base      y = x Wᵀ + h F + b            dx = dy W + g F
    tokens    S = hᵀ dy, and g in the same pass over dy;  S = gᵀ x
    rows      h = Σ planes;  with gates of each token h ∘ s z, and dz = s g ∘ h
    columns   dB = (s z ∘ S)ᵀ, dz from B ∘ Sᵀ;  dA = s z ∘ S
    dz        dz = s Σ_n B_nk S_kn, and for sampled gates da = dz z (1 - z) / temperature

    x (M, K)   W (N, K)   A (r, K)   B (N, r)   z (r,)   h, g (M, R)   P, F, S (R, ·)   source = σ (R,)   extent (2,)

fold puts the open gates' ranks first: rows 0 to extent[0] - 1, filled with zeros to a multiple of BLOCK_R, then the closed ones
to extent[1] - 1, which only dz needs. The loops over rank end at the extent, which the device alone knows; what is closed is
never read with what is open. z and s are in F, so that nothing of the size (M, R) is scaled, unless each token has its gates.
fold, columns and dz are in `gated_lora_small_triton`, the launchers in `gated_lora_launch`, their order in `gated_lora_fused`.

Sums are fp32. A sum cut into planes is added in a fixed order, and each element has one writer: same inputs, same bits.
Offsets within a tile are int32, those of tiles int64. No function of `tl` that is itself compiled is used, so that a copy of
this module can be interpreted beside one that is compiled.
"""

import triton
import triton.language as tl


@triton.jit
def _shrink_kernel(
    x_ptr,
    p_ptr,
    z_ptr,
    h_ptr,
    source_ptr,
    extent_ptr,
    M,
    K,
    R,
    plane_size,
    stride_xm,
    stride_xk,
    stride_zm,
    stride_zr,
    stride_hp,
    SKIPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Grid (token tiles × rank tiles, planes): h[m, r] = Σ_k x[m, k] p[r, k] over the plane's part of K.

    SKIPS: where no gate z[m, source[r]] of a tile is open, h is 0 and x is not read
    """
    rank_tiles = R // BLOCK_R
    rank_start = tl.program_id(0) % rank_tiles * BLOCK_R
    if rank_start < tl.load(extent_ptr + 1):
        first = (tl.program_id(0) // rank_tiles).to(tl.int64) * BLOCK_M
        plane = tl.program_id(1).to(tl.int64)
        offs_m = tl.arange(0, BLOCK_M)
        offs_r = rank_start + tl.arange(0, BLOCK_R)
        offs_k = tl.arange(0, BLOCK_K)
        mask_m = offs_m < M - first
        start = plane * plane_size
        end = tl.minimum(K, start + plane_size)
        if SKIPS:
            source = tl.load(source_ptr + offs_r)
            z_ptrs = z_ptr + first * stride_zm + offs_m[:, None] * stride_zm + source[None, :] * stride_zr
            z = tl.load(z_ptrs, mask=mask_m[:, None] & (source >= 0)[None, :], other=0.0)
            opened = tl.reduce(tl.reduce((z != 0).to(tl.int32), 1, tl.standard._sum_combine), 0, tl.standard._sum_combine)
            end = tl.where(opened > 0, end, start)
        x_ptrs = x_ptr + first * stride_xm + start * stride_xk + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
        p_ptrs = p_ptr + start + offs_r[None, :].to(tl.int64) * K + offs_k[:, None]
        acc = tl.full((BLOCK_M, BLOCK_R), 0.0, tl.float32)
        for k in range(start, end, BLOCK_K):
            mask_k = offs_k < K - k
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            p = tl.load(p_ptrs, mask=mask_k[:, None], other=0.0)
            acc = tl.dot(x, p, acc, input_precision="ieee")
            x_ptrs += BLOCK_K * stride_xk
            p_ptrs += BLOCK_K
        h_ptrs = h_ptr + plane * stride_hp + first * R + offs_m[:, None] * R + offs_r[None, :]
        tl.store(h_ptrs, acc.to(h_ptr.dtype.element_ty), mask=mask_m[:, None])


@triton.jit
def _base_kernel(
    x_ptr,
    w_ptr,
    h_ptr,
    f_ptr,
    bias_ptr,
    y_ptr,
    extent_ptr,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid (tiles of y,): y[m, n] = Σ_r h[m, r] f[r, n] + Σ_k x[m, k] w[k, n] + bias[n], in one accumulator."""
    tiles_m, tiles_n = (M + BLOCK_M - 1) // BLOCK_M, (N + BLOCK_N - 1) // BLOCK_N
    # tiles of GROUP_M rows follow each other down a column, so that what they share stays in the L2 cache
    group = tl.program_id(0) // (GROUP_M * tiles_n)
    rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * tiles_n)
    first_m = (group * GROUP_M + within % rows).to(tl.int64) * BLOCK_M
    first_n = (within // rows).to(tl.int64) * BLOCK_N
    offs_m, offs_n, offs_k, offs_r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    mask_m, mask_n = offs_m < M - first_m, offs_n < N - first_n
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)

    h_ptrs = h_ptr + first_m * R + offs_m[:, None] * R + offs_r[None, :]
    f_ptrs = f_ptr + first_n + offs_r[:, None].to(tl.int64) * N + offs_n[None, :]
    for _ in range(0, tl.load(extent_ptr), BLOCK_R):
        h = tl.load(h_ptrs, mask=mask_m[:, None], other=0.0)
        f = tl.load(f_ptrs, mask=mask_n[None, :], other=0.0)
        acc = tl.dot(h, f, acc, input_precision="ieee")
        h_ptrs += BLOCK_R
        f_ptrs += BLOCK_R * N

    x_ptrs = x_ptr + first_m * stride_xm + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = w_ptr + first_n * stride_wn + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk

    if HAS_BIAS:
        acc += tl.load(bias_ptr + first_n + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + first_m * N + first_n + offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _tokens_kernel(
    x_ptr,
    h_ptr,
    p_ptr,
    sums_ptr,
    g_ptr,
    extent_ptr,
    M,
    N,
    R,
    plane_size,
    stride_xm,
    stride_xn,
    stride_gp,
    CLOSED: tl.constexpr,
    WITH_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Grid (column tiles × rank tiles, planes): S[r, n] = Σ_m h[m, r] x[m, n] over the plane's tokens.

    CLOSED: the closed ranks' sums too
    WITH_G: each tile of x gives its part of g[m, r] = Σ_n x[m, n] p[r, n] too, in a plane for each column tile
    """
    rank_tiles = R // BLOCK_R
    rank_start = tl.program_id(0) % rank_tiles * BLOCK_R
    if rank_start < tl.load(extent_ptr + CLOSED):
        tile = (tl.program_id(0) // rank_tiles).to(tl.int64)
        first_n = tile * BLOCK_N
        plane = tl.program_id(1).to(tl.int64)
        offs_m, offs_n, offs_r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), rank_start + tl.arange(0, BLOCK_R)
        mask_n = offs_n < N - first_n
        start = plane * plane_size
        end = tl.minimum(M, start + plane_size)
        x_ptrs = x_ptr + start * stride_xm + first_n * stride_xn + offs_m[:, None] * stride_xm + offs_n[None, :] * stride_xn
        h_ptrs = h_ptr + start * R + offs_m[:, None] * R + offs_r[None, :]
        if WITH_G:
            p_ptrs = p_ptr + first_n + offs_r[None, :].to(tl.int64) * N + offs_n[:, None]
            p = tl.load(p_ptrs, mask=mask_n[:, None], other=0.0)
            g_ptrs = g_ptr + tile * stride_gp + start * R + offs_m[:, None] * R + offs_r[None, :]
        acc = tl.full((BLOCK_R, BLOCK_N), 0.0, tl.float32)
        for m in range(start, end, BLOCK_M):
            mask_m = offs_m < end - m
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
            h = tl.load(h_ptrs, mask=mask_m[:, None], other=0.0)
            acc = tl.dot(tl.trans(h), x, acc, input_precision="ieee")
            if WITH_G:
                tl.store(g_ptrs, tl.dot(x, p, input_precision="ieee"), mask=mask_m[:, None])
                g_ptrs += BLOCK_M * R
            x_ptrs += BLOCK_M * stride_xm
            h_ptrs += BLOCK_M * R
        sums_ptrs = sums_ptr + (plane * R + offs_r[:, None]) * N + first_n + offs_n[None, :]
        tl.store(sums_ptrs, acc, mask=mask_n[None, :])


@triton.jit
def _rows_kernel(
    planes_ptr,
    z_ptr,
    h_ptr,
    out_ptr,
    gated_ptr,
    dz_ptr,
    source_ptr,
    extent_ptr,
    M,
    R,
    r,
    planes,
    scaling,
    stride_pp,
    stride_zm,
    stride_zr,
    GATED: tl.constexpr,
    WITH_DZ: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Grid (token tiles × rank tiles,): out = Σ planes (M, R);  GATED: s z ∘ out too;  WITH_DZ: dz = s h ∘ out (M, r) too."""
    rank_tiles = R // BLOCK_R
    rank_start = tl.program_id(0) % rank_tiles * BLOCK_R
    if rank_start < tl.load(extent_ptr + 1):
        first = (tl.program_id(0) // rank_tiles).to(tl.int64) * BLOCK_M
        offs_m, offs_r = tl.arange(0, BLOCK_M), rank_start + tl.arange(0, BLOCK_R)
        mask_m = (offs_m < M - first)[:, None]
        offsets = first * R + offs_m[:, None] * R + offs_r[None, :]
        total = tl.full((BLOCK_M, BLOCK_R), 0.0, tl.float32)
        plane_ptrs = planes_ptr + offsets
        for _ in range(0, planes):
            total += tl.load(plane_ptrs, mask=mask_m, other=0.0)
            plane_ptrs += stride_pp
        tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=mask_m)
        if GATED:
            source = tl.load(source_ptr + offs_r)
            mask_z = mask_m & (source >= 0)[None, :]
            at = first * stride_zm + offs_m[:, None] * stride_zm + source[None, :] * stride_zr
            z = tl.load(z_ptr + at, mask=mask_z, other=0.0).to(tl.float32)
            gated = tl.where(z != 0, z * scaling * total, 0.0)
            tl.store(gated_ptr + offsets, gated.to(gated_ptr.dtype.element_ty), mask=mask_m)
            if WITH_DZ:
                h = tl.load(h_ptr + offsets, mask=mask_m, other=0.0).to(tl.float32)
                dz_ptrs = dz_ptr + first * r + offs_m[:, None] * r + source[None, :]
                tl.store(dz_ptrs, (scaling * h * total).to(dz_ptr.dtype.element_ty), mask=mask_z)
