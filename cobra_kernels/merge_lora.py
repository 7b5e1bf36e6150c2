"""Folding low-rank updates into weights.

    W' = round( W + s (B ∘ z) A )          W (N, K)   A (r, K)   B (N, r)   z (r,)

The sum is fp32 (fp64 for fp64 weights) and is rounded once to the weight's dtype, under autocast too. A group of weights on
the CPU is merged in one pass over its memory, and what rounding lost is summed in the same pass:

    ‖ΔW‖²   ‖W‖²   ‖(W' - W) - ΔW‖²          for each weight; squares are fp32, their sums over more than a few rows fp64
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from cobra_kernels import cuda_extension, extension
from cobra_kernels.backend import require_triton
from cobra_kernels.precision import full_precision

Backend = Literal["cuda", "triton"]
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/merge.cpp
LEAST_SQUARE = 1e-30  # a mean square below it may have lost squares to underflow


@dataclass(frozen=True, eq=False)
class MergeItem:
    """One weight and its update, ΔW = lora_B @ lora_A.

    weight: (N, K), also a transposed view or a slice
    lora_A: (r, K), lora_B: (N, r) with scaling and gates in it; r may be 0
    name: for errors
    """

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    name: str = "weight"


def merge_lora_ref(weight: Tensor, lora_A: Tensor, lora_B: Tensor, z: Tensor | None = None, *, scaling: float = 1.0) -> Tensor:
    """The equation as it is written; arguments as in `merge_lora`."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    gated_B = lora_B.to(dtype) if z is None else lora_B.to(dtype) * z.to(dtype)
    return (weight.to(dtype) + scaling * (gated_B @ lora_A.to(dtype))).to(weight.dtype)


def merge_lora(weight: Tensor, lora_A: Tensor, lora_B: Tensor, z: Tensor | None = None, *, scaling: float = 1.0) -> Tensor:
    """The merged weight, a new tensor.

    weight: (N, K)
    lora_A: (r, K), lora_B: (N, r)
    z: (r,); None means all gates open

    out: (N, K) in the dtype of weight
    """
    N, K = weight.shape
    if lora_A.shape[1] != K or lora_B.shape != (N, lora_A.shape[0]):
        raise ValueError(
            f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not fit weight {tuple(weight.shape)}"
        )
    if z is not None and z.shape != lora_A.shape[:1]:
        raise ValueError(f"z {tuple(z.shape)} is not one gate for each of {lora_A.shape[0]} ranks; token gates do not merge")
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    gated_B = lora_B.to(dtype) * (scaling if z is None else scaling * z.to(dtype))
    with full_precision(weight.device):
        return torch.addmm(weight.to(dtype), gated_B, lora_A.to(dtype)).to(weight.dtype)


def _statistics_ref(item: MergeItem, merged: Tensor) -> Tensor:
    """(3,) fp64 on the CPU: ‖ΔW‖², ‖W‖², ‖(W' - W) - ΔW‖²; ΔW is rounded to fp32 as in the sum."""
    work = torch.float32 if merged.device.type == "mps" else torch.float64  # MPS has no fp64
    factors = torch.float64 if merged.dtype == torch.float64 else torch.float32
    with full_precision(merged.device):
        delta = (item.lora_B.to(factors) @ item.lora_A.to(factors)).to(work)
    before = item.weight.to(work)
    lost = merged.to(work) - before - delta
    return torch.stack([t.square().sum() for t in (delta, before, lost)]).cpu().double()


@torch.no_grad()
def merge_lora_group_ref(items: Sequence[MergeItem]) -> tuple[list[Tensor], Tensor]:
    """The equations as they are written, a weight at a time; results as in `merge_lora_group`."""
    merged = [merge_lora_ref(item.weight, item.lora_A, item.lora_B) for item in items]
    statistics = torch.zeros(len(items), 3, dtype=torch.float64, device="cpu")
    for row, item, result in zip(statistics, items, merged, strict=True):
        row.copy_(_statistics_ref(item, result))
    return merged, statistics


