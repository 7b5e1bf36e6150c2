"""Folding low-rank updates into plain weights and back, and the report of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cobra.batch import Batch, model_device
from cobra.deploy.cost import WORKSPACE, MergeSchedule, SiteShape, merge_schedule
from cobra.distributed import check_whole
from cobra.lora import LoraLayer
from cobra.notebook import folded_table
from cobra.sites import Site, is_conv1d, is_quantised_linear, linear_weight, quantised
from cobra_kernels.merge_lora import MergeItem, merge_lora_group

ABOVE = ("raise", "keep")
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CPU_CHUNK, GPU_CHUNK = 2**17, 2**22  # lanes of a checksum at a time: within a CPU's cache, in few launches of a GPU


@dataclass(frozen=True)
class SiteReport:
    """delta_norm: ‖ΔW‖, weight_norm: ‖W‖ (Frobenius); rounding_loss: ‖(W' - W) - ΔW‖ / ‖ΔW‖, what the weight's dtype lost;
    merged: False where it was above the tolerance and the layer stays unmerged."""

    name: str
    rank: int
    delta_norm: float
    weight_norm: float
    rounding_loss: float
    merged: bool = True


@dataclass(frozen=True)
class MergeReport:
    """One entry a layer. `logit_difference`: the largest change of an output on the probe batch, None without a probe."""

    sites: tuple[SiteReport, ...]
    logit_difference: float | None = None

    @property
    def worst_rounding_loss(self) -> float:
        """Over the merged layers."""
        return max((site.rounding_loss for site in self.sites if site.merged), default=0.0)

    @property
    def kept(self) -> tuple[str, ...]:
        """Layers that stay unmerged."""
        return tuple(site.name for site in self.sites if not site.merged)

    def table(self) -> str:
        width = max([len(s.name) for s in self.sites] + [5])
        lines = [f"{'site':<{width}}  rank  |update|/|weight|  lost to rounding"]
        lines += [
            f"{s.name:<{width}}  {s.rank:>4}  {s.delta_norm / max(s.weight_norm, 1e-30):>17.2e}  {s.rounding_loss:>16.1e}"
            + ("" if s.merged else "  stays unmerged")
            for s in self.sites
        ]
        return "\n".join(lines)

    def to_dataframe(self):
        """One row a layer (needs pandas)."""
        import pandas

        return pandas.DataFrame([vars(site) for site in self.sites])

    def plot(self, path: Path | str | None = None):
        """Size of every update and what rounding lost of it (needs matplotlib)."""
        from cobra.report.plots.merge import merge_updates

        return merge_updates(self, path)

    def __repr__(self) -> str:
        kept = f", {len(self.kept)} stay unmerged" if self.kept else ""
        moved = "" if self.logit_difference is None else f", outputs moved by at most {self.logit_difference:.1e}"
        merged = len(self.sites) - len(self.kept)
        return (
            f"MergeReport({merged} layers, at most {self.worst_rounding_loss:.1e} of an update lost to rounding{kept}{moved})"
        )

    def _repr_html_(self) -> str:
        return folded_table(self, self.table())


@dataclass(frozen=True)
class Merge:
    """Merged layers and the way back: the original storage, or a copy of it where something else looks at it too; None where
    the weights were merged in place.

    written: checksum of each merged weight
    """

    sites: tuple[Site, ...]
    originals: tuple[Tensor, ...] | None
    reports: tuple[SiteReport, ...]
    kept: bool
    written: tuple[int | None, ...]

    def undo(self) -> None:
        """Raises ValueError where the weights were merged in place, are sharded since, or not as this merge left them. In
        another dtype they cannot be, and are not looked at."""
        if self.originals is None:
            raise ValueError("merged in place (reversible=False), the base weights are gone: load the base model again")
        check_whole({f"{site.name}.weight": site.module.weight for site in self.sites}, "unmerge()")
        for site, original, written in zip(self.sites, self.originals, self.written, strict=True):
            if site.module.weight.dtype == original.dtype and checksum(site.module) != written:
                raise ValueError(
                    f"{site.name}: the weights are not those that this merge wrote, and what was changed since would be lost: "
                    "unmerge() the adapter first that was merged after this one, or keep the model as it is, merged"
                )
        for site, original in zip(self.sites, self.originals, strict=True):
            _set_weight(site.module.weight, original)


def check_merge_options(tolerance: float | None, above: str, reversible: bool) -> None:
    if not reversible and tolerance is not None:
        raise ValueError(f"tolerance={tolerance!r} needs the original weights where it is exceeded; merge with reversible=True")
    if above not in ABOVE:
        raise ValueError(f"above={above!r} is not one of {', '.join(map(repr, ABOVE))}")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance!r}: expected a share of the update, at least 0, or None")


@torch.no_grad()
def merge_layers(
    work: Sequence[tuple[Site, LoraLayer]], tolerance: float | None, above: str, workspace: int = WORKSPACE
) -> Merge:
    """Writes W + ΔW into the modules of the sites, all of them or, where one raises, none.

    workspace: bytes for the sums of one launch, as in `plan_deployment`

    Raises ValueError, before anything is merged, for weights that share memory and cannot be taken out of it.
    """
    items = _items(work)
    merged = [torch.empty_like(item.weight) for item in items]
    _require_apart([i for (site, _), i, new in zip(work, items, merged, strict=True) if not _leaves(site.module, new)])
    weights, statistics = _merge_in_chunks(items, merged, workspace)
    reports = [_report(item, sums, tolerance) for item, sums in zip(items, statistics.tolist(), strict=True)]
    lossy = [(report, item.weight.dtype) for report, item in zip(reports, items, strict=True) if not report.merged]
    if lossy and above == "raise":
        worst, dtype = max(lossy, key=lambda entry: entry[0].rounding_loss)
        raise ValueError(
            f"{worst.name}: rounding to {dtype} would lose {100 * worst.rounding_loss:.3g}% of the update, the "
            f"tolerance is {100 * tolerance:.3g}% ({len(lossy)} layers are above it); merge with above='keep', or into an fp32 "
            "copy of the model"
        )
    done = [i for i, report in enumerate(reports) if report.merged]
    originals = tuple(_replace_weight(work[i][0].module, weights[i]) for i in done)
    sites = tuple(work[i][0] for i in done)
    written = tuple(checksum(site.module) for site in sites)
    return Merge(sites, originals, tuple(reports), kept=bool(lossy), written=written)


@torch.no_grad()
def merge_layers_in_place(work: Sequence[tuple[Site, LoraLayer]], workspace: int = WORKSPACE) -> Merge:
    """As `merge_layers` without new memory and without a way back; a sum that is not finite raises when it is too late.

    Raises ValueError, before anything is merged, for weights that share memory.
    """
    items = _items(work)
    _require_apart(items)
    schedule_of(items, workspace)  # says now what it has to say
    try:
        _, statistics = _merge_in_chunks(items, [item.weight for item in items], workspace)
        reports = [_report(item, sums, None) for item, sums in zip(items, statistics.tolist(), strict=True)]
    except Exception as error:
        raise ValueError(f"{error}; weights may be merged in place by now: load the base model again") from error
    return Merge(tuple(site for site, _ in work), None, tuple(reports), kept=False, written=())


def _items(work: Sequence[tuple[Site, LoraLayer]]) -> list[MergeItem]:
    for site, _ in work:
        if quantised(site.module):
            raise ValueError(
                f"{site.name}.weight is {quantised(site.module)}, and a sum cannot be rounded back into it: save the adapter, "
                "load the base unquantised or model.dequantize() it, and cobra.load_adapter(dir).attach(model).merge() there"
            )
    return [MergeItem(linear_weight(site.module), layer.lora_A, layer.lora_B, site.name) for site, layer in work]


def _require_apart(items: Sequence[MergeItem]) -> None:
    """Raises ValueError naming two layers whose weights have elements in common: in place both updates would add up there."""
    parts = [_extents(item.weight) for item in items]
    extents = np.concatenate([np.empty((0, 2), np.int64), *parts])
    owner = np.repeat(np.arange(len(items)), np.array([len(part) for part in parts], np.int64))
    order = np.argsort(extents[:, 0])
    begin, end = extents[order].T
    for k in np.flatnonzero(begin[1:] < end[:-1])[:1]:
        first, second = (items[i].name for i in sorted(owner[order[k : k + 2]]))
        raise ValueError(
            f"{first} and {second} hold their weights in the same memory, where in place each would get the updates of both; "
            "nothing is merged: give one a copy first, module.weight.data = module.weight.data.clone()"
        )


def _extents(weight: Tensor) -> np.ndarray:
    """(n, 2) first byte and end of every stretch of memory of a weight (N, K): its rows or columns, or else its elements."""
    weight = weight.t() if weight.stride(0) == 1 else weight
    (N, K), (row, column), size = weight.shape, weight.stride(), weight.element_size()
    run = max(K, 1) if column == 1 else 1
    begin = weight.data_ptr() + size * (row * np.arange(N)[:, None] + column * np.arange(0, K, run)).ravel()
    return np.stack((begin, begin + size * run), axis=1)


def schedule_of(items: Sequence[MergeItem], workspace: int) -> MergeSchedule:
    """The launches of a merge: those a deployment plan has for these sites. Raises ValueError where one row is too much."""
    return merge_schedule([_shape(item) for item in items], workspace)


def _shape(item: MergeItem) -> SiteShape:
    (N, K), dtype = item.weight.shape, str(item.weight.dtype).removeprefix("torch.")
    return SiteShape(item.name, K, N, (item.lora_A.shape[0],), dtype)


def _merge_in_chunks(items: Sequence[MergeItem], merged: Sequence[Tensor], workspace: int) -> tuple[Sequence[Tensor], Tensor]:
    """As `merge_lora_group` into `merged`, a launch a chunk."""
    chunks = schedule_of(items, workspace).chunks
    if len(chunks) == 1:
        return merge_lora_group(items, out=merged)
    index = {item.name: i for i, item in enumerate(items)}
    statistics = torch.zeros(len(items), 3, dtype=torch.float64, device="cpu")
    for chunk in chunks:
        sites = [index[piece.site] for piece in chunk.pieces]
        rows = [slice(piece.row_start, piece.row_stop) for piece in chunk.pieces]
        parts = [_rows(items[i], part) for i, part in zip(sites, rows, strict=True)]
        _, sums = merge_lora_group(parts, out=[merged[i][part] for i, part in zip(sites, rows, strict=True)])
        statistics.index_add_(0, torch.tensor(sites, device="cpu"), sums)
    return merged, statistics


def _rows(item: MergeItem, rows: slice) -> MergeItem:
    if rows == slice(0, item.weight.shape[0]):
        return item
    return MergeItem(item.weight[rows], item.lora_A, item.lora_B[rows], item.name)


@torch.no_grad()
def probe_outputs(model: nn.Module, values: object) -> Tensor:
    """The model's logits on a batch in evaluation mode, fp32 on the CPU; the mode is put back."""
    batch, modes = Batch.from_loader(values, model_device(model), 0), [(m, m.training) for m in model.modules()]
    try:
        outputs = batch.forward(model.eval())
    finally:
        for module, training in modes:
            module.training = training
    found = getattr(outputs, "logits", None)
    if found is None:
        tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.ndim]  # a loss has none
        if not tensors:
            raise ValueError(
                f"probe: the model returns {type(outputs).__name__} without a tensor of outputs; merge without probe"
            )
        found = tensors[0]
    return found.float().cpu()


