"""The singular basis: the update that remains is the nearest of its rank, and the cut is what extract said."""

import pytest
import torch
from models import Mlp, image_batch, logits_of, stir, train, vit

import cobra
from cobra.singular import ROW_NORM, singular_directions
from cobra.sites import find_sites

BATCH = image_batch()
SETTINGS = {"rank_budget": 9, "r_max": 4, "total_steps": 4, "basis": "singular", "gate_lr_scale": 50.0}


def searched(build=vit, **changes):
    model = build()
    adapter = cobra.attach(model, cobra.CobraConfig(**{**SETTINGS, **changes}))
    stir(adapter)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-3))
    train(model, adapter, optimizer, [BATCH] * 3)
    model.eval()
    return model, adapter, optimizer


def layers_of(adapter):
    return {site.name: layers[0] for g in adapter.groups for site, layers in zip(g.sites, g.layers, strict=True)}


def update_of(layer) -> torch.Tensor:
    """As in evaluation mode, with mean gates."""
    factors = 1.0 if layer.lora_gate is None else layer.mean_gates(layer.lora_gate.double())
    return (layer.scaling * (layer.lora_B.double() * factors) @ layer.lora_A.double()).detach()


@pytest.mark.parametrize("gate", ["concrete", "hard_concrete", "open"])
def test_directions_are_those_of_the_update(gate):
    _, adapter, _ = searched(gate=gate)
    for layer in layers_of(adapter).values():
        update, found = update_of(layer), singular_directions(layer)
        torch.testing.assert_close(layer.scaling * found.lora_B @ found.lora_A, update)
        sigma = torch.linalg.svdvals(update)[: layer.rank]
        torch.testing.assert_close(found.energy, sigma.square())
        torch.testing.assert_close(found.lora_A @ found.lora_A.t(), ROW_NORM**2 * torch.eye(layer.rank, dtype=torch.float64))


@pytest.mark.parametrize("unit", ["ranks", "parameters"])
@pytest.mark.parametrize(("share", "basis"), [(0.9, "singular"), (1.0, "gates")])
def test_below_an_average_rank_of_1_the_basis_is_the_singular_one(unit, share, basis):
    """By default; the adapter's config says which it is, and its cut goes by it."""
    sites = find_sites(vit())
    amount = len(sites) if unit == "ranks" else sum(site.in_features + site.out_features for site in sites)
    budget = cobra.Budget(round(share * amount), unit)
    _, adapter, _ = searched(rank_budget=budget, basis="auto")
    assert adapter.config.basis == basis == adapter.extract().provenance["source"]
    assert searched(rank_budget=budget, basis="gates")[1].config.basis == "gates"


def test_updates_that_are_zero_have_no_directions():
    """Before any training ranks go by the gates, which are as the prior has them."""
    configs = [cobra.CobraConfig(**{**SETTINGS, "basis": basis}) for basis in ("singular", "gates")]
    first, second = (cobra.attach(vit(), config).extract() for config in configs)
    assert first == second and first.provenance["source"] == "gates"


@pytest.mark.parametrize("unit", ["ranks", "parameters"])
def test_what_remains_is_the_best_that_the_budget_allows(unit):
    """Of every layer the nearest update of its rank; over layers, no exchange of one rank for another loses less."""
    amount = 9 if unit == "ranks" else 500
    _, adapter, optimizer = searched(rank_budget=cobra.Budget(amount, unit))
    updates = {name: update_of(layer) for name, layer in layers_of(adapter).items()}
    plan = adapter.extract()
    assert plan.provenance["source"] == "singular" and plan.total > 3 and len(set(plan.ranks.values())) > 1
    adapter.apply(plan, optimizer)
    layers = layers_of(adapter)
    for name, update in updates.items():
        U, sigma, Vt = torch.linalg.svd(update, full_matrices=False)
        r = plan.ranks[name]
        nearest = (U[:, :r] * sigma[:r]) @ Vt[:r]
        remaining = layers[name].scaling * layers[name].lora_B.double() @ layers[name].lora_A.double() if r else nearest
        torch.testing.assert_close(remaining, nearest, rtol=1e-5, atol=1e-7)
    if unit == "ranks":
        kept = [s.energy[k] for s in plan.sites for k in s.kept]
        dropped = [e for s in plan.sites for k, e in enumerate(s.energy) if k not in s.kept]
        assert min(kept) >= max(dropped)


