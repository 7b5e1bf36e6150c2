"""Gates and KL of a whole model, forward and backward: one call beside a call a layer; and their part of a training step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, kl_divergence

import cobra
from bench import workload
from cobra.linear import CobraLinear
from cobra.sites import find_sites
from cobra.timing import Comparison, compare
from cobra_kernels import cuda_extension, gate_noise, gates_and_kl

NEEDS_CUDA = True  # the cases for a device
MODELS = {"MiniLM": (36, 16), "7B": (224, 64)}  # linears, gates of each
DRAW = dict(seed=1, step=7, temperature=0.5)
STRETCH = (-0.1, 1.1)
TOGETHER, APART = "all sites at once", "a layer at a time"


def run(rounds: int = 200) -> list[Comparison]:
    cases = [("MiniLM", None, rounds), ("MiniLM", STRETCH, rounds), ("7B", None, max(1, rounds // 5))]
    return [*(_beside_layers(*case) for case in cases), _part_of_a_step(max(1, rounds // 10))]


def _beside_layers(model: str, stretch: tuple[float, float] | None, rounds: int) -> Comparison:
    """z, kl and the gradient of Σ z + Σ kl; raises AssertionError, and times nothing, where the two differ."""
    sites, ranks = MODELS[model]
    logits, prior = torch.randn(2, sites, ranks)
    leaf, layers = logits.clone().requires_grad_(), [row.clone().requires_grad_() for row in logits]

    def together(**options) -> Tensor:
        gates = gates_and_kl(leaf, prior, **DRAW, stretch=stretch, **options)
        return gates.z.sum() + gates.kl.sum()

    def apart(draw: Callable[[int], Tensor] = lambda site: torch.rand(ranks).clamp(1e-6, 1 - 1e-6).logit()) -> Tensor:
        return sum(_eager_layer(layer, prior[site], draw(site), stretch) for site, layer in enumerate(layers))

    noise = gate_noise(sites, ranks, seed=DRAW["seed"], step=DRAW["step"])
    totals = [together(), apart(lambda site: noise[site])]
    gradients = [torch.autograd.grad(totals[0], leaf)[0], torch.stack(torch.autograd.grad(totals[1], layers))]
    torch.testing.assert_close(*totals, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    kind = "gates" if stretch is None else "hard gates"
    alternatives = {TOGETHER: _backward(together, [leaf]), APART: _backward(apart, layers)}
    return compare(f"{kind} + KL, {sites} × {ranks}", TOGETHER, alternatives, rounds)


def _eager_layer(logits: Tensor, prior: Tensor, noise: Tensor, stretch: tuple[float, float] | None) -> Tensor:
    z = torch.sigmoid((logits + noise) / DRAW["temperature"])
    if stretch is not None:
        z = (stretch[0] + (stretch[1] - stretch[0]) * z).clamp(0, 1)
    return z.sum() + kl_divergence(Bernoulli(logits=logits), Bernoulli(logits=prior)).sum()


def _backward(total: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        total().backward()
        for leaf in leaves:
            leaf.grad = None

    return run


def _part_of_a_step(rounds: int) -> Comparison:
    """MiniLM at 16 × 64 with r_max 16: a training step's forward and backward, and what its gates take of it."""
    model = copy.deepcopy(workload.minilm())
    sites = len(find_sites(model))
    config = cobra.CobraConfig(rank_budget=8 * sites, r_max=16, total_steps=10**6, modules_to_save=())
    adapter = cobra.attach(model.train(), config)
    layers = [module for module in model.modules() if isinstance(module, CobraLinear)]
    inputs = workload.batch(16, 64)
    logits = torch.stack([layer.lora_gate.detach() for layer in layers]).requires_grad_()
    prior = logits.detach().clone()

    def step() -> None:
        (model(**inputs).loss + adapter.kl_loss()).backward()
        _clear(model)
        adapter.step()

    def gates_of_the_step() -> None:
        total = adapter.kl_loss() + sum(layer.gates().sum() for layer in layers)
        total.backward()
        _clear(model)
        adapter.step()

    def together() -> Tensor:
        gates = gates_and_kl(logits, prior, **DRAW)
        return gates.z.sum() + gates.kl.sum()

    alternatives = {
        "training step": step,
        "its gates, KL and draw, as the adapter takes them": gates_of_the_step,
        "gates and KL, all sites at once": _backward(together, [logits]),
    }
    return compare("MiniLM 16 × 64, gates r_max=16", "training step", alternatives, rounds)


def _clear(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None


def cuda_cases() -> list[str]:
    return list(MODELS)


def run_on_cuda(case: str, rounds: int = 50) -> list[Comparison]:
    """The kernels beside torch's own operations on the device. Raises AssertionError where their bits are not the CPU's."""
    from bench.cuda import compare_on_cuda

    sites, ranks = MODELS[case]
    logits, prior = torch.randn(2, sites, ranks)
    leaf, on_device = logits.cuda().requires_grad_(), prior.cuda()
    expected = gates_and_kl(logits, prior, **DRAW)
    backends = ["triton", *(["cuda"] if cuda_extension.load() else [])]
    for backend in backends:
        found = gates_and_kl(leaf, on_device, **DRAW, backend=backend)
        assert all(torch.equal(t.cpu(), other) for t, other in zip(found, expected, strict=True)), backend

    def total(backend: str | None) -> Tensor:
        gates = gates_and_kl(leaf, on_device, **DRAW, backend=backend)
        return gates.z.sum() + gates.kl.sum()

    alternatives = {backend or "torch": _backward(partial(total, backend), [leaf]) for backend in (*backends, None)}
    return [compare_on_cuda(f"gates + KL, {sites} × {ranks}", "triton", alternatives, rounds)]
