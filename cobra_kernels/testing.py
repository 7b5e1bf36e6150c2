"""What tests and benchmarks of the kernels share: operands, and the error budget that every fast path is held to."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

Gates = Literal["rank", "token", "closed"]
Layout = Literal["contiguous", "slices", "transposed"]


def make_inputs(
    rows: tuple[int, ...],
    K: int,
    N: int,
    r: int,
    *,
    gates: Gates | None = "rank",
    bias: bool = True,
    layout: Layout = "contiguous",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random operands of `gated_lora_linear` by name, scaled so that each term of y is of order 1.

    rows: leading shape of x
    gates: "rank" for z (r,), "token" for z (*rows, r), "closed" for z (r,) of zeros, None for no z
    layout: "slices" cuts x, weight, lora_A and lora_B out of larger buffers of NaN, "transposed" gives views of
        transposed buffers

    The values depend on the seed and the shapes alone: another dtype or device gets the same ones, rounded.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, fan: int = 1) -> Tensor:
        return (torch.randn(shape, generator=generator) / fan**0.5).to(device, dtype)

    inputs = {
        "x": normal(*rows, K),
        "weight": normal(N, K, fan=K),
        "lora_A": normal(r, K, fan=K),
        "lora_B": normal(N, r, fan=r),
    }
    inputs = {name: _laid_out(tensor, layout) for name, tensor in inputs.items()}
    if gates is not None:
        z = torch.rand((*rows, r) if gates == "token" else (r,), generator=generator)
        inputs["z"] = (z * (gates != "closed")).to(device, dtype)
    if bias:
        inputs["bias"] = normal(N)
    return inputs


def _laid_out(values: Tensor, layout: Layout) -> Tensor:
    if layout == "transposed":
        return values.mT.contiguous().mT if values.ndim > 1 else values
    if layout == "slices":
        buffer = values.new_full((*values.shape[:-1], values.shape[-1] + 5), float("nan"))
        buffer[..., 2:-3] = values
        return buffer[..., 2:-3]
    return values


def output_and_gradients(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """y of function(**inputs) and the gradient of every operand, `d` before its name, from one dy whatever the dtype."""
    leaves = {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in inputs.items()}
    y = function(**leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(99)).bfloat16().to(y.device, y.dtype)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_all_within_budget(
    fast: Callable[..., Tensor], ref: Callable[..., Tensor], draws: Sequence[dict[str, Tensor]], dtype: torch.dtype
) -> None:
    """Holds output and every gradient of `fast` to the budget of `assert_within_budget`; ref is plain torch, and the oracle."""

    def results(function: Callable[..., Tensor], dtype: torch.dtype | None = None) -> dict[str, list[Tensor]]:
        each = [output_and_gradients(function, inputs, dtype) for inputs in draws]
        return {name: [result[name] for result in each] for name in each[0]}

    found, plain, oracle = results(fast), results(ref, dtype), results(ref, torch.float64)
    for name, value in found.items():
        assert_within_budget(value, plain[name], oracle[name], dtype=dtype, name=name)


def assert_within_budget(
    fast: Tensor | Sequence[Tensor],
    ref: Tensor | Sequence[Tensor],
    oracle: Tensor | Sequence[Tensor],
    *,
    dtype: torch.dtype | None = None,
    name: str = "output",
) -> None:
    """Raises AssertionError unless error(fast) <= 2 error(ref) + eps(dtype) max|oracle|.

    fast, ref: the fast path and plain torch, from the same inputs
    oracle: plain torch in fp64, from the same inputs
    dtype: of the arithmetic; the dtype of `fast` unless given

    An error is the largest of a tensor. That of plain torch can be small by luck, so each argument may be several tensors, one
    for each draw of the inputs, and errors and magnitudes are then means over the draws.
    """
    fast, ref, oracle = ([t] if isinstance(t, Tensor) else list(t) for t in (fast, ref, oracle))
    shapes, *others = ([tuple(t.shape) for t in tensors] for tensors in (fast, ref, oracle))
    if any(other != shapes for other in others):
        raise AssertionError(f"{name}: shapes {shapes}, {others[0]} (ref) and {others[1]} (oracle) differ")
    error = _mean_of_largest(t.double() - exact for t, exact in zip(fast, oracle, strict=True))
    ref_error = _mean_of_largest(t.double() - exact for t, exact in zip(ref, oracle, strict=True))
    allowed = 2 * ref_error + torch.finfo(dtype or fast[0].dtype).eps * _mean_of_largest(oracle)
    if not error <= allowed:  # also where it is NaN
        raise AssertionError(f"{name}: error {error:.3g} exceeds {allowed:.3g}; plain torch's error is {ref_error:.3g}")


def _mean_of_largest(tensors: Iterable[Tensor]) -> float:
    return torch.stack([t.abs().max() if t.numel() else t.new_zeros(()) for t in tensors]).mean().item()