def _check(items: Sequence[MergeItem], out: Sequence[Tensor] | None) -> None:
    for item in items:
        weight, lora_A, lora_B = item.weight, item.lora_A, item.lora_B
        if weight.ndim != 2 or lora_A.shape != (lora_B.shape[-1], weight.shape[1]) or lora_B.shape[:-1] != weight.shape[:1]:
            raise ValueError(
                f"{item.name}: lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not fit weight "
                f"{tuple(weight.shape)}; they must be (r, K), (N, r) and (N, K)"
            )
        if not weight.is_floating_point():
            raise ValueError(f"{item.name} is {weight.dtype}; only floating-point weights merge: dequantise it first")
        if not weight.device == lora_A.device == lora_B.device:
            raise ValueError(
                f"{item.name} is on {weight.device}, lora_A on {lora_A.device}, lora_B on {lora_B.device}; move them to one"
            )
    if out is None:
        return
    if len(out) != len(items):
        raise ValueError(f"out has {len(out)} tensors for {len(items)} items; give one for each")
    for item, target in zip(items, out, strict=True):
        weight = item.weight
        if target.shape != weight.shape or target.dtype != weight.dtype or target.device != weight.device:
            raise ValueError(
                f"{item.name}: out is {tuple(target.shape)} {target.dtype} on {target.device}, the weight is "
                f"{tuple(weight.shape)} {weight.dtype} on {weight.device}; they must agree"
            )
    written = [target.data_ptr() for target in out if target.numel()]
    if len(set(written)) < len(written):
        raise ValueError("out holds the same memory twice; merge a weight that modules share once")


def _adjacent_dim(weight: Tensor, target: Tensor) -> int | None:
    """The dimension along which elements of both are neighbours in memory: 1 as a rule, 0 for transposed views."""
    for dim in (1, 0):
        if weight.shape[dim] == 1 or weight.stride(dim) == target.stride(dim) == 1:
            return dim
    return None


def _is_plain(item: MergeItem, target: Tensor) -> bool:
    """Whether compiled kernels take it: fp32, bf16 or fp16, in memory that an address and strides describe."""
    return (
        item.weight.dtype in DTYPE_CODES
        and all(type(t) in (Tensor, nn.Parameter) and not t.is_neg() for t in (item.weight, item.lora_A, item.lora_B, target))
        and _adjacent_dim(item.weight, target) is not None
    )


def _fields(items: Sequence[MergeItem], targets: Sequence[Tensor]) -> tuple[list[int], list[tuple[int, int]], list[Tensor]]:
    """Sites as in csrc/merge_site.h, the (rows, columns) of each, and fp32 factors to hold until the merge is over."""
    fields: list[int] = []
    shapes: list[tuple[int, int]] = []
    factors: list[Tensor] = []
    for item, target in zip(items, targets, strict=True):
        weight, left, right = item.weight, item.lora_B.float(), item.lora_A.float()
        if _adjacent_dim(weight, target) == 0:
            weight, target, left, right = weight.t(), target.t(), right.t(), left.t()
        fields += (weight.data_ptr(), target.data_ptr(), left.data_ptr(), right.data_ptr(), *weight.shape, right.shape[0])
        fields += (weight.stride(0), target.stride(0), *left.stride(), *right.stride(), DTYPE_CODES[weight.dtype])
        shapes.append(tuple(weight.shape))
        factors += (left, right)
    return fields, shapes, factors


def _merge_compiled(items: Sequence[MergeItem], targets: Sequence[Tensor], statistics: bool) -> Tensor | None:
    """One call of the C++ extension; (items, 3) sums or None."""
    fields, _, _factors = _fields(items, targets)
    sites = (ctypes.c_int64 * len(fields))(*fields)
    sums = torch.empty(len(items), 3, dtype=torch.float64, device="cpu") if statistics else None
    pointer = None if sums is None else sums.data_ptr()
    if extension.load().cobra_merge(sites, len(items), pointer, torch.get_num_threads(), extension.CPU_LEVEL):
        raise MemoryError(f"no memory to merge {len(items)} weights in")
    return sums


