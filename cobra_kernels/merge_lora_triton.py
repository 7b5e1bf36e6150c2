"""The Triton kernel of a grouped merge: all weights of one dtype in one launch, a tile of one weight for each program.

    W' = round(W + L R)        and, of each tile, Σ (L R)²   Σ W²   Σ ((W' - W) - L R)²

Sites are described by addresses and strides in one table, csrc/merge_site.h; a tile finds its site by the first tile of each.
Each 256 ranks are summed by themselves, as rounding errors grow with the length of a sum. Squares of a row of a tile are summed
in fp32, those of rows and tiles in fp64, in a fixed order: same inputs, same bits. Interpreted, and compiled for sm_80
and sm_90; never run on a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from cobra_kernels.merge_lora_cuda import FIELDS, to_device

DTYPES = (tl.float32, tl.bfloat16, tl.float16)  # by their code


@triton.jit
def _merge_kernel(
    sites_ptr,
    first_tile_ptr,
    sums_ptr,
    count,
    steps,
    DTYPE: tl.constexpr,
    IS_FLOAT32: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (tiles,): BLOCK_M × BLOCK_N of a weight; `steps` halvings of `count` sites leave one."""
    tile = tl.program_id(0).to(tl.int64)
    first, last = count * 0, count - 1
    for _ in range(steps):
        middle = (first + last) // 2
        past = tl.load(first_tile_ptr + middle + 1) <= tile
        first = tl.where(past, middle + 1, first)
        last = tl.where(past, last, middle)
    site_ptr = sites_ptr + first.to(tl.int64) * 14
    weight_ptr = tl.load(site_ptr).to(tl.pointer_type(DTYPE))
    out_ptr = tl.load(site_ptr + 1).to(tl.pointer_type(DTYPE))
    left_ptr = tl.load(site_ptr + 2).to(tl.pointer_type(tl.float32))
    right_ptr = tl.load(site_ptr + 3).to(tl.pointer_type(tl.float32))
    rows, columns, rank = tl.load(site_ptr + 4), tl.load(site_ptr + 5), tl.load(site_ptr + 6)
    stride_w, stride_o = tl.load(site_ptr + 7), tl.load(site_ptr + 8)
    stride_lm, stride_lr = tl.load(site_ptr + 9), tl.load(site_ptr + 10)
    stride_rr, stride_rn = tl.load(site_ptr + 11), tl.load(site_ptr + 12)
    if ALIGNED:
        weight_ptr, out_ptr = tl.multiple_of(weight_ptr, 16), tl.multiple_of(out_ptr, 16)
        stride_w, stride_o, columns = tl.multiple_of(stride_w, 16), tl.multiple_of(stride_o, 16), tl.multiple_of(columns, 16)

    within = (tile - tl.load(first_tile_ptr + first)).to(tl.int32)
    across = ((columns + BLOCK_N - 1) // BLOCK_N).to(tl.int32)
    row, column = (within // across * BLOCK_M).to(tl.int64), (within % across * BLOCK_N).to(tl.int64)
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < rows - row, offs_n < columns - column
    mask = mask_m[:, None] & mask_n[None, :]
    delta = tl.full((BLOCK_M, BLOCK_N), -0.0, tl.float32)  # -0 leaves numbers as they are, where the rank is 0
    left_ptrs = left_ptr + row * stride_lm + offs_m[:, None] * stride_lm.to(tl.int32)
    right_ptrs = right_ptr + column * stride_rn + offs_n[None, :] * stride_rn.to(tl.int32)
    for block in range(0, rank, 256):
        acc = tl.full((BLOCK_M, BLOCK_N), -0.0, tl.float32)
        for rank_index in range(block, tl.minimum(rank, block + 256)):  # noqa: B007, one type for a name
            left = tl.load(left_ptrs, mask=mask_m[:, None], other=0.0)
            right = tl.load(right_ptrs, mask=mask_n[None, :], other=0.0)
            acc += left * right
            left_ptrs += stride_lr
            right_ptrs += stride_rr
        delta += acc

    weight_ptrs = weight_ptr + row * stride_w + column + (offs_m[:, None] * stride_w.to(tl.int32) + offs_n[None, :])
    out_ptrs = out_ptr + row * stride_o + column + (offs_m[:, None] * stride_o.to(tl.int32) + offs_n[None, :])
    before = tl.load(weight_ptrs, mask=mask, other=0.0).to(tl.float32)
    merged = (before + delta).to(DTYPE)
    tl.store(out_ptrs, merged, mask=mask)
    if sums_ptr is not None:
        after = merged.to(tl.float32)
        added = after - before
        lost = added - delta
        if IS_FLOAT32:  # Knuth's two-sum: exact
            lost += after - added - before
        for s in tl.static_range(3):
            value = tl.where(mask, delta if s == 0 else before if s == 1 else lost, 0.0)
            squares = tl.reduce(value * value, 1, tl.standard._sum_combine).to(tl.float64)
            tl.store(sums_ptr + tile * 3 + s, tl.reduce(squares, 0, tl.standard._sum_combine))


@triton.jit
def _sums_kernel(tile_sums_ptr, first_tile_ptr, sums_ptr, BLOCK: tl.constexpr):
    """Grid (sites, 3): a sum over the tiles of a site."""
    site, s = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(first_tile_ptr + site), tl.load(first_tile_ptr + site + 1)
    acc = tl.full((BLOCK,), 0.0, tl.float64)
    for start in range(first, last, BLOCK):
        tiles = start + tl.arange(0, BLOCK)
        acc += tl.load(tile_sums_ptr + tiles * 3 + s, mask=tiles < last, other=0.0)
    tl.store(sums_ptr + site * 3 + s, tl.reduce(acc, 0, tl.standard._sum_combine))


@dataclass(frozen=True)
class MergeConfig:
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


def pick_config() -> MergeConfig:
    return MergeConfig(BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=2)


def launch(fields: Sequence[int], shapes: Sequence[tuple[int, int]], device: torch.device, statistics: bool) -> Tensor | None:
    """Writes the merged weights, one launch for each dtype among them; arguments and result as in `merge_lora_cuda.launch`."""
    sums = torch.zeros(len(shapes), 3, dtype=torch.float64, device=device) if statistics else None
    sites = [tuple(fields[i : i + FIELDS]) for i in range(0, len(fields), FIELDS)]
    for code, dtype in enumerate(DTYPES):
        chosen = [i for i, (site, shape) in enumerate(zip(sites, shapes, strict=True)) if site[-1] == code and min(shape)]
        if chosen:
            part = _launch_dtype([sites[i] for i in chosen], [shapes[i] for i in chosen], dtype, device, statistics)
            if sums is not None:
                sums[to_device(chosen, device)] = part
    return sums


def _launch_dtype(
    sites: list[tuple[int, ...]], shapes: list[tuple[int, int]], dtype: tl.dtype, device: torch.device, statistics: bool
) -> Tensor | None:
    config = pick_config()
    tiles = [-(-rows // config.BLOCK_M) * -(-columns // config.BLOCK_N) for rows, columns in shapes]
    table, first_tile = to_device(sites, device), to_device([0, *accumulate(tiles)], device)
    tile_sums = torch.empty(sum(tiles), 3, dtype=torch.float64, device=device) if statistics else None
    sums = torch.empty(len(sites), 3, dtype=torch.float64, device=device) if statistics else None
    aligned = all(value % 16 == 0 for site in sites for value in (*site[:2], *site[5:6], *site[7:9]))
    with torch.cuda.device_of(table):
        halvings = len(sites).bit_length()
        _merge_kernel[(sum(tiles),)](
            table, first_tile, tile_sums, len(sites), halvings, dtype, dtype == tl.float32, aligned, **vars(config)
        )
        if statistics:
            _sums_kernel[len(sites), 3](tile_sums, first_tile, sums, BLOCK=256)
    return sums
