"""Triton kernels of `ghost_grad_norm`: tiles of a product that is squared and summed where it is made, never stored.

    gram     Σ over tile pairs i ≥ j of  ⟨X_i X_jᵀ, G_i G_jᵀ⟩, those off the diagonal twice
    direct   Σ over tiles of G_nᵀ X_k of their squares

Products of half precision run on the tensor cores, those of fp32 are not rounded to TF32; sums are fp32. Programs write one
number each to a small buffer, which torch adds in a fixed order: no atomics, the same bits.
The kernels use only builtins of `tl`, so that a copy of this module can be interpreted beside one that is compiled.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gram_tile(ptr, offs_i, offs_j, T, D, stride_t, stride_d, BLOCK_D: tl.constexpr):
    """Products of tokens i with tokens j of one example, over D features."""
    mask_i = offs_i < T
    mask_j = offs_j < T
    rows = ptr + offs_i.to(tl.int64)[:, None] * stride_t
    columns = ptr + offs_j.to(tl.int64)[None, :] * stride_t
    acc = tl.full((offs_i.shape[0], offs_j.shape[0]), 0.0, tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        left = tl.load(rows + offs_d[None, :] * stride_d, mask=mask_i[:, None] & mask_d[None, :], other=0.0)
        right = tl.load(columns + offs_d[:, None] * stride_d, mask=mask_d[:, None] & mask_j[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    return acc


@triton.jit
def _gram_kernel(
    x_ptr,
    dy_ptr,
    partial_ptr,
    T,
    K,
    N,
    stride_xb,
    stride_xt,
    stride_xk,
    stride_yb,
    stride_yt,
    stride_yn,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (2 half + 1, half, examples): every tile pair i ≥ j of 2 half tiles, folded into a rectangle."""
    a = tl.program_id(0)
    half = tl.num_programs(1)
    b = tl.program_id(1)
    i = tl.where(a > b, a - 1, half + b)
    j = tl.where(a > b, b, half + a)
    example = tl.program_id(2).to(tl.int64)
    offs_i = i * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_j = j * BLOCK_T + tl.arange(0, BLOCK_T)
    has_tokens = i * BLOCK_T < T  # an odd number of tiles leaves some pairs without
    xx = _gram_tile(x_ptr + example * stride_xb, offs_i, offs_j, T, tl.where(has_tokens, K, 0), stride_xt, stride_xk, BLOCK_D)
    yy = _gram_tile(dy_ptr + example * stride_yb, offs_i, offs_j, T, tl.where(has_tokens, N, 0), stride_yt, stride_yn, BLOCK_D)
    total = tl.reduce(tl.reduce(xx * yy, 1, tl.standard._sum_combine), 0, tl.standard._sum_combine) * tl.where(i == j, 1.0, 2.0)
    place = (example * half + b) * tl.num_programs(0) + a
    tl.store(partial_ptr + place, total)


@triton.jit
def _direct_kernel(
    x_ptr,
    dy_ptr,
    partial_ptr,
    T,
    K,
    N,
    stride_xb,
    stride_xt,
    stride_xk,
    stride_yb,
    stride_yt,
    stride_yn,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (N tiles, K tiles, examples): the sum of squares of a tile of dyᵀ x, BLOCK_D tokens at a time."""
    example = tl.program_id(2).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    mask_k = offs_k < K
    y_ptrs = dy_ptr + example * stride_yb + offs_n.to(tl.int64)[:, None] * stride_yn
    x_ptrs = x_ptr + example * stride_xb + offs_k.to(tl.int64)[None, :] * stride_xk
    acc = tl.full((BLOCK_N, BLOCK_K), 0.0, tl.float32)
    for t in range(0, T, BLOCK_D):
        offs_t = (t + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask_t = offs_t < T
        y = tl.load(y_ptrs + offs_t[None, :] * stride_yt, mask=mask_n[:, None] & mask_t[None, :], other=0.0)
        x = tl.load(x_ptrs + offs_t[:, None] * stride_xt, mask=mask_t[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(y, x, acc, input_precision="ieee")
    place = (example * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial_ptr + place, tl.reduce(tl.reduce(acc * acc, 1, tl.standard._sum_combine), 0, tl.standard._sum_combine))


@dataclass(frozen=True)
class GramConfig:
    BLOCK_T: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class DirectConfig:
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


def pick_gram_config(T: int, wide: bool) -> GramConfig:
    """wide: half precision, with rows that are loaded 16 bytes at a time"""
    block_t = 16 if T <= 16 else 32 if T <= 32 or not wide else 64
    return GramConfig(block_t, BLOCK_D=64 if wide else 32, num_warps=4, num_stages=2)


def pick_direct_config(wide: bool) -> DirectConfig:
    """wide: as in `pick_gram_config`"""
    if not wide:
        return DirectConfig(BLOCK_N=32, BLOCK_K=64, BLOCK_D=32, num_warps=4, num_stages=2)
    return DirectConfig(BLOCK_N=128, BLOCK_K=128, BLOCK_D=32, num_warps=8, num_stages=2)


def prefers_gram(T: int, K: int, N: int, wide: bool) -> bool:
    """Whether the Gram form, of which half is symmetric, needs fewer products than the direct one, tiles filled up."""
    gram, direct = pick_gram_config(T, wide), pick_direct_config(wide)
    tiles = -(-T // gram.BLOCK_T)
    products = tiles * (tiles + 1) // 2 * gram.BLOCK_T**2 * (K + N)
    return products <= _filled(T, direct.BLOCK_D) * _filled(N, direct.BLOCK_N) * _filled(K, direct.BLOCK_K)


def _filled(size: int, block: int) -> int:
    return -(-size // block) * block


def launch(x: Tensor, dy: Tensor) -> Tensor:
    """x (B, T, K), dy (B, T, N) of one dtype -> (B,) fp32"""
    (B, T, K), N = x.shape, dy.shape[2]
    if not x.numel() or not N:
        return torch.zeros(B, dtype=torch.float32, device=x.device)
    wide = _wide(x, dy)
    if prefers_gram(T, K, N, wide):
        config, kernel = pick_gram_config(T, wide), _gram_kernel
        half = -(-T // (2 * config.BLOCK_T))
        grid = 2 * half + 1, half, B
    else:
        config, kernel = pick_direct_config(wide), _direct_kernel
        grid = -(-N // config.BLOCK_N), -(-K // config.BLOCK_K), B
    partial = torch.empty(B, grid[0] * grid[1], dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        kernel[grid](x, dy, partial, T, K, N, *x.stride(), *dy.stride(), **vars(config))
    return partial.sum(1).clamp_min_(0)


def _wide(*tensors: Tensor) -> bool:
    """Whether Triton sees that rows of half precision are dense and begin at multiples of 16 bytes."""
    return all(
        t.element_size() == 2
        and t.stride(2) == 1
        and all(size % 16 == 0 for size in (t.stride(0), t.stride(1), t.shape[2], t.data_ptr()))
        for t in tensors
    )
