"""Forward and backward of `gated_lora_linear` from the Triton kernels: h and g once, dy read once where that is less to read.

Operands are 2-D and have tokens; shapes and symbols are those of `gated_lora_linear_triton`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cobra_kernels import gated_lora_configs as configs
from cobra_kernels import gated_lora_launch as launch


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gate: Tensor | None,
    temperature: Tensor | None,
    draw: Tensor | None,
    scaling: float,
    keep_closed: bool,
) -> tuple[Tensor, ...]:
    """-> y (M, N), h (M, R), h with the tokens' gates or empty, z (r,), source (R,), extent (2,)

    gate: (r,) or (M, r) gates, (r,) logits with a draw, or None
    temperature, draw: () fp32 and (5,) int32 as in `ConcreteSample`, or None for given gates
    keep_closed: closed gates get their dz too, which needs their h
    """
    wide = configs.is_wide_layer(weight)
    x = _dense(x) if wide else x
    r, per_token = len(lora_A), gate is not None and gate.ndim == 2
    kind = "sampled" if draw is not None else "open" if gate is None else "given"
    rank_tile = configs.pick_rank_tile(r, wide)
    R = configs.padded_rank(r, rank_tile, kind == "given")
    z = launch.empty(x, r, dtype=torch.float32)
    source, extent = launch.empty(x, R, dtype=torch.int32), launch.empty(x, 2, dtype=torch.int32)
    branch = launch.Branch(z, source, extent, 1.0 if per_token else scaling, rank_tile, wide)
    with torch.cuda.device_of(x):
        of_ranks = (gate != 0).any(0).float() if per_token else gate  # closed for all tokens is closed
        packed_A, folded_B = launch.fold(x, lora_A, lora_B, branch, kind, of_ranks, temperature, draw, keep_closed)
        h, gated, _ = launch.shrink(x, packed_A, branch, (gate, scaling) if per_token else None, with_closed=keep_closed)
        y = _frozen(x, weight.t(), gated if per_token else h, folded_B, bias, branch, kind == "given")
    return y, h, gated, z, source, extent


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gate: Tensor | None,
    temperature: Tensor | None,
    h: Tensor,
    gated: Tensor,
    z: Tensor,
    source: Tensor,
    extent: Tensor,
    scaling: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dx, dA, dB and the gradient of gate, each empty where `needs` (x, A, B, gate) says that it is not wanted."""
    needs_x, needs_A, needs_B, needs_gate = needs
    wide = configs.is_wide_layer(weight)
    dy, x = (_dense(dy), _dense(x)) if wide else (dy, x)
    per_token = gate is not None and gate.ndim == 2
    rank_tile = configs.pick_rank_tile(len(lora_A), wide)
    branch = launch.Branch(z, source, extent, 1.0 if per_token else scaling, rank_tile, wide)
    token_gates = (gate, scaling) if per_token else None
    dx = dA = dB = dgate = None
    needs_g = needs_x or needs_A or (needs_gate and per_token)
    needs_sums = needs_B or (needs_gate and not per_token)
    with torch.cuda.device_of(x):
        folded_A, packed_B = launch.fold(dy, lora_A, lora_B, branch, "known")
        one_pass = needs_g and needs_sums and configs.pick_one_pass(len(lora_A), rank_tile, launch.arch(dy))
        if needs_sums:
            sums, g_planes = launch.tokens(dy, gated if per_token else h, packed_B if one_pass else None, branch)
        if needs_g:
            h_of_dz = h if per_token and needs_gate else None
            if one_pass:
                g, gated_g, dz = launch.rows(g_planes, branch, dy.dtype, token_gates, h_of_dz)
            else:
                g, gated_g, dz = launch.shrink(dy, packed_B, branch, token_gates, h_of_dz, h_of_dz is not None)
            if per_token:
                g, dgate = gated_g, dz if needs_gate else None
        if needs_sums:
            dB, partial = launch.columns(sums, lora_B.t(), branch, closed=True, with_dz=needs_gate and not per_token)
            dB = dB.t() if needs_B else None
            if needs_gate and not per_token:
                dgate = launch.dz(partial, branch, gate, temperature)
        if needs_A:
            sums, _ = launch.tokens(x, g, None, branch, closed=False)
            dA, _ = launch.columns(sums, lora_A, branch, closed=False)
        if needs_x:
            dx = _frozen(dy, weight, g, folded_A, None, branch, gate is not None and temperature is None)
    return tuple(launch.empty(dy, 0) if gradient is None else gradient for gradient in (dx, dA, dB, dgate))


def _frozen(
    x: Tensor, weight: Tensor, h: Tensor, folded: Tensor, bias: Tensor | None, branch: launch.Branch, has_closed: bool
) -> Tensor:
    """h folded + x weight + bias, in one product or in two, whichever the roofline says; weight (K, N)"""
    (M, K), N = x.shape, weight.shape[1]
    if configs.pick_base_path(M, K, N, branch.padded_rank, branch.wide, launch.arch(x)) == "fused":
        return launch.base(x, weight, h, folded, bias, branch)
    if has_closed:  # what is past the open ranks may be unwritten, or not finite
        closed = torch.arange(branch.padded_rank, device=x.device) >= branch.extent[0]
        h, folded = h.masked_fill(closed, 0), folded.masked_fill(closed[:, None], 0)
    y = x @ weight if bias is None else torch.addmm(bias, x, weight)
    return y.addmm_(h, folded)


def _dense(x: Tensor) -> Tensor:
    """x itself where its rows are wide, else a copy: loads of odd strides cost more than it."""
    wide = x.stride(1) == 1 and x.stride(0) % 16 == x.data_ptr() % 16 == 0
    return x if wide else x.clone(memory_format=torch.contiguous_format)
