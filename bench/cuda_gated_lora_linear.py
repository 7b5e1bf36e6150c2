"""Single layers of LLaMA-7B on a CUDA device, beside the bare products of the frozen layer: cases of `make gpu`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.cuda import compare_on_cuda
from cobra.timing import Comparison
from cobra_kernels import gated_lora_linear, gated_lora_linear_ref
from cobra_kernels.testing import assert_all_within_budget, make_inputs

NEEDS_CUDA = True
BARE = "frozen layer"
LAYERS = ((4096, 4096), (4096, 11008), (11008, 4096))
SCALING = 2.0


@dataclass(frozen=True)
class Case:
    """A layer in bf16; gates "trained" are open and get a gradient, "open", "half" and "closed" are fixed."""

    K: int
    N: int
    tokens: int
    r: int
    gates: str = "open"
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.K} → {self.N}, {self.tokens} tokens, r={self.r}, gates {self.gates}"


def cuda_cases() -> list[Case]:
    """Most telling first: a run that is out of time has lost the last."""
    cases = [Case(K, N, 8192, r, compiled=K == N) for r, (K, N) in product((16, 64), LAYERS)]
    cases += [Case(4096, 4096, 8192, r, gates) for gates, r in product(("trained", "half", "closed"), (16, 64, 512))]
    cases += [Case(4096, 4096, tokens, 16) for tokens in (1, 16, 128, 1024)]
    cases += [Case(4096, 4096, 8192, r) for r in (8, 128, 256, 512)]
    return cases + [Case(4096, 11008, tokens, r, "trained") for tokens, r in product((1, 1024), (16, 64))]


def run_on_cuda(case: Case, rounds: int = 20) -> list[Comparison]:
    """Forward, then forward + backward. Raises AssertionError, and times nothing, where the Triton path is out of budget."""
    inputs = _inputs(case)
    triton = partial(gated_lora_linear, scaling=SCALING, backend="triton")
    reference = partial(gated_lora_linear_ref, scaling=SCALING)
    assert_all_within_budget(triton, reference, [inputs], torch.bfloat16)
    functions = {
        BARE: _frozen_layer,
        "cobra, cuBLAS": partial(gated_lora_linear, scaling=SCALING),
        "cobra, Triton": triton,
        "addmm": _addmm_layer,
        "eager": reference,
    }
    if case.compiled:
        functions["torch.compile"] = torch.compile(reference)
    if case.gates == "open" and find_spec("peft"):
        functions["peft"] = _PeftLayer(case)
    forward = {name: partial(function, **inputs) for name, function in functions.items()}
    both = {name: _forward_backward(function, inputs, case) for name, function in functions.items()}
    with torch.no_grad():
        comparisons = [compare_on_cuda(f"forward, {case}", BARE, forward, rounds)]
    return [*comparisons, compare_on_cuda(f"forward + backward, {case}", BARE, both, rounds)]


def _inputs(case: Case) -> dict[str, Tensor]:
    inputs = make_inputs((case.tokens,), case.K, case.N, case.r, dtype=torch.bfloat16, device="cuda")
    if case.gates == "half":
        inputs["z"][::2] = 0
    elif case.gates != "trained":
        inputs["z"].fill_(case.gates == "open")
    return inputs


def _forward_backward(function: Callable[..., Tensor], inputs: dict[str, Tensor], case: Case) -> Callable[[], object]:
    """The gradients of x and of what is trained: A, B, and the gates where they are."""
    trained = ("x", "lora_A", "lora_B", *(("z",) if case.gates == "trained" else ()))
    leaves = {name: t.detach().requires_grad_(name in trained) for name, t in inputs.items()}
    dy = torch.randn(case.tokens, case.N, dtype=torch.bfloat16, device="cuda")
    wanted = [leaves[name] for name in trained]
    if isinstance(function, _PeftLayer):
        wanted = [leaves["x"], *(p for p in function.model.parameters() if p.requires_grad)]
    if function is _frozen_layer:
        wanted = [leaves["x"]]
    return lambda: torch.autograd.grad(function(**leaves), wanted, dy)


def _frozen_layer(x: Tensor, weight: Tensor, bias: Tensor, **small: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def _addmm_layer(x: Tensor, weight: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor, z: Tensor) -> Tensor:
    """As the fused layers of other libraries have it: the update added to the frozen product in one call."""
    return torch.addmm(F.linear(x, weight, bias), x @ lora_A.t(), (lora_B * z).t(), alpha=SCALING)


class _PeftLayer:
    """peft's own layer with its matrices in the layer's dtype: what it does without casting x to fp32."""

    def __init__(self, case: Case):
        import peft

        linear = nn.Linear(case.K, case.N, device="cuda", dtype=torch.bfloat16)
        config = peft.LoraConfig(r=case.r, lora_alpha=SCALING * case.r, target_modules=["0"])
        self.model = peft.get_peft_model(nn.Sequential(linear), config, autocast_adapter_dtype=False)

    def __call__(self, x: Tensor, **others: Tensor) -> Tensor:
        return self.model(x)
