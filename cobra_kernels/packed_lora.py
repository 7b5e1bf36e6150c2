"""Many adapters of uneven rank over one frozen layer: each token takes the update of its own adapter, or none.

    y_t = base_t + B_a A_a x_t          a = ids_t;  y_t = base_t where ids_t = -1

    base (T, N)   x (T, K)   lora_A (R, K)   lora_B (N, R)   ids (T,)   y (T, N)          R = Σ_a r_a

The adapters lie side by side: a's rows of lora_A and its columns of lora_B begin at Σ_(b<a) r_b. No rank is padded, and r_a = 0
takes no room; the scaling is in lora_B. Products accumulate in fp32. An adapter is read for its own tokens alone, so what is in
it cannot reach another token. For serving: there is no backward; `packed_lora_ref` is differentiable.

The Triton path has been compiled for sm_80 and sm_90 and interpreted, and has never run on a GPU: it is off unless asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cobra_kernels.backend import require_triton

GATHER_BELOW = 8  # tokens a run on average: sorting shorter ones costs less than a product for each
WIDEN_BELOW = 32  # tokens a product: the CPU's half-precision products are slow to start


def packed_lora_ref(base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, ranks: Sequence[int], ids: Tensor) -> Tensor:
    """The equation as it is written; arguments as in `packed_lora`."""
    y = base
    for adapter, (A, B) in enumerate(zip(lora_A.split(list(ranks)), lora_B.split(list(ranks), 1), strict=True)):
        rows = (ids == adapter).nonzero().flatten()
        y = y.index_add(0, rows, F.linear(F.linear(x[rows], A), B))
    return y


@dataclass(frozen=True, eq=False)
class Segments:
    """Which tokens of a batch each adapter takes; made once by `segment_tokens`, it serves every layer of a model.

    ids: (T,) int64
    spans: (S, 3) int64 on the CPU, rows (adapter, first, last): its tokens are first to last - 1, or `order` at these places
    order: tokens sorted by adapter where runs are too short to be taken as they are, on the device of ids
    """

    ids: Tensor
    spans: Tensor
    order: Tensor | None

    @cached_property
    def blocks(self) -> Tensor:
        """(blocks, 1 + BLOCK_M) int64 for the Triton kernels: an adapter and its tokens, -1 where a block is not full."""
        order = torch.arange(len(self.ids)) if self.order is None else self.order.cpu()
        size = 16 if len(order) <= 32 * len(self.spans) else 64
        blocks = [torch.empty(0, 1 + size, dtype=torch.int64)]
        for adapter, first, last in self.spans.tolist():
            tokens = F.pad(order[first:last], (0, (first - last) % size), value=-1).view(-1, size)
            blocks.append(F.pad(tokens, (1, 0), value=adapter))
        return torch.cat(blocks).to(self.ids.device)


def segment_tokens(ids: Tensor) -> Segments:
    """Finds each adapter's tokens. Waits for the device of ids once.

    ids: (T,) int64, the adapter of each token, or -1 for the base layer alone
    """
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise ValueError(f"ids must be (T,) of int64, got {tuple(ids.shape)} of {ids.dtype}; repeat a row's id for its tokens")
    host = ids.cpu()
    spans, order = _spans(host), None
    if any(adapter < 0 for adapter, _, _ in spans):
        raise ValueError(f"ids holds {int(host.min())}; an id is an adapter's index, or -1 for the base layer alone")
    tokens = sum(last - first for _, first, last in spans)
    if tokens < GATHER_BELOW * len(spans) and len(spans) > len({adapter for adapter, _, _ in spans}):
        order = host.argsort(stable=True)[len(host) - tokens :]
        spans = _spans(host[order])
        order = order.to(ids.device)
    return Segments(ids, torch.tensor(spans, dtype=torch.int64).view(-1, 3), order)


def _spans(ids: Tensor) -> list[tuple[int, int, int]]:
    """(adapter, first, last) of each run of equal ids, less those of -1."""
    adapters, lengths = (t.tolist() for t in ids.unique_consecutive(return_counts=True))
    runs = zip(adapters, lengths, accumulate(lengths), strict=True)
    return [(adapter, last - length, last) for adapter, length, last in runs if adapter != -1]


def _torch(y, x, lora_A, lora_B, ranks, ids, spans, order) -> None:
    segments = segment_tokens(ids) if spans is None else Segments(ids, spans, order)
    spans, order = _within(segments.spans, ranks), segments.order
    with torch.autocast(x.device.type, enabled=False):
        if order is None:
            _add_spans(y, x, lora_A, lora_B, ranks, spans)
        else:
            rows = y.index_select(0, order)
            _add_spans(rows, x.index_select(0, order), lora_A, lora_B, ranks, spans)
            y.index_copy_(0, order, rows)


def _add_spans(y, x, lora_A, lora_B, ranks, spans) -> None:
    A, B, first_rank = lora_A.t(), lora_B.t(), [0, *accumulate(ranks)]
    narrow = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    for adapter, first, last in spans:
        if not ranks[adapter]:
            continue
        A_a = A.narrow(1, first_rank[adapter], ranks[adapter])
        B_a = B.narrow(0, first_rank[adapter], ranks[adapter])
        x_a, y_a = x[first:last], y[first:last]
        if narrow and last - first < WIDEN_BELOW:
            y_a.copy_(torch.addmm(y_a.float(), x_a.float() @ A_a.float(), B_a.float()))
        else:
            y_a.addmm_(x_a @ A_a, B_a)


def _triton(y, x, lora_A, lora_B, ranks, ids, spans, blocks) -> None:
    from cobra_kernels.packed_lora_triton import launch

    if spans is None:
        segments = segment_tokens(ids)
        spans, blocks = segments.spans, segments.blocks
    _within(spans, ranks)
    launch(y, x, lora_A, lora_B, tuple(ranks), blocks)


def _within(spans: Tensor, ranks: Sequence[int]) -> list[list[int]]:
    rows = spans.tolist()
    largest = max((adapter for adapter, _, _ in rows), default=-1)
    if largest >= len(ranks):
        raise ValueError(f"ids holds {largest}, but ranks are those of {len(ranks)} adapters; ids end at {len(ranks) - 1}")
    return rows


_SCHEMA = "(Tensor(a!) y, Tensor x, Tensor lora_A, Tensor lora_B, int[] ranks, Tensor ids, Tensor? spans, Tensor? places) -> ()"
for _name, _implementation in {"cobra::packed_lora_": _torch, "cobra::packed_lora_triton_": _triton}.items():
    torch.library.define(_name, _SCHEMA)
    torch.library.impl(_name, "default", _implementation)
    torch.library.register_fake(_name, lambda *operands: None)


def packed_lora_(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    ranks: Sequence[int],
    ids: Tensor | Segments,
    *,
    backend: Literal["torch", "triton"] = "torch",
) -> Tensor:
    """`packed_lora` in place: y holds base, and is returned with the updates added. Rows of id -1 are left alone."""
    _check(y, x, lora_A, lora_B, ranks, ids)
    prepared = isinstance(ids, Segments)
    operands = (y, x, lora_A, lora_B, ranks, *((ids.ids, ids.spans) if prepared else (ids, None)))
    if backend == "torch":
        torch.ops.cobra.packed_lora_.default(*operands, ids.order if prepared else None)
    elif backend == "triton":
        require_triton(x)
        torch.ops.cobra.packed_lora_triton_.default(*operands, ids.blocks if prepared else None)
    else:
        raise ValueError(f"no backend {backend!r}; there are 'torch' and 'triton'")
    return y


def packed_lora(
    base: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    ranks: Sequence[int],
    ids: Tensor | Segments,
    *,
    backend: Literal["torch", "triton"] = "torch",
) -> Tensor:
    """y_t = base_t + B_a A_a x_t with a = ids_t, and base_t where ids_t is -1.

    base: (T, N), the frozen layer's output
    x: (T, K)
    lora_A: (R, K), the adapters' rows one after another
    lora_B: (N, R), their columns, scaling included; stored best as the transposed view of a contiguous (R, N)
    ranks: rank of each adapter, 0 allowed, Σ ranks = R
    ids: (T,) int64 on the device of x, or its `segment_tokens`, which saves finding the tokens again in every layer
    backend: "triton" needs a CUDA device, and half precision or fp32; nothing else is tried where it cannot run

    out: (T, N), new; one dtype and device for all

    Raises RuntimeError where a gradient would be lost, ValueError where operands do not fit.
    """
    return packed_lora_(base.clone(), x, lora_A, lora_B, ranks, ids, backend=backend)


def _check(y, x, lora_A, lora_B, ranks, ids) -> None:
    tensors = {"base": y, "x": x, "lora_A": lora_A, "lora_B": lora_B}
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values()):
        names = ", ".join(name for name, t in tensors.items() if t.requires_grad)
        raise RuntimeError(f"packed_lora has no backward, and {names} requires grad: call it under torch.no_grad()")
    if any(r < 0 for r in ranks) or sum(ranks) != lora_A.shape[0]:
        raise ValueError(f"ranks {tuple(ranks)} must be 0 or more and sum to the {lora_A.shape[0]} rows of lora_A")
    ids = ids.ids if isinstance(ids, Segments) else ids
    T, K, N = len(ids), lora_A.shape[-1], lora_B.shape[0]
    expected = {"base": (T, N), "x": (T, K), "lora_A": (sum(ranks), K), "lora_B": (N, sum(ranks))}
    for name, t in tensors.items():
        if tuple(t.shape) != expected[name]:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}, expected {expected[name]} beside {T} ids, K = {K} and N = {N}"
            )
        if t.dtype != x.dtype or not t.dtype.is_floating_point:
            raise ValueError(f"{name} is {t.dtype} and x {x.dtype}; cast them to one floating dtype")
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device} and x on {x.device}; move them to one device")
    if ids.device != x.device and not x.is_meta:
        raise ValueError(f"ids are on {ids.device} and x on {x.device}; move them to one device")
