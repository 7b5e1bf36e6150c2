"""Every method on the real model: equal budgets after its schedule, ranks as they are, and refusals."""

import copy
import re
from functools import cache

import peft
import pytest
import torch
from accuracy_models import encoded, started, tiny
from models import Mlp

import cobra
from bench.accuracy.bf16 import bf16_products
from bench.accuracy.forms import FEW_LAYERS, SETTINGS, TIGHT
from bench.accuracy.methods import FULL, METHODS, Attached, _peft_optimizer, attach, budget_parameters, needs_scores
from bench.accuracy.recipe import Recipe
from bench.accuracy.run import _train
from cobra.sites import find_sites

pytestmark = pytest.mark.filterwarnings("ignore:the path integral misses")
RANK = 8
WIDEST = 384 + 1536  # parameters of one rank of the widest layers


@pytest.fixture(autouse=True, scope="module")
def products():
    """As in a run."""
    with bf16_products():
        yield


@cache
def scores() -> cobra.LayerScores:
    return cobra.calibrate(started(), [encoded().batch(range(6))], steps=2, progress=False, directions=2 * RANK)


@cache
def sites():
    return find_sites(started())


def recipe_of(method: str, **changes) -> Recipe:
    return tiny(method, **{"rank": RANK, "settings": tuple(SETTINGS.get(method, {}).items()), **changes})


def attached(recipe: Recipe) -> Attached:
    return attach(recipe, started(), scores() if needs_scores(recipe) else None, lambda: [encoded().batch(range(12))])


def spent(ranks: dict[str, int]) -> int:
    assert ranks.keys() == {site.name for site in sites()}
    return sum(ranks[site.name] * (site.in_features + site.out_features) for site in sites())


def head(model) -> torch.Tensor:
    return next(p for name, p in model.named_parameters() if p.requires_grad and "classifier" in name and p.ndim == 2)


@pytest.mark.parametrize("method", [method for method in METHODS if method != FULL])
def test_methods_end_at_the_budget_of_lora(method):
    """A few real steps, through cut or pruning: what remains is what a LoRA of the rank has, and the ranks say so."""
    recipe, budget = recipe_of(method), budget_parameters(sites(), RANK)
    found = attached(recipe)
    before = head(found.model).detach().clone()
    losses = _train(found, encoded(), recipe)
    ranks, parameters = found.ranks(), found.parameters()
    assert len(losses) == recipe.steps and torch.tensor(losses).isfinite().all()
    assert not torch.equal(head(found.model), before)
    magnitudes = sum(site.out_features for site in sites()) if method == "dora" else 0
    assert parameters == spent(ranks) + magnitudes
    if method == "eva":
        assert sum(ranks.values()) == RANK * len(ranks)  # a budget in ranks, which peft moves between layers
    else:
        assert budget - WIDEST < spent(ranks) <= budget and spent(ranks) == pytest.approx(budget, rel=0.01)


def test_full_trains_every_weight_of_the_same_layers_and_nothing_else():
    found = attached(recipe_of(FULL))
    before = {name: p.detach().clone() for name, p in found.model.named_parameters()}
    _train(found, encoded(), recipe_of(FULL))
    moved = {name for name, p in found.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"{site.name}.weight" for site in sites()} | {"classifier.weight", "classifier.bias"}
    assert found.parameters() == sum(site.in_features * site.out_features for site in sites())
    assert found.ranks() == {site.name: min(site.in_features, site.out_features) for site in sites()}


def test_random_ranks_spend_the_budget_and_follow_the_seed():
    drawn = [attached(recipe_of("random", seed=seed)).ranks() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for ranks in drawn:
        assert budget_parameters(sites(), RANK) - (384 + 384) < spent(ranks) <= budget_parameters(sites(), RANK)
        assert max(ranks.values()) <= 2 * RANK and len(set(ranks.values())) > 3


def test_paper_is_the_published_form_whatever_the_defaults_are():
    bare, spelled = attached(recipe_of("paper", settings=())), attached(recipe_of("paper"))
    ours, theirs = (found.model.bert.encoder.layer[0].attention.self.query.adapter for found in (bare, spelled))
    assert ours.config == theirs.config and ours.config.total_steps == recipe_of("paper").steps
    assert [group.prior for group in ours.groups] == [group.prior for group in theirs.groups]
    assert not needs_scores(recipe_of("paper").with_settings(scores=False))


def test_longer_rows_are_a_higher_rate_of_lora_B():
    """Under Adam: rows c times as long, at one rate, train as LoRA+ of ratio c² does, its lora_A at 1/c of that rate."""
    torch.manual_seed(0)
    start = peft.get_peft_model(Mlp().double(), peft.LoraConfig(r=2, target_modules=["up", "mid"]))
    plus, longer, x = copy.deepcopy(start), copy.deepcopy(start), torch.randn(8, 6, dtype=torch.double)
    for name, parameter in longer.named_parameters():
        parameter.data.mul_(3.0 if "lora_A" in name else 1.0)
    for model, optimizer in ((plus, _peft_optimizer(plus, 1e-2, ratio=9.0)), (longer, _peft_optimizer(longer, 3e-2))):
        for _ in range(5):
            optimizer.zero_grad()
            (model(x) - 1).square().sum().backward()
            optimizer.step()
    assert (plus(x) - start(x)).abs().mean() > 0.1
    torch.testing.assert_close(plus(x), longer(x), rtol=1e-5, atol=1e-5)


def test_unknown_methods_and_broken_ranks_are_refused():
    with pytest.raises(ValueError, match=f"method='qlora' is not one of {re.escape(', '.join(METHODS))}"):
        attached(recipe_of("qlora"))
    with pytest.raises(ValueError, match=r"average_rank=2\.5: lora has one whole rank for every layer of its own, not 2\.5"):
        attached(recipe_of("lora", rank=2.5))


def test_few_layers_have_the_budget_that_they_are_named_after():
    """LoRA of rank 1 on queries and values, and the others at its parameters on layers of their choice."""
    found = {name: attached(recipe_of(name, rank=TIGHT, settings=tuple(own.items()))) for name, own in FEW_LAYERS.items()}
    lora = found["lora"].ranks()
    assert set(lora.values()) == {1} and len(lora) == 12 and all(name.endswith(("query", "value")) for name in lora)
    assert {method.parameters() for method in (found["lora"], found["random"])} == {12 * 768}
