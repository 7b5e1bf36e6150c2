"""The sweep against captum, Eq. (1) as a loop, completeness of the direct estimator, and what a sweep may not change."""

import copy
import gc
import math
import weakref
from functools import partial

import pytest
import torch
from captum.attr import LayerConductance
from models import Mlp, minilm, mlp_batch, review_batch
from torch import nn
from torch.nn import functional as F

import cobra
from cobra.batch import Batch
from cobra.conductance import Attribution, attribute
from cobra.entry import find_entry
from cobra.objective import default_target
from cobra.path import ESTIMATORS, QUADRATURES, path_rule
from cobra.sites import find_sites
from cobra.watch import frozen

pytestmark = pytest.mark.filterwarnings("ignore:the path integral misses")

CAPTUM = {"midpoint": "riemann_middle", "gausslegendre": "gausslegendre"}


def sweep(model, sites, values, estimator="paper", quadrature="midpoint", steps=4, baseline="zero", **options) -> Attribution:
    batch = Batch.from_loader(values, torch.device("cpu"), 0)
    with frozen(model):
        return attribute(
            model,
            sites,
            find_entry(model, batch, baseline),
            batch,
            path_rule(estimator, quadrature, steps),
            partial(default_target, model),
            direct=estimator == "direct",
            **options,
        )


def residual(found: Attribution) -> float:
    """What sites and bypass miss of F(x) - F(x0), as a share of it."""
    missed = found.sites.sum(1) + found.entry - found.change
    return (missed.abs().mean() / found.change.abs().mean()).item()


@pytest.fixture(scope="module")
def model():
    return minilm()


@pytest.fixture(scope="module")
def values():
    """Three reviews of 7 to 14 tokens, padded."""
    batch = {key: value[[0, 1, 3]] for key, value in review_batch().items()}
    kept = batch["attention_mask"].any(0)
    return {key: value if key == "labels" else value[:, kept] for key, value in batch.items()}


def captum_conductance(model, layer, values, method, steps):
    """captum's attribution of every neuron, (B, tokens x features)."""
    embeds = model.get_input_embeddings()(values["input_ids"]).detach()

    def forward(inputs_embeds, attention_mask):
        return model(inputs_embeds=inputs_embeds, attention_mask=attention_mask).logits

    found = LayerConductance(forward, layer).attribute(
        embeds,
        torch.zeros_like(embeds),
        target=values["labels"],
        additional_forward_args=values["attention_mask"],
        n_steps=steps,
        method=method,
    )
    return found.double().flatten(1)


@pytest.mark.parametrize(
    ("quadrature", "dtype", "tolerance"),
    [
        ("midpoint", torch.float32, 1e-5),
        pytest.param("gausslegendre", torch.float32, 1e-5, marks=pytest.mark.slow),
        ("gausslegendre", torch.float64, 1e-12),
    ],
    ids=["midpoint-fp32", "gausslegendre-fp32", "gausslegendre-fp64"],
)
def test_equals_captum_at_every_linear(model, values, quadrature, dtype, tolerance, record_property):
    """captum runs layer by layer, the sweep takes all 38 linears at once, masked padding included.

    The error is relative to Σ|attributions of neurons|, the mean over examples: signed sums cancel to as little as 1e-5 of
    that, and so does the meaning of an error relative to the sum itself.
    """
    model = model if dtype == torch.float32 else copy.deepcopy(model).double()
    sites = find_sites(model, ".*")
    assert len(sites) == 38 and not values["attention_mask"].all()
    neurons = [captum_conductance(model, site.module, values, CAPTUM[quadrature], steps=3) for site in sites]
    expected = torch.stack([n.sum(1) for n in neurons], 1)
    scale = torch.stack([n.abs().sum(1).mean() for n in neurons])
    error = (sweep(model, sites, values, "conductance", quadrature, steps=3).sites - expected).abs() / scale
    record_property("max_relative_error", error.max().item())
    assert error.max() < tolerance


def test_one_sweep_for_all_sites(model, values):
    """Whatever the number of sites: one forward for both ends of the path, one for the points between."""
    rows = []
    handle = model.register_forward_hook(lambda module, args, output: rows.append(len(output.logits)))
    with handle:
        sweep(model, find_sites(model, ".*"), values, steps=4)
    assert rows == [2 * 3, 4 * 3]


