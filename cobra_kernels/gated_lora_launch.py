"""A launcher for each Triton kernel of `gated_lora_linear`: outputs, grid and tiles; nothing waits for the device.

Shapes and symbols are those of `gated_lora_linear_triton`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cobra_kernels import gated_lora_configs as configs
from cobra_kernels import gated_lora_linear_triton as products
from cobra_kernels import gated_lora_small_triton as small


@dataclass(frozen=True)
class Branch:
    """The low-rank branch of one call: z (r,), source (R,) and extent (2,) as fold writes them, and what every launch shares.

    scaling: the s that goes with z
    rank_tile: BLOCK_R, of which R is a multiple
    wide: whether operands are loaded 16 bytes at a time
    """

    z: Tensor
    source: Tensor
    extent: Tensor
    scaling: float
    rank_tile: int
    wide: bool

    @property
    def padded_rank(self) -> int:
        return len(self.source)


def fold(
    like: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    branch: Branch,
    kind: str,
    gate: Tensor | None = None,
    temperature: Tensor | None = None,
    draw: Tensor | None = None,
    keep_closed: bool = False,
) -> tuple[Tensor, Tensor]:
    """-> A (R, K) and Bᵀ (R, N) in the order and dtype of the products; B folded, or A where the gates are "known"."""
    (r, K), N, R, config = lora_A.shape, len(lora_B), branch.padded_rank, configs.SmallConfig()
    packed_A, packed_B = empty(like, R, K), empty(like, R, N)
    gate = branch.z if kind in ("open", "known") else gate
    grid = (R // config.ROWS, -(-K // config.COLUMNS) - (-N // config.COLUMNS))
    small._fold_kernel[grid](
        lora_A,
        lora_B,
        gate,
        branch.z if temperature is None else temperature,
        branch.extent if draw is None else draw,
        branch.z,
        branch.source,
        branch.extent,
        packed_A,
        packed_B,
        r,
        K,
        N,
        branch.scaling,
        *lora_A.stride(),
        *lora_B.stride(),
        gate.stride(0),
        GATES=kind,
        KEEP_CLOSED=keep_closed,
        FOLD_A=kind == "known",
        BLOCK_R=branch.rank_tile,
        **vars(config),
    )
    return packed_A, packed_B


def shrink(
    x: Tensor,
    packed: Tensor,
    branch: Branch,
    token_gates: tuple[Tensor, float] | None = None,
    h_of_dz: Tensor | None = None,
    with_closed: bool = True,
    config: configs.ShrinkConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """h = x packedᵀ (M, R), and what `rows` makes of tokens' gates.

    with_closed: of closed gates of tokens too; else a tile that has no open one is 0, and its x is not read
    """
    (M, K), R = x.shape, branch.padded_rank
    config = config or configs.pick_shrink_config(M, branch.rank_tile, branch.wide)
    programs = -(-M // config.BLOCK_M) * (R // branch.rank_tile)
    planes = configs.pick_shrink_planes(programs, K)
    direct = planes == 1 and token_gates is None
    h = empty(x, planes, M, R, dtype=x.dtype if direct else torch.float32)
    plane_size = -(-K // (planes * config.BLOCK_K)) * config.BLOCK_K
    skips = token_gates is not None and not with_closed
    z = token_gates[0] if skips else h[0]
    products._shrink_kernel[programs, planes](
        x,
        packed,
        z,
        h,
        branch.source,
        branch.extent,
        M,
        K,
        R,
        plane_size,
        *x.stride(),
        *z.stride(),
        h.stride(0),
        SKIPS=skips,
        **vars(config),
    )
    if direct:
        return h[0], empty(x, 0), empty(x, 0)
    return rows(h, branch, x.dtype, token_gates, h_of_dz)


def rows(
    planes: Tensor,
    branch: Branch,
    dtype: torch.dtype,
    token_gates: tuple[Tensor, float] | None = None,
    h_of_dz: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> Σ planes (M, R); s z ∘ Σ planes and dz (M, r) where there are token gates (z, s) and h, else empty."""
    (count, M, R), config = planes.shape, configs.pick_rows_config(branch.rank_tile)
    z, scaling = token_gates or (branch.z[None], 1.0)
    r = z.shape[1]
    out = empty(planes, M, R, dtype=dtype)
    gated = empty(planes, M if token_gates else 0, R, dtype=dtype)
    dz = empty(planes, 0 if h_of_dz is None else M, r, dtype=z.dtype)
    products._rows_kernel[(-(-M // config.BLOCK_M) * (R // branch.rank_tile),)](
        planes,
        z,
        out if h_of_dz is None else h_of_dz,
        out,
        gated if token_gates else out,
        out if h_of_dz is None else dz,
        branch.source,
        branch.extent,
        M,
        R,
        r,
        count,
        scaling,
        planes.stride(0),
        *z.stride(),
        GATED=token_gates is not None,
        WITH_DZ=h_of_dz is not None,
        **vars(config),
    )
    return out, gated, dz


def base(
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    folded: Tensor,
    bias: Tensor | None,
    branch: Branch,
    config: configs.BaseConfig | None = None,
) -> Tensor:
    """y = h folded + x weight + bias; weight (K, N), of any strides."""
    (M, K), N = x.shape, weight.shape[1]
    config = config or configs.pick_base_config(M, N, branch.rank_tile, branch.wide, arch(x))
    y = empty(x, M, N)
    products._base_kernel[(-(-M // config.BLOCK_M) * -(-N // config.BLOCK_N),)](
        x,
        weight,
        h,
        folded,
        y if bias is None else bias,
        y,
        branch.extent,
        M,
        N,
        K,
        branch.padded_rank,
        *x.stride(),
        *weight.stride(),
        HAS_BIAS=bias is not None,
        **vars(config),
    )
    return y


def tokens(
    x: Tensor,
    h: Tensor,
    packed: Tensor | None,
    branch: Branch,
    closed: bool = True,
    config: configs.TokensConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """-> planes of S = hᵀ x (planes, R, N), and with `packed` those of g = x packedᵀ (column tiles, M, R), else empty."""
    (M, N), R = x.shape, branch.padded_rank
    config = config or configs.pick_tokens_config(branch.rank_tile, branch.wide, packed is not None, arch(x))
    tiles = -(-N // config.BLOCK_N)
    programs = tiles * (R // branch.rank_tile)
    planes = configs.pick_token_planes(programs, M, config.BLOCK_M)
    plane_size = -(-M // (planes * config.BLOCK_M)) * config.BLOCK_M
    sums = empty(x, planes, R, N, dtype=torch.float32)
    g = empty(x, tiles if packed is not None else 0, M, R, dtype=torch.float32)
    products._tokens_kernel[programs, planes](
        x,
        h,
        h if packed is None else packed,
        sums,
        sums if packed is None else g,
        branch.extent,
        M,
        N,
        R,
        plane_size,
        *x.stride(),
        g.stride(0),
        CLOSED=int(closed),
        WITH_G=packed is not None,
        **vars(config),
    )
    return sums, g


def columns(sums: Tensor, operand: Tensor, branch: Branch, *, closed: bool, with_dz: bool = False) -> tuple[Tensor, Tensor]:
    """-> s z ∘ Σ planes (r, N) in the layout and dtype of `operand` (r, N), and (tiles, R) parts of dz, else empty."""
    (planes, R, N), config = sums.shape, configs.SmallConfig()
    tiles = -(-N // config.COLUMNS)
    out = torch.empty_like(operand)
    partial = empty(sums, tiles if with_dz else 0, R)
    small._columns_kernel[R // config.ROWS, tiles](
        sums,
        operand,
        branch.z,
        branch.source,
        branch.extent,
        out,
        partial if with_dz else sums,
        N,
        R,
        planes,
        branch.scaling,
        sums.stride(0),
        *operand.stride(),
        *out.stride(),
        CLOSED=int(closed),
        WITH_DZ=with_dz,
        **vars(config),
    )
    return out, partial


def dz(partial: Tensor, branch: Branch, gate: Tensor, temperature: Tensor | None) -> Tensor:
    """The gradient of the gates (r,), or with a temperature that of their logits."""
    (tiles, R), out = partial.shape, torch.empty_like(gate)
    rows = configs.SmallConfig().ROWS
    small._dz_kernel[(R // rows,)](
        partial,
        branch.z,
        branch.z if temperature is None else temperature,
        branch.source,
        out,
        R,
        tiles,
        branch.scaling,
        SAMPLED=temperature is not None,
        ROWS=rows,
    )
    return out


def arch(x: Tensor) -> int:
    """Compute capability of the device of x, times 10."""
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)  # the interpreter's tiles fit anywhere
    return 10 * major + minor


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
