"""Triton kernels of `conductance_reduce`: a program sums a block of one example's features over all points.

    pairs   rows of Q that are a multiple of e_b - e_a: the same a and b in all rows, or neighbours, one after another
    dense   any Q, whose products with h stay in registers

Each tensor is read once; h again for every further 32 rows of a dense Q. Sums are fp32. Programs write one number each to a
small buffer, which torch adds in a fixed order: no atomics, the same bits.
The kernels use only builtins of `tl`, so that a copy of this module can be interpreted beside one that is compiled.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _pairs_kernel(
    h_ptr,
    grad_ptr,
    scales_ptr,
    partial_ptr,
    rows,
    features,
    stride_hp,
    stride_hb,
    stride_hf,
    stride_gp,
    stride_gb,
    stride_gf,
    after_offset,
    NEIGHBOURS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Grid (feature blocks, examples): Σ_i scale_i ⟨grad_i, h_after - h_before⟩, h_ptr at the first `before`."""
    example = tl.program_id(1).to(tl.int64)
    offs = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = offs < features
    h_ptrs = h_ptr + example * stride_hb + offs * stride_hf
    grad_ptrs = grad_ptr + example * stride_gb + offs * stride_gf
    before = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)
    after = before
    if not NEIGHBOURS:
        after = tl.load(h_ptrs + after_offset, mask=mask, other=0.0).to(tl.float32)
    acc = tl.full((BLOCK_F,), 0.0, tl.float32)
    for i in range(rows):
        if NEIGHBOURS:
            h_ptrs += stride_hp
            after = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
        acc += tl.load(scales_ptr + i) * (after - before) * grad
        grad_ptrs += stride_gp
        if NEIGHBOURS:
            before = after
    tl.store(partial_ptr + example * tl.num_programs(0) + tl.program_id(0), tl.reduce(acc, 0, tl.standard._sum_combine))