def test_paper_equals_equation_1_as_a_loop(model, values):
    """A = Σ_j (h_j(x) - h_j(x0)) · mean of dF/dh_j, one point of the path at a time."""
    model = copy.deepcopy(model).double()
    sites, steps, outputs = find_sites(model, ".*"), 3, {}
    embeds = model.get_input_embeddings()(values["input_ids"]).detach()

    def outputs_at(alpha):
        logits = model(inputs_embeds=(alpha * embeds).requires_grad_(), attention_mask=values["attention_mask"]).logits
        return logits.gather(1, values["labels"][:, None]).sum(), [outputs[site.name] for site in sites]

    handles = [s.module.register_forward_hook(lambda _m, _a, out, n=s.name: outputs.update({n: out})) for s in sites]
    (_, start), (_, end) = outputs_at(0.0), outputs_at(1.0)
    gradients = [torch.autograd.grad(*outputs_at((k + 0.5) / steps)) for k in range(steps)]
    for handle in handles:
        handle.remove()
    means = [sum(layer) / steps for layer in zip(*gradients, strict=True)]
    expected = torch.stack([((b - a) * g).flatten(1).sum(1) for a, b, g in zip(start, end, means, strict=True)], 1)
    torch.testing.assert_close(sweep(model, sites, values, "paper", "midpoint", steps).sites, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("quadrature", "bound"), [("trapezoid", 2e-2), ("lobatto", 2e-4)])
def test_direct_is_complete_on_minilm(model, values, quadrature, bound):
    """Sites and bypass sum to F(x) - F(x0) over all of the encoder, through its attention and norms."""
    found = sweep(model, find_sites(model, r"bert\.encoder\..*"), values, "direct", quadrature, steps=33)
    assert residual(found) < bound
    assert found.entry.abs().min() > 0


