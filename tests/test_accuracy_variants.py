"""Longer rows, gates of every example, ranks that grow: by their equations on small layers, to the budget on the real model."""

from functools import cache

import pytest
import torch
from accuracy_models import encoded, started, tiny
from models import Mlp, attached, layers_of, stir

import cobra
from bench.accuracy.forms import FITTED, LONG_COBRA
from bench.accuracy.methods import attach, budget_parameters
from bench.accuracy.run import _train
from bench.accuracy.variants import Growth, draw_per_example, fit_rows, scale_rows
from cobra.sites import find_sites


def test_rows_of_another_length():
    """All of lora_A, by one factor; the model's outputs stay."""
    model, adapter = attached(Mlp)
    x, before = torch.ones(3, 6), [layer.lora_A.clone() for layer in layers_of(adapter)]
    expected = model.eval()(x)
    scale_rows(adapter, 3.0)
    torch.testing.assert_close(model(x), expected)
    for layer, rows in zip(layers_of(adapter), before, strict=True):
        torch.testing.assert_close(layer.lora_A, 3 * rows)


def test_rows_fitted_to_what_they_see():
    """Over tokens that are not padding each row sees the same, what drawn rows see on average; the outputs stay."""
    model, seen = started(), {}
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=72, r_max=4, gate="open"))
    batches = [encoded().batch(range(4)), encoded().batch(range(4, 9))]
    batches[0]["attention_mask"][:, -3:] = 0
    expected = model.eval()(**batches[0]).logits
    fit_rows(adapter, batches)
    torch.testing.assert_close(model(**batches[0]).logits, expected)
    for layer in layers_of(adapter):
        layer.register_forward_pre_hook(lambda layer, args: seen.setdefault(layer, []).append(args[0]))
    for batch in batches:
        model(**batch)
    kept = torch.cat([batch["attention_mask"].bool().flatten() for batch in batches])
    for layer, inputs in seen.items():
        x = torch.cat([each.flatten(0, 1) for each in inputs])[kept]
        drawn = torch.empty(2000, layer.in_features).uniform_(-1, 1) * layer.in_features**-0.5
        sees = (x @ layer.lora_A.t()).square().mean(0)
        torch.testing.assert_close(sees, (x @ drawn.t()).square().mean().expand_as(sees), rtol=0.2, atol=0)
        torch.testing.assert_close(sees, sees.mean().expand_as(sees))


def test_every_example_has_gates_of_its_own():
    """Equal rows come out apart in training, each as with one draw of gates; not so in evaluation."""
    model, adapter = attached(Mlp)
    stir(adapter)
    expected = model.eval()(torch.ones(3, 6))
    draw_per_example(adapter, seed=1)
    torch.testing.assert_close(model(torch.ones(3, 6)), expected)
    layer, x = layers_of(adapter)[0].train(), torch.randn(3, 5, 6)
    torch.manual_seed(0)
    layer.forward.generator.manual_seed(7)
    y = layer(x)
    u = torch.rand(3, layer.rank, generator=torch.Generator().manual_seed(7))
    z = torch.sigmoid((layer.lora_gate + u.logit()) / layer.gate_temperature)
    h = (x @ layer.lora_A.T) * z[:, None]
    torch.testing.assert_close(y, x @ layer.weight.T + layer.bias + layer.scaling * h @ layer.lora_B.T)
    (gradient,) = torch.autograd.grad(y.sum(), layer.lora_gate)
    assert gradient.abs().min() > 0
    same = layer(torch.ones(3, 1, 6))
    assert not torch.equal(same[0], same[1]) and not torch.equal(same[1], same[2])


def test_ranks_grow_where_the_gradient_asks_for_its_parameters():
    """Closed columns stay as they are; in every round the layer with the most gradient for its size opens its next rank."""
    model, adapter = attached(Mlp, gate="open", rank_budget=4, r_max=4, total_steps=None)
    first, second = layers_of(adapter)
    cost = [layer.in_features + layer.out_features for layer in (first, second)]
    growth = Growth(adapter, amount=sum(cost) + 2 * max(cost), rounds=2, until=4)
    names = list(growth.ranks)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
    for step in range(1, 5):
        model(torch.linspace(-1, 1, 30).reshape(5, 6)).square().sum().backward()
        for layer, rank in zip((first, second), growth.ranks.values(), strict=True):
            assert not layer.lora_B.grad[:, rank:].any() and layer.lora_B.grad[:, :rank].any()
        optimizer.step()
        optimizer.zero_grad()
        before = dict(growth.ranks)
        wanted = torch.tensor([growth.wanted[n][before[n]] / c for n, c in zip(names, cost, strict=True)])
        growth.after_step(step)
        grown = [name for name in names if growth.ranks[name] > before[name]]
        if step == 2:
            assert names[wanted.argmax()] in grown
        assert bool(grown) == (step % 2 == 0)
    assert growth.amount - min(cost) < growth.spent <= growth.amount
    with pytest.raises(ValueError, match="a budget of 3 parameters has no first rank for every layer, which takes"):
        Growth(adapter, amount=3, rounds=2, until=4)


@cache
def scores() -> cobra.LayerScores:
    return cobra.calibrate(started(), [encoded().batch(range(6))], steps=2, progress=False, directions=16)


@pytest.mark.filterwarnings("ignore:the path integral misses")
@pytest.mark.parametrize(
    "change",
    [
        {"drawn": "example", "row_scale": 3.0},
        {"row_scale": FITTED},
        {"gate": "open", "rounds": 3},
        {"gate": "hard_concrete", "objective": "count"},
    ],
    ids=str,
)
def test_variants_of_the_form_end_at_its_budget(change):
    recipe = tiny("cobra", rank=8, settings=tuple({**LONG_COBRA, **change}.items()))
    found = attach(recipe, started(), scores(), lambda: [encoded().batch(range(6))])
    losses = _train(found, encoded(), recipe)
    assert torch.tensor(losses).isfinite().all()
    ranks, budget = found.ranks(), budget_parameters(find_sites(started()), 8)
    assert found.parameters() == pytest.approx(budget, rel=0.01) and min(ranks.values()) >= 1 and len(set(ranks.values())) > 1
