"""Tiles of the Triton kernels of `gated_lora_linear`: frozen, and picked from tables by pure functions of sizes.

"wide" operands are half precision with dense rows that load 16 bytes at a time; everything else takes the narrow tables, whose
smaller tiles keep fp32 and odd widths in registers. What is in the tables compiles for sm_80 and sm_90 without spilling. It was
chosen by arithmetic and never timed: `make gpu` sweeps the candidates and writes what wins.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

PROGRAMS = 264  # enough to fill a device: two for each multiprocessor of an H100


@dataclass(frozen=True)
class ShrinkConfig:
    BLOCK_M: int
    BLOCK_K: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class BaseConfig:
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    GROUP_M: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class TokensConfig:
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class RowsConfig:
    BLOCK_M: int
    BLOCK_R: int
    num_warps: int = 4
    num_stages: int = 1


@dataclass(frozen=True)
class SmallConfig:
    """Of fold and columns."""

    ROWS: int = 16
    COLUMNS: int = 256
    num_warps: int = 4
    num_stages: int = 1


@dataclass(frozen=True)
class Roofline:
    """SI units.

    flops: of a large half-precision product
    bandwidth: of the main memory
    launch: one kernel, from call to call
    fused: speed of the fused kernel's own product over that of cuBLAS
    """

    flops: float
    bandwidth: float
    launch: float = 4e-6
    fused: float = 0.95  # what is published of a kernel like it on an H100 NVL; `make gpu` measures this one


ROOFLINES = {80: Roofline(312e12, 2.0e12), 90: Roofline(790e12, 3.0e12)}


def is_wide_layer(weight: Tensor) -> bool:
    """Whether operands are loaded 16 bytes at a time: half precision, sizes and row strides that are multiples of 16."""
    unit, other = sorted(weight.stride())
    return weight.element_size() == 2 and unit == 1 and other % 16 == weight.shape[0] % 16 == weight.shape[1] % 16 == 0


def pick_rank_tile(r: int, wide: bool) -> int:
    """BLOCK_R of all kernels of a layer, a multiple of 16; active ranks are rounded up to it."""
    return 16 if r <= 16 or not wide else 32 if r <= 32 else 64


def padded_rank(r: int, rank_tile: int, partitioned: bool) -> int:
    """R: r in whole tiles; partitioned, the most that open and closed ranks fill in tiles of their own."""
    tiles = (r - 2) // rank_tile + 2 if partitioned else -(-r // rank_tile)
    return tiles * rank_tile


def pick_shrink_config(M: int, rank_tile: int, wide: bool) -> ShrinkConfig:
    if not wide:
        return ShrinkConfig(BLOCK_M=16 if M <= 16 else 64, BLOCK_K=32, BLOCK_R=rank_tile, num_warps=4, num_stages=2)
    return ShrinkConfig(BLOCK_M=16 if M <= 16 else 64, BLOCK_K=128, BLOCK_R=rank_tile, num_warps=4, num_stages=3)


def pick_base_config(M: int, N: int, rank_tile: int, wide: bool, arch: int) -> BaseConfig:
    """M, N: rows and columns of the output; arch: compute capability, 80 for an A100, 90 for an H100"""
    block_r = min(rank_tile, 32)
    if not wide:
        return BaseConfig(16 if M <= 16 else 64, 64, 16, block_r, GROUP_M=8, num_warps=4, num_stages=2)
    if M <= 16:
        return BaseConfig(16, 128, 128, block_r, GROUP_M=8, num_warps=4, num_stages=4)
    if M <= 64:
        return BaseConfig(64, 128, 64, block_r, GROUP_M=8, num_warps=4, num_stages=4)
    if -(-M // 128) * -(-N // 256) < PROGRAMS // 2:
        return BaseConfig(128, 128, 64, block_r, GROUP_M=8, num_warps=8, num_stages=4)
    if arch < 90:
        return BaseConfig(128, 256, 32, block_r, GROUP_M=8, num_warps=8, num_stages=4)
    return BaseConfig(128, 256, 64, block_r, GROUP_M=8, num_warps=8, num_stages=3)


def seconds_fused(M: int, K: int, N: int, R: int, device: Roofline) -> float:
    """h folded in the accumulator of x W, in half precision: y is written once."""
    values = M * K + K * N + M * N + R * (M + N)
    return device.launch + max(2 * M * N * (K + R) / (device.flops * device.fused), 2 * values / device.bandwidth)


def seconds_addmm(M: int, K: int, N: int, R: int, device: Roofline) -> float:
    """x W by cuBLAS, and h folded added to it: y is written, read, and written again."""
    product = max(2 * M * N * K / device.flops, 2 * (M * K + K * N + M * N) / device.bandwidth)
    added = max(2 * M * N * R / device.flops, 2 * (2 * M * N + R * (M + N)) / device.bandwidth)
    return 2 * device.launch + product + added


def pick_base_path(M: int, K: int, N: int, R: int, wide: bool, arch: int) -> Literal["fused", "addmm"]:
    """M, N: rows and columns of the output; R: ranks in whole tiles.

    What is not wide has no tensor cores here, and cuBLAS has better tiles for it than the narrow table.
    """
    if not wide:
        return "addmm"
    sizes = (M, K, N, R, ROOFLINES[90 if arch >= 90 else 80])
    return "fused" if seconds_fused(*sizes) < seconds_addmm(*sizes) else "addmm"


def pick_tokens_config(rank_tile: int, wide: bool, with_g: bool, arch: int) -> TokensConfig:
    if not wide:
        return TokensConfig(BLOCK_M=32, BLOCK_N=64, BLOCK_R=rank_tile, num_warps=4, num_stages=1)
    if with_g and arch < 90:
        return TokensConfig(BLOCK_M=32, BLOCK_N=256, BLOCK_R=rank_tile, num_warps=8, num_stages=4)
    return TokensConfig(BLOCK_M=64, BLOCK_N=256 if rank_tile <= 32 else 128, BLOCK_R=rank_tile, num_warps=8, num_stages=3)


def pick_rows_config(rank_tile: int) -> RowsConfig:
    return RowsConfig(BLOCK_M=1024 // rank_tile, BLOCK_R=rank_tile)


def pick_one_pass(r: int, rank_tile: int, arch: int) -> bool:
    """Whether one pass over dy gives both g and the sums of dB.

    g then goes through a plane of 4 M R bytes for each tile of columns, written and read; reading dy again costs 2 M N. With
    256 columns a tile the first is smaller below R = 64; at R = 32 the tile spills on an A100.
    """
    return r <= rank_tile <= (32 if arch >= 90 else 16)


def pick_shrink_planes(programs: int, K: int) -> int:
    """Parts that K is cut into where there are few programs with a long loop each."""
    return 8 if programs <= PROGRAMS // 8 and K >= 2048 else 1


def pick_token_planes(programs: int, M: int, block_m: int) -> int:
    """Parts that the tokens are cut into: enough programs for the device, at least 4 tiles a program, at most 32."""
    return max(1, min(-(-PROGRAMS // programs), M // (4 * block_m), 32))


def candidates_shrink(rank_tile: int) -> list[ShrinkConfig]:
    """For wide operands; the sweep times each."""
    return [ShrinkConfig(m, k, rank_tile, w, 3) for m in (64, 128) for k in (64, 128) for w in (4, 8)]


def candidates_base(rank_tile: int) -> list[BaseConfig]:
    tiles = [(128, 128, 64, 4, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4)]
    tiles += [(256, 128, 64, 8, 3), (64, 256, 64, 4, 4), (128, 256, 32, 8, 4)]
    return [BaseConfig(m, n, k, min(rank_tile, 32), 8, w, s) for m, n, k, w, s in tiles]


def candidates_tokens(rank_tile: int) -> list[TokensConfig]:
    return [TokensConfig(m, n, rank_tile, w, 3) for m in (64, 128) for n in (128, 256) for w in (4, 8)]
