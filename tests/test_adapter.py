"""The handle that trains: from attach to merge, and what must not change on the way."""

import copy
import dataclasses
import math
from functools import partial

import pytest
import torch
from models import (
    REVIEWS,
    attached,
    gates_of,
    image_batch,
    layers_of,
    logits_of,
    minilm,
    review_batch,
    same,
    state_of,
    stir,
    tokenizer,
    train,
    vit,
)
from torch.utils.data import DataLoader

import cobra
from cobra_kernels import gate_kl_sampled, gate_noise, gates_and_kl

BATCH = image_batch()


def reviews(texts: list[str]) -> DataLoader:
    def collate(rows):
        texts, labels = zip(*rows, strict=True)
        return dict(tokenizer()(list(texts), padding=True, return_tensors="pt")) | {"labels": torch.tensor(labels)}

    labels = [1 - REVIEWS.index(text) % 2 for text in texts]
    return DataLoader(list(zip(texts, labels, strict=True)), batch_size=4, collate_fn=collate)


def test_the_custom_loop():
    """The first thing a reader meets, word for word."""
    model, calibration_loader, loader = minilm(), reviews(REVIEWS[1:2]), reviews(REVIEWS * 8)
    base = minilm()

    scores = cobra.calibrate(model, calibration_loader)
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=288, r_max=16, total_steps=len(loader)), scores)
    opt = torch.optim.AdamW(adapter.parameter_groups(lr=2e-4))
    for batch in loader:
        loss = model(**batch).loss + adapter.kl_loss()
        loss.backward()
        opt.step()
        opt.zero_grad()
        adapter.step()
    plan = adapter.extract()
    adapter.apply(plan)
    model.eval()
    adapted = model(**batch)
    adapter.merge()

    assert plan.total == 288
    assert adapted.loss < base(**batch).loss - 0.02
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert list(model.state_dict()) == list(base.state_dict())
    torch.testing.assert_close(model(**batch).logits, adapted.logits, rtol=0, atol=1e-5)


# what trains


def test_parameter_groups():
    """Everything that trains is in one group, once; the gates have their own rate and never decay."""
    model, adapter = attached(granularity="block", gate_lr_scale=7.0)
    matrices, gates, heads = adapter.parameter_groups(lr=1e-3, weight_decay=0.1)
    assert [(g["lr"], g["weight_decay"]) for g in (matrices, gates, heads)] == [(1e-3, 0.1), (7e-3, 0.0), (1e-3, 0.1)]
    assert set(gates["params"]) == {layer.lora_gate for layer in layers_of(adapter)} and len(gates["params"]) == 2
    assert heads["params"] == list(model.classifier.parameters())
    everything = matrices["params"] + gates["params"] + heads["params"]
    assert len(everything) == len(set(everything))
    assert set(everything) == {p for p in model.parameters() if p.requires_grad}