def test_hard_gates_show_the_cut_and_training_goes_on():
    model, adapter, optimizer = searched()
    soft, plan = logits_of(model, BATCH), adapter.extract()
    assert torch.equal(logits_of(model, BATCH), soft)  # extract changes nothing
    with adapter.hard_gates(plan):
        hard = logits_of(model, BATCH)
    adapter.apply(plan, optimizer)
    assert torch.equal(logits_of(model, BATCH), hard) and not torch.equal(soft, hard)
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    assert trained == {p for p in model.parameters() if p.requires_grad}
    assert not any(layer.lora_A in optimizer.state for layer in layers_of(adapter).values())
    train(model, adapter, optimizer, [BATCH])
    assert not torch.equal(logits_of(model, BATCH), hard)


@pytest.mark.parametrize("fold", ["one", "mean"])
def test_all_ranks_kept_is_the_same_function(fold):
    """Whatever the fold: closed gates stay closed."""
    model, adapter, _ = searched(fold=fold)
    with torch.no_grad():
        for group in adapter.groups:
            group.gate[1:] = -6.0
    expected = logits_of(model, BATCH)
    adapter.apply(adapter.extract(48))
    torch.testing.assert_close(logits_of(model, BATCH), expected, rtol=1e-4, atol=1e-4)


def test_blocks_are_cut_together_by_the_sum_of_their_layers():
    _, adapter, _ = searched(granularity="block", rank_budget=3)
    plan = adapter.extract()
    for group, site in zip(adapter.groups, plan.sites, strict=True):
        energies = [singular_directions(layers[0]).energy for layers in group.layers]
        assert site.energy == pytest.approx(sum(energies).tolist())
    adapter.apply(plan)
    assert {member: layer.rank for member, layer in layers_of(adapter).items()} == {k: r for k, r in plan.ranks.items() if r}


def test_plans_and_checkpoints_keep_the_basis(tmp_path):
    model, adapter, optimizer = searched()
    plan = adapter.extract()
    plan.save(tmp_path / "plan.json")
    assert cobra.RankPlan.load(tmp_path / "plan.json") == plan
    assert f"{min(s.energy[k] for s in plan.sites[:1] for k in s.kept):.3g}" in plan.table()
    adapter.apply(plan, optimizer)
    train(model, adapter, optimizer, [BATCH])
    adapter.save_checkpoint(tmp_path / "run.safetensors", optimizer)
    other = vit()
    again = cobra.attach(other, cobra.CobraConfig(**SETTINGS))
    restored = torch.optim.AdamW(again.parameter_groups(lr=1e-3))
    again.load_checkpoint(tmp_path / "run.safetensors", restored)
    for _ in range(2):
        train(model, adapter, optimizer, [BATCH])
        train(other, again, restored, [BATCH])
    assert torch.equal(logits_of(model, BATCH), logits_of(other, BATCH))


def test_an_untrained_update_gives_even_ranks():
    model = Mlp()
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=4, r_max=4, gate="open", basis="singular", modules_to_save=()))
    plan = adapter.extract()
    assert max(plan.ranks.values()) - min(plan.ranks.values()) <= 1
    adapter.apply(plan)
    assert all(layer.lora_A.isfinite().all() for layer in layers_of(adapter).values())


def test_a_diverged_update_is_named():
    _, adapter, _ = searched(gate="open")
    with torch.no_grad():
        layers_of(adapter)["vit.layers.0.mlp.fc1"].lora_B[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"vit\.layers\.0\.mlp\.fc1: the update is not finite: the training diverged; lower"):
        adapter.extract()


def test_optimizers_whose_state_cannot_be_cut_are_welcome():
    """None of it is cut."""
    _, adapter, optimizer = searched()
    for state in optimizer.state.values():
        state["exp_avg"] = torch.zeros(3, dtype=torch.uint8)
    adapter.apply(adapter.extract(), optimizer)
    assert not any(layer.lora_A in optimizer.state for layer in layers_of(adapter).values())


def test_a_plan_with_too_few_energies_is_refused():
    _, adapter, _ = searched()
    value = adapter.extract().to_dict()
    value["sites"][0]["energy"] = value["sites"][0]["energy"][:-1]
    with pytest.raises(ValueError, match="has 3 energies for 4 gates; expected one for each"):
        cobra.RankPlan.from_dict(value)
