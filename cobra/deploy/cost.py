"""What a deployment costs: bytes, seconds and rounding, as pure functions of shapes, ranks, spreads and a DeviceSpec.

At a layer K -> N with adapters of rank r_a on t_a of the step's tokens:

    packed   y_a += (x_a A_aᵀ) B_aᵀ, a segment each: Σ r_a (K + N) stored
    padded   the same as one batched product at r = max r_a: adapters · r (K + N) stored

    seconds = Σ over products max(FLOPs / F, bytes / BW) + launches · launch

Ranks count in multiples of 16 in FLOPs, the tile of matrix units. F and BW are peaks, so seconds are a lower bound, but for
matrices small enough to stay in a cache from step to step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cobra.deploy.device import ITEMSIZE, DeviceSpec, checked_fields, is_number, nearest, one_of
from cobra.lora import LoraAdapter, LoraLayer
from cobra.plan import RankPlan
from cobra.sites import is_linear, linear_weight

RANK_TILE = 16
WORKSPACE = 256 * 2**20  # bytes for the sums of one launch of merges
GRID = {"bfloat16": (7, -126), "float16": (10, -14), "float32": (23, -126), "float64": (52, -1022)}  # mantissa, least exponent


@dataclass(frozen=True)
class SiteShape:
    """One linear layer and the adapters for it.

    ranks: one an adapter; 0 where an adapter leaves the layer alone
    dtype: of the weight and the activations
    weight_std: root mean square of W; delta_std: of each adapter's ΔW; None where not known
    """

    name: str
    in_features: int
    out_features: int
    ranks: tuple[int, ...]
    dtype: str
    weight_std: float | None = None
    delta_std: tuple[float, ...] | None = None

    def __post_init__(self):
        for field in ("ranks", "delta_std"):
            if isinstance(getattr(self, field), list):
                object.__setattr__(self, field, tuple(getattr(self, field)))
        one_of(f"{self.name}: dtype", self.dtype, ITEMSIZE)
        for field in ("in_features", "out_features"):
            require_int(f"{self.name}: {field}", getattr(self, field), 1)
        if not self.ranks:
            raise ValueError(f"{self.name}: ranks is empty; expected one an adapter, 0 for none")
        for rank in self.ranks:
            require_int(f"{self.name}: rank", rank, 0)
        if self.delta_std is not None and len(self.delta_std) != len(self.ranks):
            raise ValueError(f"{self.name}: {len(self.delta_std)} delta_std for {len(self.ranks)} ranks; expected one each")
        for std in (self.weight_std, *(self.delta_std or ())):
            if std is not None and not is_number(std):
                raise ValueError(f"{self.name}: a std of {std!r}: expected a finite number of at least 0, or None")

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def rounding_loss(self) -> float | None:
        """Predicted for a merge; None with several adapters, and where the spreads are not known."""
        if len(self.ranks) > 1 or self.weight_std is None or self.delta_std is None:
            return None
        return predicted_rounding_loss(self.weight_std, self.delta_std[0], self.dtype)


@dataclass(frozen=True)
class Workload:
    """One forward step.

    tokens: of all adapters together
    adapters: how many of a site's adapters the tokens are shared out to, evenly; planned for those of largest rank. None: all
    long_lived: whether a lone adapter stays, so that a merge pays
    """

    tokens: int
    adapters: int | None = None
    long_lived: bool = True

    def __post_init__(self):
        require_int("tokens", self.tokens, 1)
        if self.adapters is not None:
            require_int("adapters", self.adapters, 1)
            if self.adapters > self.tokens:
                raise ValueError(f"adapters={self.adapters} in flight need as many tokens a step; tokens={self.tokens}")


def predicted_rounding_loss(weight_std: float, delta_std: float, dtype: str) -> float:
    """E‖round(W + Δ) − W − Δ‖ / ‖Δ‖ for W ~ N(0, weight_std²) on the grid of the dtype and Δ ~ N(0, delta_std²).

    The square is Σ over binades of P(|W + Δ| in it) · g(δ / u), with u the spacing there and g what rounding takes of Δ².
    The rounding of B A itself, in the sum's precision, is not in it.
    """
    one_of("dtype", dtype, ITEMSIZE)
    mantissa, least = GRID[dtype]
    for name, std in (("weight_std", weight_std), ("delta_std", delta_std)):
        if not is_number(std) or math.ldexp(std, least - 2) >= 1:
            raise ValueError(f"{name}={std!r}: expected a number from 0 to the largest {dtype}")
    if delta_std == 0:
        return 0.0
    spread = math.hypot(weight_std, delta_std)
    top = max(least + 1, math.frexp(spread)[1] + 4)  # at least 8 spreads
    square = inside = 0.0
    for exponent in range(max(least, top - 40), top):
        below = math.erf(math.ldexp(1 / spread / math.sqrt(2), exponent + 1))  # the first binade takes all that is smaller
        square += (below - inside) * _share_lost(delta_std / math.ldexp(1.0, exponent - mantissa))
        inside = below
    return math.sqrt(square)


def _share_lost(std: float) -> float:
    """E (X − round X)² / std² for X ~ N(0, std²), the square by its Fourier series."""
    if std < 0.1:
        return 1.0  # X never reaches 1/2
    if std > 2:
        return 1 / 12 / std / std  # X − round X is uniform
    square = 1 / 12 + sum((-1) ** k / (math.pi * k) ** 2 * math.exp(-2 * (math.pi * k * std) ** 2) for k in range(1, 10))
    return square / std**2


@dataclass(frozen=True)
class MergePiece:
    """Rows row_start to row_stop of a site's weight."""

    site: str
    row_start: int
    row_stop: int