class PreNorm(nn.Module):
    """A residual stream of three blocks, smooth along the path: its norms are far from singular."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width, eps=1.0), nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, width)) for _ in range(3)
        )
        self.norm, self.classifier = nn.LayerNorm(width, eps=1.0), nn.Linear(width, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.classifier(self.norm(x).mean(1))


@pytest.fixture
def prenorm():
    """Model, sites and sweep options of the residual net, fp64."""
    model = PreNorm().double()
    return model, find_sites(model), (torch.randn(4, 5, 8).double(), torch.tensor([0, 1, 2, 0])), torch.randn(5, 8).double()


def test_direct_is_exact_on_a_smooth_net(prenorm):
    """Only layers that write to the residual stream have direct ways to F; they and the bypass make up all of it."""
    model, sites, values, baseline = prenorm
    found = sweep(model, sites, values, "direct", "lobatto", 25, baseline)
    assert residual(found) < 1e-9
    writes = torch.tensor([site.name.endswith(".3") for site in sites])
    assert torch.equal(found.sites.abs().amin(0) > 0, writes)


@pytest.mark.parametrize(("quadrature", "order"), [("midpoint", 1), ("gausslegendre", 1), ("trapezoid", 2)])
def test_direct_converges_in_order(prenorm, quadrature, order):
    """captum's differences leave out the ends of the path, an error of 1/n; the trapezoid's falls with 1/n²."""
    model, sites, values, baseline = prenorm
    coarse, fine = (residual(sweep(model, sites, values, "direct", quadrature, n, baseline)) for n in (65, 129))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("estimator", ["paper", "conductance"])
def test_entry_is_complete_for_both_total_estimators(prenorm, estimator):
    """At the entry everything passes: the sum there is F(x) - F(x0), whatever layers say (and Eq. 1 need not sum to it)."""
    model, sites, values, baseline = prenorm
    found = sweep(model, sites, values, estimator, "lobatto", 25, baseline)
    torch.testing.assert_close(found.entry, found.change, rtol=1e-9, atol=1e-11)
    assert (found.sites.sum(1) - found.change).abs().min() > 1e-3


class Twice(nn.Module):
    """Two uses of one weight: of one module, of two modules that share it, or (to compare with) of two equal modules."""

    def __init__(self, how: str):
        super().__init__()
        self.first, self.classifier = nn.Linear(6, 6), nn.Linear(6, 3)
        self.second = self.first if how == "module" else copy.deepcopy(self.first)
        if how == "weight":
            self.second.weight = self.first.weight

    def forward(self, x):
        x = x + torch.tanh(self.first(x))
        return self.classifier(x + torch.tanh(self.second(x)))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("how", ["module", "weight"])
def test_shared_weights_add_up(how, estimator):
    """A site is a weight: its attribution is the sum over its uses."""
    values = mlp_batch()
    shared = Twice(how)
    separate = Twice("copies")
    separate.load_state_dict({**shared.state_dict(), "second.bias": shared.second.bias})
    found = sweep(shared, find_sites(shared), values, estimator)
    expected = sweep(separate, find_sites(separate), values, estimator)
    assert found.sites.shape == (5, 1) and expected.sites.shape == (5, 2)
    torch.testing.assert_close(found.sites[:, 0], expected.sites.sum(1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_does_not_move_scores_nothing(estimator):
    """A use on what all examples share (DeBERTa's relative positions) stands still along the path and adds no score."""

    class Positioned(Mlp):
        positions, scale = torch.randn(1, 3, 6), None

        def forward(self, x):
            scale = self.up(self.positions).square().mean() if self.scale is None else self.scale
            return super().forward(x) * scale

    model, values = Positioned(), mlp_batch(tokens=3)
    found = sweep(model, find_sites(model), values, estimator)
    model.scale = model.up(model.positions).square().mean().detach()
    expected = sweep(model, find_sites(model), values, estimator)
    torch.testing.assert_close(found.sites, expected.sites, rtol=1e-6, atol=0)


class Activated(nn.Module):
    """Linears under an activation that may overwrite its input."""

    def __init__(self, activation):
        super().__init__()
        self.up, self.down, self.classifier = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.activation = activation

    def forward(self, x):
        x = x + self.activation(self.up(x))
        x = x + self.activation(self.down(x))
        return self.classifier(x.mean(1) if x.ndim == 3 else x)


def activated(activation) -> nn.Module:
    torch.manual_seed(1)
    return Activated(activation).double()


@pytest.mark.parametrize("tokens", [None, 4], ids=["vectors", "sequences"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.SiLU(inplace=True)], ids=["relu", "silu"])
def test_inplace_modules(activation, estimator, tokens):
    """h is what the linear gave, also where a module overwrites it before the gradient arrives."""
    x, y = mlp_batch(tokens=tokens)
    plain = activated(type(activation)())
    model = activated(activation)
    found, expected = (sweep(m, find_sites(m), (x.double(), y), estimator).sites for m in (model, plain))
    assert expected.abs().min() > 0
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tokens", [None, 4], ids=["vectors", "sequences"])
@pytest.mark.parametrize("estimator", ["paper", "conductance"])
def test_inplace_function_is_refused(estimator, tokens):
    """Nothing announces a functional write, so it is seen too late: the error names the layer and the way out."""
    model = activated(F.relu_)
    x, y = mlp_batch(tokens=tokens)
    with pytest.raises(RuntimeError, match=r"writes in place over the output of (up|down); write that operation out of place"):
        sweep(model, find_sites(model), (x.double(), y), estimator)


@pytest.mark.parametrize("max_rows", [1, 7, 13, 25])
@pytest.mark.parametrize("quadrature", QUADRATURES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_row_limit_changes_nothing(estimator, quadrature, max_rows):
    """Examples and path points are split to stay under the limit, 3 rows being the least a rule can do with."""
    x, y = mlp_batch(tokens=3)
    model, values, rows = Mlp().double(), (x.double(), y), []
    sites = find_sites(model)
    whole = sweep(model, sites, values, estimator, quadrature, 6)
    with model.up.register_forward_hook(lambda module, args, output: rows.append(len(output))):
        found = sweep(model, sites, values, estimator, quadrature, 6, max_rows=max_rows)
    torch.testing.assert_close(found.sites, whole.sites, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.entry, whole.entry, rtol=1e-12, atol=1e-14)
    least = 6 if quadrature == "lobatto" and estimator != "paper" else 3
    assert max(rows) <= max(max_rows, least)


def test_small_chunk_bytes_change_nothing(model, values):
    """The same through the public option, where the limit comes from measured bytes of a row."""
    scores = [cobra.calibrate(model, [values], steps=3, quadrature="trapezoid", chunk_bytes=b) for b in (1, 1 << 29)]
    scale = scores[1].attributions.abs().mean(0)
    assert ((scores[0].attributions - scores[1].attributions).abs() / scale).max() < 1e-3


class WithDeadEnd(Mlp):
    """A layer whose output goes nowhere: no gradient ever arrives there."""

    def __init__(self):
        super().__init__()
        self.dead = nn.Linear(6, 5)

    def forward(self, x):
        self.dead(x)
        return super().forward(x)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("build", [Mlp, WithDeadEnd])
def test_no_output_outlives_the_sweep(build, estimator):
    """Every output is let go as its gradient is reduced, without waiting for the garbage collector."""
    model, alive = build(), []
    for site in find_sites(model):
        site.module.register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))
    gc.collect()
    gc.disable()
    try:
        sweep(model, find_sites(model), mlp_batch(), estimator)
        assert len(alive) >= 4 and not any(output() is not None for output in alive)
    finally:
        gc.enable()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("fails", [False, True])
def test_model_is_as_before(estimator, fails):
    """Modes, flags, gradients, hooks and weights, also when the target raises in the middle."""
    model = nn.Sequential(Mlp(), nn.Dropout(0.5), nn.Linear(3, 3)).train()
    model[0].mid.eval()
    model[0].up.weight.requires_grad_(False)
    model[2].bias.grad = torch.ones(3)

    def state():
        modules = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        return modules, [(p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in model.parameters()]

    def target(outputs, batch):
        if fails:
            raise ArithmeticError
        return outputs.sum(1)

    before, weights = state(), copy.deepcopy(model.state_dict())
    with pytest.raises(ArithmeticError) if fails else torch.enable_grad():
        cobra.calibrate(model, [mlp_batch()], steps=2, estimator=estimator, quadrature="trapezoid", target=target)
    assert state() == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