def _report(item: MergeItem, sums: list[float], tolerance: float | None) -> SiteReport:
    if not math.isfinite(sums[2]):
        raise ValueError(
            f"{item.name}: the merged weight is not finite ({item.weight.dtype}); the adapter or the weight holds NaN or Inf"
        )
    delta, weight, lost = map(math.sqrt, sums)
    share = lost / delta if delta else lost
    return SiteReport(item.name, item.lora_A.shape[0], delta, weight, share, tolerance is None or share <= tolerance)


def checksum(module: nn.Module) -> int | None:
    """Σ u_i v_j lane_ij of the weight's bits, modulo 2**64, on every device the same; None of a quantised weight, as no merge
    writes it.

    u and v are odd, so that no single lane can change unseen.
    """
    if is_quantised_linear(module):
        return None
    weight = module.weight.detach()
    N, L = len(weight), _lanes(weight[:0]).shape[1]
    u, v = _odd_numbers(N + L, weight.device).split([N, L])
    rows = max(1, (CPU_CHUNK if weight.device.type == "cpu" else GPU_CHUNK) // max(L, 1))
    parts = [(_mixed(_lanes(part), v).sum(1) * by).sum() for part, by in zip(weight.split(rows), u.split(rows), strict=True)]
    return torch.stack(parts).sum().item()


def _lanes(rows: Tensor) -> Tensor:
    """(n, L) int64: the bits of 8 bytes at a time, or of one element where rows are not as wide."""
    (n, K), size = rows.shape, rows.element_size()
    if K * size % 8:
        return rows.view(INTEGERS[size]).long()
    flat = rows.contiguous().view(-1)
    if flat.data_ptr() % 8 or flat.storage_offset() * size % 8:
        flat = flat.clone()
    return flat.view(torch.int64).view(n, K * size // 8)


def _mixed(lanes: Tensor, factors: Tensor) -> Tensor:
    """Their products, of lanes whose signs are in lower bits too: two signs changed would add 2 × 2**63, which is 0."""
    mixed = lanes >> 32
    mixed &= 0xFFFFFFFF
    mixed ^= lanes
    mixed *= factors
    return mixed


def _odd_numbers(n: int, device: torch.device) -> Tensor:
    """(n,) int64 without a pattern, the same on every device."""
    x = torch.arange(1, n + 1, device=device) * -7046029254386353131  # the steps of splitmix64
    x = (x ^ (x >> 30)) * -4658895280553007687
    return (x ^ (x >> 27)) | 1


def _replace_weight(module: nn.Module, merged: Tensor) -> Tensor:
    """The old weight; no copy where its storage can be exchanged."""
    merged = merged.t() if is_conv1d(module) else merged
    original = module.weight.data if _exchangeable(module.weight, merged) else module.weight.data.clone()
    _set_weight(module.weight, merged)
    return original


def _leaves(module: nn.Module, merged: Tensor) -> bool:
    """Whether the merged weight takes the place of the old one and leaves its memory alone."""
    return _exchangeable(module.weight, merged.t() if is_conv1d(module) else merged)


def _set_weight(weight: nn.Parameter, value: Tensor) -> None:
    if _exchangeable(weight, value):
        weight.data = value
    else:
        weight.data.copy_(value)


def _exchangeable(weight: nn.Parameter, value: Tensor) -> bool:
    """Whether another tensor can take the parameter's place; not where that is a slice of a larger buffer and must stay one."""
    alike = value.dtype == weight.dtype and value.device == weight.device and value.stride() == weight.stride()
    return alike and weight.untyped_storage().nbytes() == weight.nbytes
