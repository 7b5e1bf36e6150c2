"""A training step's forward and backward on MiniLM, all 36 linears adapted, batch 16 × 64: what an adapter adds.

`run_on_cuda` is for `make gpu`: single layers of LLaMA-7B beside the bare products of the frozen layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cobra
from bench.cuda import compare_on_cuda
from bench.workload import batch, forward_backward, minilm
from cobra.sites import find_sites
from cobra.timing import Comparison, compare
from cobra_kernels import gated_lora_linear, gated_lora_linear_ref
from cobra_kernels.testing import assert_all_within_budget, make_inputs

FROZEN = "frozen model, gradient to the embeddings"
BARE = "frozen layer"
LAYERS = ((4096, 4096), (4096, 11008), (11008, 4096))
SCALING = 2.0


def run(rounds: int = 15) -> list[Comparison]:
    base, inputs = minilm(), batch(16, 64)
    names = [site.name for site in find_sites(base)]
    alternatives = {
        FROZEN: _frozen(base),
        "cobra LoRA r=8": _cobra(base, 8, "open"),
        "cobra LoRA r=16": _cobra(base, 16, "open"),
        "cobra gates r_max=16": _cobra(base, 16, "concrete"),
        "peft LoRA r=8": _peft(base, peft.LoraConfig(r=8, lora_alpha=16, target_modules=names)),
        "peft LoRA r=16": _peft(base, peft.LoraConfig(r=16, lora_alpha=32, target_modules=names)),
        "peft AdaLoRA r=8": _peft(
            base, peft.AdaLoraConfig(init_r=8, target_r=4, total_step=1000, tinit=10, tfinal=10, target_modules=names)
        ),
    }
    steps = {name: forward_backward(model, inputs) for name, model in alternatives.items()}
    gated = {name: steps[name] for name in ("cobra LoRA r=16", "cobra gates r_max=16")}
    return [
        compare("forward + backward, MiniLM 16 × 64", FROZEN, steps, rounds),
        compare("forward + backward with gates", "cobra LoRA r=16", gated, 2 * rounds),
    ]


def _frozen(base: nn.Module) -> nn.Module:
    """Every weight frozen; the embeddings' output asks for a gradient, so that the backward runs through all layers."""
    model = copy.deepcopy(base).requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    return model


def _cobra(base: nn.Module, rank: int, gate: str) -> nn.Module:
    model = copy.deepcopy(base)
    sites = len(find_sites(model))
    cobra.attach(model, cobra.CobraConfig(rank_budget=8 * sites, r_max=rank, gate=gate, total_steps=1000, modules_to_save=()))
    return model


def _peft(base: nn.Module, config: peft.PeftConfig, **options) -> nn.Module:
    return peft.get_peft_model(copy.deepcopy(base), config, **options)


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
        "eager": reference,
    }
    if case.compiled:
        functions["torch.compile"] = torch.compile(reference)
    if case.gates == "open":
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


class _PeftLayer:
    """peft's own layer with its matrices in the layer's dtype: what it does without casting x to fp32."""

    def __init__(self, case: Case):
        linear = nn.Linear(case.K, case.N, device="cuda", dtype=torch.bfloat16)
        config = peft.LoraConfig(r=case.r, lora_alpha=SCALING * case.r, target_modules=["0"])
        self.model = _peft(nn.Sequential(linear), config, autocast_adapter_dtype=False)

    def __call__(self, x: Tensor, **others: Tensor) -> Tensor:
        return self.model(x)