def test_base_weights_never_train():
    model, adapter = attached()
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2, weight_decay=0.1))
    train(model, adapter, optimizer, [BATCH] * 2)
    base = vit().state_dict()
    changed = {name for name, value in model.state_dict().items() if name in base and not torch.equal(value, base[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


# gates


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_accumulation_does_not_change_the_step(micro_batches):
    """One draw a step, and one KL: the gradient is that of the whole batch."""
    batch = image_batch(8)

    def gradients(parts):
        model, adapter = attached(beta=1.0)
        stir(adapter)
        gates = gates_of(adapter)
        for part in range(parts):
            rows = slice(part * 8 // parts, (part + 1) * 8 // parts)
            loss = model(**{key: value[rows] for key, value in batch.items()}).loss + adapter.kl_loss()
            (loss / parts).backward()
            assert same(gates_of(adapter), gates)
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    whole, accumulated = gradients(1), gradients(micro_batches)
    assert whole.keys() == accumulated.keys() and any("gate" in name for name in whole)
    for name, grad in whole.items():
        torch.testing.assert_close(accumulated[name], grad, rtol=1e-4, atol=1e-6)
        assert grad.abs().max() > 1e-6, name


def test_activation_checkpointing_sees_the_same_gates():
    """The second forward draws nothing new, so gradients are the same to the bit, under dropout too."""

    def gradients(checkpointing):
        model, adapter = attached(minilm, dropout=0.1)
        stir(adapter)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        calls = []
        layers_of(adapter)[0].register_forward_hook(lambda *_: calls.append(1))
        torch.manual_seed(0)
        (model(**review_batch()).loss + adapter.kl_loss()).backward()
        assert len(calls) == 1 + checkpointing
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    stored, recomputed = gradients(False), gradients(True)
    assert stored.keys() == recomputed.keys()
    assert all(torch.equal(recomputed[name], grad) for name, grad in stored.items())


def test_noise_is_drawn_once_a_step():
    """Two forwards of one step agree, two steps do not, and a step that is gone back to is the same again."""
    model, adapter = attached()
    stir(adapter)
    first = logits_of(model, BATCH)
    assert torch.equal(logits_of(model, BATCH), first)
    adapter.step()
    assert not torch.equal(logits_of(model, BATCH), first)
    adapter.move_to_step(0)
    assert torch.equal(logits_of(model, BATCH), first)


def test_cold_gates_are_nearly_hard():
    """The last temperature is what makes the cut harmless: most gates are then near 0 or 1."""
    _, adapter = attached(temperature=(1.0, 0.01), r_max=16)
    warm = torch.cat(gates_of(adapter))
    adapter.move_to_step(10)
    cold = torch.cat(gates_of(adapter))
    undecided = [((z > 0.05) & (z < 0.95)).float().mean().item() for z in (warm, cold)]
    assert undecided[0] > 0.8 and undecided[1] < 0.1


def test_expected_ranks():
    _, adapter = attached()
    with torch.no_grad():
        adapter.groups[0].gate.copy_(torch.tensor([math.log(3), 0.0, -math.log(3), 50.0]))
    ranks = adapter.expected_ranks()
    assert ranks[adapter.groups[0].name] == pytest.approx(0.75 + 0.5 + 0.25 + 1)
    assert set(list(ranks.values())[1:]) == {2.0}


# the KL term


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_bernoulli_kl(reduction):
    """The closed form, against torch.distributions, times beta; a gate shared by a block counts once."""
    _, adapter = attached(granularity="block", beta=0.3, kl_reduction=reduction)
    stir(adapter)
    gates = torch.cat([group.gate.detach() for group in adapter.groups])
    posterior, prior = torch.distributions.Bernoulli(logits=gates), torch.distributions.Bernoulli(logits=torch.zeros(8))
    expected = 0.3 * getattr(torch.distributions.kl_divergence(posterior, prior), reduction)()
    torch.testing.assert_close(adapter.kl_loss(), expected)


def test_concrete_kl_uses_the_draw_of_the_gates():
    """The estimate belongs to the sample that the forward used, step for step."""
    _, adapter = attached(kl="concrete", beta=0.5, seed=3)
    stir(adapter)
    gates = torch.stack([group.gate.detach() for group in adapter.groups])
    for step in range(3):
        noise = gate_noise(12, 4, seed=3, step=step)
        torch.testing.assert_close(adapter.kl_loss(), 0.5 * gate_kl_sampled(gates, torch.zeros(12, 4), noise).sum())
        adapter.step()


def test_concrete_kl_is_right_on_average():
    """Two logistic distributions d apart have the divergence d coth(d/2) - 2."""
    d = 1.5
    _, adapter = attached(kl="concrete", kl_reduction="mean", beta=1.0, r_max=16)
    with torch.no_grad():
        for group in adapter.groups:
            group.gate.fill_(d)
    estimates = []
    for _ in range(100):
        estimates.append(adapter.kl_loss().item())
        adapter.step()
    assert sum(estimates) / 100 == pytest.approx(d / math.tanh(d / 2) - 2, abs=0.02)


# the way back and copies


@pytest.mark.parametrize("path", ["at once", "cut", "merged", "cut and merged"])
def test_detach_gives_the_model_back(path):
    """The very modules, in their places, with the flags that the caller had set."""
    model = vit()
    model.vit.layers[0].requires_grad_(False)
    model.classifier.bias.requires_grad_(False)
    before = state_of(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=6, r_max=4, gate="mean", modules_to_save=()))
    stir(adapter)
    if "cut" in path:
        adapter.apply(adapter.extract())
    if "merged" in path:
        adapter.merge()
    adapter.detach()
    assert state_of(model) == before
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_shared_gate_is_in_the_state_once(tmp_path):
    """Transformers' own saving refuses tensors under two names; loading, strictly, moves the gate of all its layers."""
    model, adapter = attached(granularity="block")
    stir(adapter)
    state = model.state_dict()
    assert sum(name.endswith("lora_gate") for name in state) == len(adapter.groups)
    assert sum(name.endswith("lora_A") for name in state) > len(adapter.groups)
    model.save_pretrained(tmp_path)
    other, theirs = attached(granularity="block")
    other.load_state_dict(state)
    assert same(gates_of(theirs), gates_of(adapter)) and torch.equal(logits_of(other, BATCH), logits_of(model, BATCH))
    part, twin = model.vit.layers[0].mlp.fc2, copy.deepcopy(model.vit.layers[0].mlp.fc2)
    assert "lora_gate" in part.state_dict() and "lora_gate" in twin.state_dict()
    assigned, third = attached(granularity="block")
    assigned.load_state_dict(state, assign=True)
    assert same(gates_of(third), gates_of(adapter)) and torch.equal(logits_of(assigned, BATCH), logits_of(model, BATCH))
    del state[next(name for name in state if name.endswith("lora_gate"))]
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_gate"):
        other.load_state_dict(state)


@pytest.mark.parametrize("what", ["model", "adapter"])
def test_deepcopy(what):
    """A copy computes the same and lives its own life; a copied adapter drives the copied model."""
    model, adapter = attached(granularity="block")
    stir(adapter)
    twin_adapter = copy.deepcopy(adapter) if what == "adapter" else None
    twin = twin_adapter.model if twin_adapter else copy.deepcopy(model)
    expected = logits_of(model, BATCH)
    assert torch.equal(logits_of(twin, BATCH), expected)
    first = twin.vit.layers[0]
    assert first.mlp.fc1.lora_gate is first.mlp.fc2.lora_gate is not model.vit.layers[0].mlp.fc1.lora_gate
    if twin_adapter:
        train(twin, twin_adapter, torch.optim.AdamW(twin_adapter.parameter_groups(lr=1e-2)), [BATCH])
        twin_adapter.merge()
    else:
        torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1).step(lambda: twin(**BATCH).loss.backward())
    assert not torch.equal(logits_of(twin, BATCH), expected)
    assert torch.equal(logits_of(model, BATCH), expected)


def test_disabled_is_the_base_model():
    """Within the block only, in training and in evaluation; heads are left as they were trained."""
    model, adapter = attached(modules_to_save=())
    stir(adapter)
    adapted, base = logits_of(model.eval(), BATCH), logits_of(vit().eval(), BATCH)
    with adapter.disabled():
        torch.testing.assert_close(logits_of(model, BATCH), base)
        torch.testing.assert_close(logits_of(model.train(), BATCH), base)
        with adapter.disabled():
            pass
        torch.testing.assert_close(logits_of(model.eval(), BATCH), base)
    assert torch.equal(logits_of(model.eval(), BATCH), adapted) and not torch.allclose(adapted, base)
    adapter.merge()
    with pytest.raises(ValueError, match="the adapter is merged: there is nothing to leave out; unmerge"), adapter.disabled():
        pass


def test_disabled_draws_nothing():
    """A pass of reference leaves the random numbers of the training as they are."""
    model, adapter = attached(modules_to_save=(), dropout=0.5)
    before = torch.get_rng_state()
    with adapter.disabled():
        logits_of(model.train(), BATCH)
    assert torch.equal(torch.get_rng_state(), before)
    logits_of(model, BATCH)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_detach_leaves_other_adapters_alone(elsewhere):
    """After a merge in place, on the same layers or on others; and the second time."""
    model, first = attached(target_modules=("fc1",))
    first.merge(reversible=False)
    second = cobra.attach(model, dataclasses.replace(first.config, **({"target_modules": ("q_proj",)} if elsewhere else {})))
    with pytest.raises(ValueError, match="another adapter is attached since"):
        first.detach()
    assert all(p.requires_grad for layer in layers_of(second) for p in (layer.lora_A, layer.lora_B))
    assert {id(m) for m in model.modules()} >= {id(layer) for layer in layers_of(second)}
    second.detach()
    with pytest.raises(ValueError, match="detached already"):
        second.detach()
    first.detach()


def test_a_detached_handle_trains_nothing():
    _, adapter = attached()
    adapter.detach()
    plan = adapter.extract()
    for call, what in (
        (adapter.kl_loss, "train"),
        (adapter.step, "train"),
        (partial(adapter.apply, plan), "cut"),
        (adapter.merge, "merge"),
    ):
        with pytest.raises(ValueError, match=f"the adapter is detached: there is nothing to {what}; attach anew"):
            call()


def test_a_cut_before_gates_were_drawn_is_warned_of():
    """Without step() every step had one draw; far from the search's end the gates are still soft."""
    for steps, message in ((0, "the adapter was trained and step\\(\\) never called"), (3, "at step 3 of total_steps=10")):
        _, adapter = attached()
        stir(adapter)
        adapter.move_to_step(steps)
        with pytest.warns(UserWarning, match=message):
            adapter.apply(adapter.extract())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("steps", "stirred", "changes"), [(0, False, {}), (5, True, {}), (0, True, {"gate": "mean"}), (0, True, {"total_steps": 1})]
)
def test_other_cuts_are_not(steps, stirred, changes):
    _, adapter = attached(rank_budget=12, **changes)
    if stirred:
        stir(adapter)
    adapter.move_to_step(steps)
    adapter.apply(adapter.extract())


def test_hard_gates_are_expected_open_where_they_are_not_zero():
    """As the kernels count them, at the step's temperature."""
    _, adapter = attached(gate="hard_concrete", temperature=(0.7, 0.7))
    stir(adapter)
    for group in adapter.groups:
        logits = group.gate.detach()[None]
        counted = gates_and_kl(logits, logits, seed=0, step=0, temperature=0.7, stretch=(-0.1, 1.1)).open.sum().item()
        assert adapter.expected_ranks()[group.name] == pytest.approx(counted)
        assert counted > logits.sigmoid().sum().item()
