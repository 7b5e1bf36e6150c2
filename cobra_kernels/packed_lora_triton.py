"""Triton kernels of `packed_lora`: a block of tokens has one adapter, and loops over that adapter's own rank.

    shrink   h = x A_aᵀ          expand   y += h B_aᵀ

    x (T, K)   lora_A (R, K)   lora_B (N, R)   y (T, N)   blocks (n, 1 + BLOCK_M)   h (planes, n BLOCK_M, r_max) fp32

A row of `blocks` is an adapter and its tokens, -1 where there are fewer than BLOCK_M. Where blocks alone leave the device idle,
K is cut into planes, which expand sums in a fixed order. Each element of h and y has one writer: same inputs, same bits.
Sums are fp32; for half-precision operands h is rounded to their dtype before the second product, as torch does.
The kernels use only builtins of `tl`, so that a copy of this module can be interpreted beside one that is compiled.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _shrink_kernel(
    x_ptr,
    a_ptr,
    h_ptr,
    blocks_ptr,
    first_rank_ptr,
    K,
    plane_size,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    stride_hp,
    stride_hm,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (blocks, rank tiles, planes): BLOCK_M tokens × BLOCK_R ranks, summed over the plane's part of K."""
    block = tl.program_id(0).to(tl.int64)
    plane = tl.program_id(2).to(tl.int64)
    tokens_ptr = blocks_ptr + block * (1 + BLOCK_M)
    adapter = tl.load(tokens_ptr)
    first = tl.load(first_rank_ptr + adapter)
    r = tl.load(first_rank_ptr + adapter + 1) - first
    rank_start = tl.program_id(1) * BLOCK_R
    if rank_start < r:
        offs_m = tl.arange(0, BLOCK_M)
        tokens = tl.load(tokens_ptr + 1 + offs_m)
        mask_m = tokens >= 0
        offs_r = rank_start + tl.arange(0, BLOCK_R)
        mask_r = offs_r < r
        x_ptrs = x_ptr + tokens[:, None] * stride_xm
        a_ptrs = a_ptr + (first + offs_r)[None, :] * stride_ar
        acc = tl.full((BLOCK_M, BLOCK_R), 0.0, tl.float32)
        for k in range(plane * plane_size, tl.minimum(K, (plane + 1) * plane_size), BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < K
            x = tl.load(x_ptrs + offs_k[None, :] * stride_xk, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            a = tl.load(a_ptrs + offs_k[:, None] * stride_ak, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
            acc = tl.dot(x, a, acc, input_precision="ieee")
        h_ptrs = h_ptr + plane * stride_hp + (block * BLOCK_M + offs_m)[:, None] * stride_hm + offs_r[None, :]
        tl.store(h_ptrs, acc, mask=mask_m[:, None] & mask_r[None, :])


@triton.jit
def _expand_kernel(
    h_ptr,
    b_ptr,
    y_ptr,
    blocks_ptr,
    first_rank_ptr,
    N,
    planes,
    stride_hp,
    stride_hm,
    stride_bn,
    stride_br,
    stride_ym,
    stride_yn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Grid (blocks, column tiles): BLOCK_M tokens × BLOCK_N columns of y, summed over the adapter's rank."""
    block = tl.program_id(0).to(tl.int64)
    tokens_ptr = blocks_ptr + block * (1 + BLOCK_M)
    adapter = tl.load(tokens_ptr)
    first = tl.load(first_rank_ptr + adapter)
    r = tl.load(first_rank_ptr + adapter + 1) - first
    if r > 0:
        offs_m = tl.arange(0, BLOCK_M)
        tokens = tl.load(tokens_ptr + 1 + offs_m)
        mask_m = tokens >= 0
        offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        h_ptrs = h_ptr + (block * BLOCK_M + offs_m)[:, None] * stride_hm
        b_ptrs = b_ptr + first * stride_br + offs_n[None, :] * stride_bn
        acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
        for rank_start in range(0, r, BLOCK_R):
            offs_r = rank_start + tl.arange(0, BLOCK_R)
            mask_r = offs_r < r
            mask_h = mask_m[:, None] & mask_r[None, :]
            h = tl.load(h_ptrs + offs_r[None, :], mask=mask_h, other=0.0)
            for plane in range(1, planes):
                h += tl.load(h_ptrs + plane * stride_hp + offs_r[None, :], mask=mask_h, other=0.0)
            b = tl.load(b_ptrs + offs_r[:, None] * stride_br, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
            acc = tl.dot(h.to(b.dtype), b, acc, input_precision="ieee")
        y_ptrs = y_ptr + tokens[:, None] * stride_ym + offs_n[None, :] * stride_yn
        mask_y = mask_m[:, None] & mask_n[None, :]
        y = tl.load(y_ptrs, mask=mask_y, other=0.0)
        tl.store(y_ptrs, (y.to(tl.float32) + acc).to(y.dtype), mask=mask_y)


@dataclass(frozen=True)
class ShrinkConfig:
    BLOCK_M: int
    BLOCK_R: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ExpandConfig:
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


def pick_shrink_config(block_m: int, r_max: int, wide: bool) -> ShrinkConfig:
    """block_m: 16 (decoding) or 64 (prompts); wide: half precision, with rows that are loaded 16 bytes at a time"""
    if not wide:  # what is not copied asynchronously passes through registers, and larger tiles spill
        return ShrinkConfig(block_m, BLOCK_R=16, BLOCK_K=32, num_warps=4, num_stages=2)
    return ShrinkConfig(block_m, BLOCK_R=16 if r_max <= 16 else 64, BLOCK_K=128, num_warps=4, num_stages=3)


def pick_expand_config(block_m: int, r_max: int, wide: bool) -> ExpandConfig:
    """Arguments as in `pick_shrink_config`."""
    if not wide:
        return ExpandConfig(block_m, BLOCK_N=64, BLOCK_R=16, num_warps=4 if block_m == 16 else 8, num_stages=1)
    return ExpandConfig(block_m, BLOCK_N=128, BLOCK_R=16 if r_max <= 16 else 32, num_warps=4, num_stages=2)


def pick_planes(programs: int, K: int) -> int:
    """Parts that shrink cuts K into: 8 where fewer programs than multiprocessors would each loop over a long K."""
    return 8 if programs <= 128 and K >= 2048 else 1


def launch(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, ranks: tuple[int, ...], blocks: Tensor) -> None:
    """Adds the updates to y; operands as in `packed_lora_`, blocks as in `Segments`."""
    (K, N), (count, width), r_max = (x.shape[1], y.shape[1]), blocks.shape, max(ranks, default=0)
    if not count or not r_max or not N:
        return
    shrink = pick_shrink_config(width - 1, r_max, _wide(x, lora_A))
    expand = pick_expand_config(width - 1, r_max, _wide(y, lora_B.t()))
    tiles = -(-r_max // shrink.BLOCK_R)
    planes = pick_planes(count * tiles, K)
    plane_size = -(-K // (planes * shrink.BLOCK_K)) * shrink.BLOCK_K
    h = torch.empty(planes, count * shrink.BLOCK_M, r_max, dtype=torch.float32, device=x.device)
    first_rank = _first_rank(ranks, x.device)
    with torch.cuda.device_of(x):
        _shrink_kernel[count, tiles, planes](
            x, lora_A, h, blocks, first_rank, K, plane_size, *x.stride(), *lora_A.stride(), *h.stride()[:2], **vars(shrink)
        )
        _expand_kernel[count, -(-N // expand.BLOCK_N)](
            h, lora_B, y, blocks, first_rank, N, planes, *h.stride()[:2], *lora_B.stride(), *y.stride(), **vars(expand)
        )


def _wide(*matrices: Tensor) -> bool:
    """Whether Triton sees that rows of half precision are dense and begin at multiples of 16 bytes."""
    return all(
        t.element_size() == 2 and t.stride(1) == 1 and t.stride(0) % 16 == t.shape[1] % 16 == t.data_ptr() % 16 == 0
        for t in matrices
    )


@lru_cache(maxsize=4096)
def _first_rank(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """(adapters + 1,) where each adapter's ranks begin; kept, because a copy to the device at every layer costs a launch."""
    return torch.tensor([0, *ranks], device="cpu").cumsum(0).to(device)