def _merge_on_device(
    backend: Backend, items: Sequence[MergeItem], targets: Sequence[Tensor], statistics: bool
) -> Tensor | None:
    """One launch of the kernels that were asked for; (items, 3) sums on the CPU or None."""
    weights = [item.weight for item in items]
    for item, target in zip(items, targets, strict=True):
        if not _is_plain(item, target) or item.weight.device != weights[0].device:
            raise ValueError(
                f"{item.name}: backend={backend!r} takes plain fp32, bf16 and fp16 weights with dense rows or columns, all on "
                f"one device, not {item.weight.dtype} {item.weight.stride()} on {item.weight.device}; leave backend out"
            )
    if backend == "cuda":
        from cobra_kernels import merge_lora_cuda as kernels

        library = [cuda_extension.require(*weights)]
    else:
        require_triton(weights[0])
        from cobra_kernels import merge_lora_triton as kernels

        library = []
    fields, shapes, _factors = _fields(items, targets)
    sums = kernels.launch(*library, fields, shapes, weights[0].device, statistics)
    return None if sums is None else sums.cpu()


def _out_of_range(items: Sequence[MergeItem], sums: Tensor) -> list[int]:
    """Rows of sums (items, 3) whose squares may have left fp32's range; at rank 0 two of them are 0."""
    counts = torch.tensor([item.weight.numel() for item in items], dtype=torch.float64, device="cpu")[:, None]
    ranked = torch.tensor([item.lora_A.shape[0] > 0 for item in items], device="cpu")[:, None]
    usual = sums.isfinite() & ((sums >= LEAST_SQUARE * counts) | ~ranked)
    found = (~usual.all(1)).nonzero().flatten().tolist()
    return [k for k in found if sums[k, 0] or (items[k].lora_B.any() and items[k].lora_A.any()) or not usual[k, 1]]


@torch.no_grad()
def merge_lora_group(
    items: Sequence[MergeItem],
    *,
    out: Sequence[Tensor] | None = None,
    statistics: bool = True,
    backend: Backend | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """The merged weights of a whole model, and what each gained and lost. No gradient passes.

    items: weights on the CPU in fp32, bf16 or fp16 are merged in one call of the compiled extension, on torch.get_num_threads()
        threads, to the same bits for any number of them; the others one after the other by torch
    out: tensors to write to, one for each item, of the weight's shape and dtype; the weight itself merges in place, other
        overlaps of what is written with what is read or written are the caller's to rule out. By default
        new ones that lie in memory as the weights do: for a transposed view, a transposed view
    backend: "cuda" and "triton" merge all weights, on one CUDA device, in one launch, or raise; neither has run on a GPU yet

    Returns the W' (N, K), and (items, 3) fp64 on the CPU, ‖ΔW‖², ‖W‖² and ‖(W' - W) - ΔW‖² of each, or None without
    `statistics`. Sums whose squares may have left fp32's range (about 1e19) are made again in fp64, except in place, where W is
    gone: there they are Inf or 0. But for that the last of the three is finite if and only if all of W' is.
    """
    _check(items, out)
    targets = [torch.empty_like(item.weight) for item in items] if out is None else list(out)
    sums = torch.zeros(len(items), 3, dtype=torch.float64, device="cpu") if statistics else None
    if backend is None:
        compiled = extension.load() is not None
        chosen = [i for i, item in enumerate(items) if compiled and item.weight.is_cpu and _is_plain(item, targets[i])]
        merge = _merge_compiled
    else:
        chosen, merge = list(range(len(items))), partial(_merge_on_device, backend)
    if chosen:
        part = merge([items[i] for i in chosen], [targets[i] for i in chosen], statistics)
        if sums is not None:
            for k in _out_of_range([items[i] for i in chosen], part):
                if targets[chosen[k]].data_ptr() != items[chosen[k]].weight.data_ptr():
                    part[k] = _statistics_ref(items[chosen[k]], targets[chosen[k]])
            sums[chosen] = part
        if out is not None:
            torch.autograd.graph.increment_version([targets[i] for i in chosen])
    for i in sorted(set(range(len(items))) - set(chosen)):
        merged = merge_lora(items[i].weight, items[i].lora_A, items[i].lora_B)
        if sums is not None:
            sums[i] = _statistics_ref(items[i], merged)
        targets[i].copy_(merged)
    return targets, sums