@dataclass(frozen=True)
class MergeChunk:
    """Pieces of one grouped launch. workspace: bytes of their sums."""

    pieces: tuple[MergePiece, ...]
    workspace: int


@dataclass(frozen=True)
class MergeSchedule:
    """Every row of every merged site once, in chunks."""

    chunks: tuple[MergeChunk, ...] = ()

    @classmethod
    def from_dict(cls, value: dict) -> MergeSchedule:
        chunks = [checked_fields(MergeChunk, chunk) for chunk in checked_fields(cls, value)["chunks"]]
        pieces = [tuple(MergePiece(**checked_fields(MergePiece, p)) for p in chunk["pieces"]) for chunk in chunks]
        return cls(tuple(MergeChunk(p, chunk["workspace"]) for p, chunk in zip(pieces, chunks, strict=True)))


def merge_schedule(sites: Sequence[SiteShape], workspace: int) -> MergeSchedule:
    """Like sites side by side, in chunks of one dtype whose sums fill at most `workspace` bytes; larger sites are split.

    Sums are fp32, 4 bytes an element, and fp64 for fp64 weights. Raises ValueError where one row is more than the workspace.
    """
    require_int("workspace", workspace, 1)
    least = max(map(_row_bytes, sites), default=0)
    if least > workspace:
        name = next(site.name for site in sites if _row_bytes(site) == least)
        raise ValueError(f"workspace={workspace:,} is less than one row of {name}; give at least {least:,} bytes")
    chunks: list[MergeChunk] = []
    pieces: list[MergePiece] = []
    used, dtype = 0, None
    for site in sorted(sites, key=lambda s: (s.dtype, s.in_features, s.out_features, s.ranks)):
        row = _row_bytes(site)
        most = workspace // row
        for start in range(0, site.out_features, most):
            stop = min(start + most, site.out_features)
            if pieces and (used + (stop - start) * row > workspace or site.dtype != dtype):
                chunks.append(MergeChunk(tuple(pieces), used))
                pieces, used = [], 0
            pieces.append(MergePiece(site.name, start, stop))
            used, dtype = used + (stop - start) * row, site.dtype
    return MergeSchedule((*chunks, MergeChunk(tuple(pieces), used)) if pieces else ())


def _row_bytes(site: SiteShape) -> int:
    return site.in_features * max(4, site.itemsize)