@triton.jit
def _dense_kernel(
    h_ptr,
    grad_ptr,
    q_ptr,
    rows_ptr,
    columns_ptr,
    partial_ptr,
    rows,
    columns,
    features,
    stride_hp,
    stride_hb,
    stride_hf,
    stride_gp,
    stride_gb,
    stride_gf,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Grid (feature blocks, examples): Σ_ij q_ij ⟨grad of rows[i], h of columns[j]⟩, q (rows, columns) dense fp32."""
    example = tl.program_id(1).to(tl.int64)
    offs = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask_f = offs < features
    h_ptrs = h_ptr + example * stride_hb + offs[None, :] * stride_hf
    grad_ptrs = grad_ptr + example * stride_gb + offs[None, :] * stride_gf
    total = tl.full((BLOCK_F,), 0.0, tl.float32)
    for row in range(0, rows, BLOCK_I):
        offs_i = row + tl.arange(0, BLOCK_I)
        mask_i = offs_i < rows
        delta = tl.full((BLOCK_I, BLOCK_F), 0.0, tl.float32)
        for column in range(0, columns, BLOCK_J):
            offs_j = column + tl.arange(0, BLOCK_J)
            mask_j = offs_j < columns
            q_ptrs = q_ptr + offs_i[:, None] * columns + offs_j[None, :]
            q = tl.load(q_ptrs, mask=mask_i[:, None] & mask_j[None, :], other=0.0)
            point = tl.load(columns_ptr + offs_j, mask=mask_j, other=0)
            h = tl.load(h_ptrs + point[:, None] * stride_hp, mask=mask_j[:, None] & mask_f[None, :], other=0.0)
            delta = tl.dot(q, h.to(tl.float32), delta, input_precision="ieee")
        point = tl.load(rows_ptr + offs_i, mask=mask_i, other=0)
        grad = tl.load(grad_ptrs + point[:, None] * stride_gp, mask=mask_i[:, None] & mask_f[None, :], other=0.0)
        total += tl.reduce(delta * grad.to(tl.float32), 0, tl.standard._sum_combine)
    tl.store(partial_ptr + example * tl.num_programs(0) + tl.program_id(0), tl.reduce(total, 0, tl.standard._sum_combine))


@dataclass(frozen=True)
class PairsConfig:
    BLOCK_F: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class DenseConfig:
    BLOCK_I: int
    BLOCK_J: int
    BLOCK_F: int
    num_warps: int
    num_stages: int


def pick_pairs_config(examples: int, features: int) -> PairsConfig:
    """Small layers are cut finer, so that every multiprocessor has some."""
    if examples * features < 1 << 18:
        return PairsConfig(BLOCK_F=256, num_warps=2, num_stages=2)
    return PairsConfig(BLOCK_F=1024, num_warps=4, num_stages=2)


def pick_dense_config(rows: int, columns: int) -> DenseConfig:
    """Tiles that hold all points up to 32; h is read again for each further tile of rows."""
    points = 16 if max(rows, columns) <= 16 else 32
    return DenseConfig(BLOCK_I=points, BLOCK_J=points, BLOCK_F=64, num_warps=4, num_stages=1)


@dataclass(frozen=True)
class Pairs:
    """Row first_row + i of Q is scales[i] (e_after - e_before), both columns one further on each row for `neighbours`."""

    first_row: int
    before: int
    after: int
    scales: tuple[float, ...]
    neighbours: bool


Matrix = tuple[tuple[float, ...], ...]


@lru_cache(maxsize=64)
def pairs_of(q: Matrix) -> Pairs | None:
    """The form of Q where it has one: COBRA Eq. (1), and differences of neighbouring points."""
    used = [i for i, row in enumerate(q) if any(row)]
    if not used or used != list(range(used[0], used[-1] + 1)):
        return None
    found = []
    for i in used:
        entries = [(j, value) for j, value in enumerate(q[i]) if value]
        if len(entries) != 2 or entries[0][1] != -entries[1][1]:
            return None
        found.append((entries[0][0], entries[1][0], entries[1][1]))
    (before, after, _), scales = found[0], tuple(scale for *_, scale in found)
    if all((b, a) == (before, after) for b, a, _ in found):
        return Pairs(used[0], before, after, scales, neighbours=False)
    if all((b, a) == (before + i, before + i + 1) for i, (b, a, _) in enumerate(found)):
        return Pairs(used[0], before, after, scales, neighbours=True)
    return None


def launch(h: Tensor, grad: Tensor, q: Tensor) -> Tensor:
    """h (m, B, F), grad (n, B, F), q (n, m) -> (B,) fp32; waits for the device where q is on it"""
    matrix = tuple(map(tuple, q.tolist()))
    if not h.numel() or not any(map(any, matrix)):
        return torch.zeros(h.shape[1], dtype=torch.float32, device=h.device)
    pairs = pairs_of(matrix)
    with torch.cuda.device_of(h):
        partial = _sum_dense(h, grad, matrix) if pairs is None else _sum_pairs(h, grad, pairs)
        return partial.sum(1)


def _sum_pairs(h: Tensor, grad: Tensor, pairs: Pairs) -> Tensor:
    _, examples, features = h.shape
    config = pick_pairs_config(examples, features)
    blocks = -(-features // config.BLOCK_F)
    partial = torch.empty(examples, blocks, dtype=torch.float32, device=h.device)
    h, grad, step = h[pairs.before :], grad[pairs.first_row :], (pairs.after - pairs.before) * h.stride(0)
    scales = _on_device(pairs.scales, h.device)
    _pairs_kernel[blocks, examples](
        h, grad, scales, partial, len(scales), features, *h.stride(), *grad.stride(), step, pairs.neighbours, **vars(config)
    )
    return partial


def _sum_dense(h: Tensor, grad: Tensor, matrix: Matrix) -> Tensor:
    _, examples, features = h.shape
    q, rows, columns = _dense(matrix, h.device)
    config = pick_dense_config(len(rows), len(columns))
    blocks = -(-features // config.BLOCK_F)
    partial = torch.empty(examples, blocks, dtype=torch.float32, device=h.device)
    _dense_kernel[blocks, examples](
        h, grad, q, rows, columns, partial, *q.shape, features, *h.stride(), *grad.stride(), **vars(config)
    )
    return partial


@lru_cache(maxsize=64)
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


@lru_cache(maxsize=64)
def _dense(matrix: Matrix, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Q without its zero rows and columns, and where those that are left were; kept: every layer has the same."""
    q = torch.tensor(matrix, dtype=torch.float64, device="cpu")
    rows, columns = ((q != 0).any(axis).nonzero().flatten() for axis in (1, 0))
    return q[rows][:, columns].float().to(device).contiguous(), rows.to(device), columns.to(device)