def merge_seconds(site: SiteShape, device: DeviceSpec, workspace: int) -> float:
    """Cast into the workspace, add the product, round back: three launches a piece."""
    K, N, wide = site.in_features, site.out_features, max(4, site.itemsize)
    flops = 2 * _tiled(site.ranks[0]) * K * N / device.flops("float64" if site.dtype == "float64" else "float32")
    pieces = math.ceil(N / max(1, workspace // _row_bytes(site)))
    return max(flops, (2 * site.itemsize + 4 * wide) * K * N / device.bandwidth) + 3 * pieces * device.launch


def _tiled(rank: int) -> int:
    return math.ceil(rank / RANK_TILE) * RANK_TILE


@dataclass(frozen=True)
class Cost:
    """stored: bytes beside the weight; moved: bytes to and from memory a step; seconds: added to a step."""

    stored: int = 0
    moved: int = 0
    seconds: float = 0.0


def unmerged_cost(site: SiteShape, device: DeviceSpec, workload: Workload, choice: str) -> Cost:
    """Of "packed" or "padded" adapters over the bare layer."""
    in_flight = min(workload.adapters or len(site.ranks), workload.tokens)
    flying = sorted(site.ranks, reverse=True)[:in_flight]
    if choice == "padded":
        stored_ranks = len(site.ranks) * flying[0]
        segments = [(math.ceil(workload.tokens / in_flight), flying[0])] * in_flight
    else:
        stored_ranks = sum(site.ranks)
        even, more = divmod(workload.tokens, in_flight)
        segments = [(even + (i < more), rank) for i, rank in enumerate(flying) if rank]
    moved, seconds = 0, 0.0
    for rows, rank in segments:
        for width, passes in ((site.in_features, 1), (site.out_features, 2)):  # x is read; y is read and written
            through = _to_memory(workload.tokens * width * site.itemsize, device)
            traffic = site.itemsize * (rank * width + rows * rank) + through * passes * rows // workload.tokens
            moved += traffic
            flops = 2 * rows * _tiled(rank) * width
            seconds += max(flops / device.flops(site.dtype), traffic / device.bandwidth)
    launches = 2 if choice == "padded" or device.grouped else 2 * len(segments)
    stored = stored_ranks * (site.in_features + site.out_features) * site.itemsize
    return Cost(stored, moved, seconds + launches * device.launch)


def _to_memory(activations: int, device: DeviceSpec) -> int:
    """What of them leaves the cache between two operations."""
    return activations if 2 * activations > device.cache else 0


def site_shapes(model: nn.Module, adapters: Sequence[LoraAdapter | RankPlan]) -> tuple[SiteShape, ...]:
    """Every layer one of the adapters names, in the model's order, with ranks and spreads.

    A RankPlan has ranks but no matrices, and a model on the meta device no weights: spreads are None then.

    Raises ValueError for names that are no linear layer of the model, with close names, and matrices that do not fit.
    """
    if not adapters:
        raise ValueError("no adapters; expected at least one LoraAdapter or RankPlan")
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted = {name for adapter in adapters for name in adapter.ranks}
    for name in sorted(wanted):
        if name not in modules:
            raise ValueError(f"{name!r} is no module of the model{nearest(name, modules)}")
        if not is_linear(modules[name]):
            raise ValueError(
                f"{name} is a {type(modules[name]).__name__}; expected a plain nn.Linear or Conv1D: merge or detach first"
            )
    return tuple(_site_shape(name, linear_weight(modules[name]), adapters) for name in modules if name in wanted)


def _site_shape(name: str, weight: Tensor, adapters: Sequence[LoraAdapter | RankPlan]) -> SiteShape:
    N, K = weight.shape
    layers = [adapter.layers.get(name) for adapter in adapters if isinstance(adapter, LoraAdapter)]
    for layer in layers:
        if layer is not None and (layer.in_features, layer.out_features) != (K, N):
            raise ValueError(
                f"{name}: lora_A {tuple(layer.lora_A.shape)} and lora_B {tuple(layer.lora_B.shape)} do not fit weight {(N, K)}"
            )
    known = len(layers) == len(adapters)
    return SiteShape(
        name,
        K,
        N,
        tuple(adapter.ranks.get(name, 0) for adapter in adapters),
        str(weight.dtype).removeprefix("torch."),
        None if weight.is_meta else _spread(weight),
        tuple(_delta_std(layer) for layer in layers) if known else None,
    )


def _spread(weight: Tensor) -> float:
    norm = torch.linalg.vector_norm(weight.detach(), dtype=torch.promote_types(weight.dtype, torch.float32))
    return norm.item() / math.sqrt(weight.numel())


def _delta_std(layer: LoraLayer | None) -> float:
    """‖B A‖ / √(N K) without the product: ‖B A‖² = ⟨Bᵀ B, A Aᵀ⟩."""
    if layer is None or not layer.rank:
        return 0.0
    lora_A, lora_B = layer.lora_A.detach().cpu().double(), layer.lora_B.detach().cpu().double()
    squared = ((lora_B.t() @ lora_B) * (lora_A @ lora_A.t())).sum().clamp(min=0)
    return (squared / layer.in_features / layer.out_features).sqrt().item()


def require_int(what: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{what}={value!r}: expected an integer of at least {least}")
