"""The cut of matrices and optimizer state, and the training that goes on after it."""

import copy
import re
import warnings

import pytest
import torch
from models import Mlp, gpt2, image_batch, logits_of, stir, token_batch, train, vit
from torch import nn

import cobra
from cobra import CobraLinear

BATCH = image_batch()


def searched(build=vit, batch=BATCH, optimizer_class=torch.optim.AdamW, **changes):
    """A model after a few steps of the search, its adapter and optimizer; some layers will lose all ranks."""
    model = build()
    settings = {"rank_budget": 6, "r_max": 4, "total_steps": 4, "gate_lr_scale": 50.0, "basis": "gates"} | changes
    adapter = cobra.attach(model, cobra.CobraConfig(**settings))
    stir(adapter)
    optimizer = optimizer_class(adapter.parameter_groups(lr=1e-3))
    train(model, adapter, optimizer, [batch] * 3)
    model.eval()
    return model, adapter, optimizer


def layers_of(adapter) -> dict[str, CobraLinear]:
    return {site.name: layers[0] for g in adapter.groups for site, layers in zip(g.sites, g.layers, strict=True)}


def matrices_of(layer: CobraLinear) -> dict[str, nn.Parameter]:
    return {"lora_A": layer.lora_A, "lora_B": layer.lora_B}


@pytest.mark.parametrize("granularity", ["site", "block"])
@pytest.mark.parametrize(("build", "batch"), [(vit, BATCH), (gpt2, token_batch())], ids=["linear", "conv1d"])
def test_tensors_and_state_are_sliced(build, batch, granularity):
    """Every tensor of a kept rank goes over bit for bit, wherever it lies; nothing of a dropped rank is left."""
    _, adapter, optimizer = searched(build, batch, granularity=granularity, rank_budget=3)
    before = {
        (name, key): (p.detach().clone(), copy.deepcopy(optimizer.state[p]))
        for name, layer in layers_of(adapter).items()
        for key, p in matrices_of(layer).items()
    }
    plan = adapter.extract()
    adapter.apply(plan, optimizer)
    kept = {member: list(site.kept) for site in plan.sites for member in site.members if site.kept}
    assert layers_of(adapter).keys() == kept.keys()
    for name, layer in layers_of(adapter).items():
        for key, p in matrices_of(layer).items():
            old, old_state = before[name, key]
            ranks = kept[name] if key == "lora_A" else (slice(None), kept[name])
            assert torch.equal(p, old[ranks])
            assert optimizer.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert torch.equal(optimizer.state[p]["step"], old_state["step"])
            for moment in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(optimizer.state[p][moment], old_state[moment][ranks])


def test_optimizer_forgets_what_is_gone():
    """Gates and layers of rank 0 leave the optimizer with their moments; what is left is what trains."""
    model, adapter, optimizer = searched()
    adapter.apply(adapter.extract(), optimizer)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert set(held) == set(optimizer.state) == {p for p in model.parameters() if p.requires_grad}
    assert len(held) == 2 * len(adapter.groups) + len(list(model.classifier.parameters()))
    assert not any(name.endswith("lora_gate") for name, _ in model.named_parameters())
    assert adapter.kl_loss().item() == 0


def test_rank_zero_is_the_base_module():
    """A layer without rank costs nothing: it is the very module that was there before."""
    model = vit()
    modules = dict(model.named_modules())
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=6, r_max=4, gate="mean"))
    plan = adapter.extract()
    adapter.apply(plan)
    assert sorted(plan.ranks.values()) == [0] * 6 + [1] * 6
    for name, rank in plan.ranks.items():
        found = model.get_submodule(name)
        assert type(found) is CobraLinear if rank else found is modules[name]
        assert found.weight is modules[name].weight


@pytest.mark.parametrize("budget", [0, 48])
def test_nothing_or_everything_is_kept(budget):
    """At the ends of the budget the model is the base model, or loses only its gates."""
    model, adapter, optimizer = searched(gate="open", fold="mean")
    expected = logits_of(model, BATCH)
    base = vit()
    base.classifier.load_state_dict(model.classifier.state_dict())
    adapter.apply(adapter.extract(budget), optimizer)
    assert torch.equal(logits_of(model, BATCH), expected if budget else logits_of(base, BATCH))
    train(model, adapter, optimizer, [BATCH])
    expected = logits_of(model, BATCH)
    report = adapter.merge()
    assert len(report.sites) == (12 if budget else 0)
    assert repr(adapter) == f"Adapter({len(report.sites)} groups, {adapter.trainable_parameters():,} parameters, merged)"
    with pytest.raises(ValueError, match="merged already"):
        adapter.merge()
    adapter.unmerge()
    assert torch.equal(logits_of(model, BATCH), expected)
    with pytest.raises(ValueError, match="not merged"):
        adapter.unmerge()


@pytest.mark.parametrize("fold", ["one", "mean"])
def test_hard_gates_show_the_cut_beforehand(fold):
    """Evaluating a plan leaves the search as it was, and foretells the cut to the bit."""
    model, adapter, _ = searched(fold=fold)
    soft, plan = logits_of(model, BATCH), adapter.extract()
    with adapter.hard_gates(plan):
        hard = logits_of(model, BATCH)
    assert torch.equal(logits_of(model, BATCH), soft) and not torch.equal(soft, hard)
    adapter.apply(plan)
    assert torch.equal(logits_of(model, BATCH), hard)


def test_hard_gates_end_with_an_error():
    model, adapter, _ = searched()
    soft = logits_of(model, BATCH)
    with pytest.raises(RuntimeError, match="stop"), adapter.hard_gates(adapter.extract()):
        raise RuntimeError("stop")
    assert torch.equal(logits_of(model, BATCH), soft)


def test_fold_mean_keeps_the_function():
    """With all ranks kept, folding the mean gates into lora_B changes the parameters and not the model."""
    model, adapter, _ = searched(fold="mean", open_probability=0.5)
    expected, norm = logits_of(model, BATCH), layers_of(adapter)["vit.layers.0.mlp.fc1"].lora_B.norm().item()
    adapter.apply(adapter.extract(48))
    torch.testing.assert_close(logits_of(model, BATCH), expected)
    assert layers_of(adapter)["vit.layers.0.mlp.fc1"].lora_B.norm().item() < 0.9 * norm


def adagrad(groups):
    return torch.optim.Adagrad(groups)


def momentum(groups):
    return torch.optim.SGD(groups, momentum=0.9)


def rmsprop(groups):
    return torch.optim.RMSprop(groups, eps=1e-12)


def adamw(groups):
    return torch.optim.AdamW(groups, eps=1e-12, weight_decay=0.0, amsgrad=True)


def rmsprop_momentum(groups):
    return torch.optim.RMSprop(groups, eps=1e-12, momentum=0.9)


def adadelta(groups):
    return torch.optim.Adadelta(groups, lr=1.0, eps=1e-24)


def rprop(groups):
    return torch.optim.Rprop(groups, lr=1e-3)


def asgd(groups):
    return torch.optim.ASGD(groups, lr=1e-2)


def adamw_of_bitsandbytes(groups):
    from bitsandbytes.optim import AdamW

    return AdamW(groups, eps=1e-12, weight_decay=0.0)


@pytest.mark.parametrize(
    "optimizer_class", [adamw, rmsprop, rmsprop_momentum, adagrad, momentum, adadelta, rprop, asgd, adamw_of_bitsandbytes]
)
def test_fold_mean_rescales_the_moments(optimizer_class):
    """B' = c B has the gradient dL/dB / c. So an optimizer that divides by the gradients' size moves B' next by what it would
    have moved B, one that follows the gradient by 1/c of that, and Adadelta, which keeps the parameters' units, by c times
    that; and A as if nothing had been folded. ASGD's mean of the weights is theirs.
    """
    before, after = [], []
    for folds in (False, True):
        model, adapter, optimizer = searched(gate="mean", fold="mean", optimizer_class=optimizer_class)
        gates = {name: layer.gates().detach() for name, layer in layers_of(adapter).items()}
        if folds:
            adapter.apply(adapter.extract(48), optimizer)
        before.append(copy.deepcopy({name: matrices_of(layer) for name, layer in layers_of(adapter).items()}))
        train(model, adapter, optimizer, [BATCH])
        assert all(torch.allclose(state["ax"], p) for p, state in optimizer.state.items() if "ax" in state)
        after.append({name: matrices_of(layer) for name, layer in layers_of(adapter).items()})
    for name, c in gates.items():
        plain, folded = ({k: new[name][k] - old[name][k] for k in old[name]} for old, new in zip(before, after, strict=True))
        expected = plain["lora_B"] * {momentum: 1 / c, asgd: 1 / c, adadelta: c}.get(optimizer_class, 1)
        torch.testing.assert_close(folded["lora_A"], plain["lora_A"], rtol=1e-2, atol=2e-6)
        torch.testing.assert_close(folded["lora_B"], expected, rtol=1e-2, atol=2e-6)


@pytest.mark.parametrize(("inputs", "outputs"), [(6, 4), (4, 6), (6, 8)])
def test_factored_moments_of_layers_as_wide_as_they_have_ranks(inputs, outputs):
    """Transformers' Adafactor keeps a vector for each side of a matrix; where the sides are equal, its key tells them apart."""
    from transformers import Adafactor

    model = nn.Sequential(nn.Linear(inputs, outputs))
    adapter = cobra.attach(model, cobra.CobraConfig(2, r_max=4, gate="mean", basis="gates"))
    stir(adapter)
    optimizer = Adafactor(adapter.parameter_groups(lr=1e-2), relative_step=False, scale_parameter=False)

    def step():
        model(torch.randn(3, inputs)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    layer = layers_of(adapter)["0"]
    before = {name: dict(optimizer.state[p]) for name, p in matrices_of(layer).items()}
    plan = adapter.extract()
    adapter.apply(plan, optimizer)
    kept = list(plan.sites[0].kept)
    after = {name: optimizer.state[p] for name, p in matrices_of(layers_of(adapter)["0"]).items()}
    assert torch.equal(after["lora_A"]["exp_avg_sq_row"], before["lora_A"]["exp_avg_sq_row"][kept])
    assert torch.equal(after["lora_B"]["exp_avg_sq_col"], before["lora_B"]["exp_avg_sq_col"][kept])
    assert torch.equal(after["lora_A"]["exp_avg_sq_col"], before["lora_A"]["exp_avg_sq_col"])
    assert torch.equal(after["lora_B"]["exp_avg_sq_row"], before["lora_B"]["exp_avg_sq_row"])
    step()


def of_8_bits(moment):
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit.zeros(moment.shape, block_size=32)


UNCUTTABLE = {
    "integers": (lambda moment: moment.to(torch.uint8), r"Tensor \(torch\.uint8 of shape \(4, 32\)\)"),
    "a wrapper": (of_8_bits, r"OptimState8bit \(torch\.float32 of shape \(4, 32\)\)"),
    "a pair": (lambda moment: torch.stack([moment, moment]), r"Tensor \(torch\.float32 of shape \(2, 4, 32\)\)"),
    "a square": (lambda moment: moment @ moment.T, r"Tensor \(torch\.float32 of shape \(4, 4\)\)"),
    "a list": (lambda moment: [moment], r"list \(no tensor\)"),
}


@pytest.mark.parametrize("change", UNCUTTABLE)
def test_state_that_cannot_be_cut_starts_anew(change):
    """8-bit optimizers, AdEMAMix, Shampoo: one warning with the optimizer's name; heads keep their moments."""
    model, adapter, optimizer = searched()
    other, own = searched()[:2]
    make, found = UNCUTTABLE[change]
    state = optimizer.state[layers_of(adapter)["vit.layers.0.attention.q_proj"].lora_A]
    state["exp_avg"] = make(state["exp_avg"])
    heads = {p: dict(optimizer.state[p]) for p in model.classifier.parameters()}
    with pytest.warns(UserWarning) as caught:
        adapter.apply(adapter.extract(), optimizer)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert re.match(rf"torch\.AdamW keeps 'exp_avg' as {found}, which cannot be cut", str(caught[0].message))
    assert optimizer.state.keys() == heads.keys()
    assert all(optimizer.state[p][key] is value for p, values in heads.items() for key, value in values.items())
    new = torch.optim.AdamW(own.parameter_groups(lr=1e-3))
    own.apply(own.extract(), new)
    train(model, adapter, optimizer, [BATCH])
    train(other, own, new, [BATCH])
    assert all(torch.equal(p, own.state_dict()[name]) for name, p in adapter.state_dict().items() if "lora" in name)


def test_uncuttable_state_is_found_before_anything_is_touched():
    """An error in place of the warning leaves adapter, optimizer and plan as they were."""
    _, adapter, optimizer = searched()
    last = list(layers_of(adapter).values())[-1].lora_B
    optimizer.state[last]["exp_avg_sq"] = of_8_bits(optimizer.state[last]["exp_avg_sq"])
    before, states = dict(adapter.state_dict()), {p: dict(values) for p, values in optimizer.state.items()}
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="'exp_avg_sq' as OptimState8bit"):
        warnings.simplefilter("error")
        adapter.apply(adapter.extract(), optimizer)
    assert adapter.plan is None and all(adapter.state_dict()[name] is tensor for name, tensor in before.items())
    assert optimizer.state.keys() == states.keys()
    assert all(optimizer.state[p][key] is value for p, values in states.items() for key, value in values.items())


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.Adafactor])
def test_training_goes_on_with_fewer_parameters(optimizer_class):
    """Also where moments are kept by row and column instead of by element."""
    model, adapter, optimizer = searched(optimizer_class=optimizer_class, rank_budget=12)
    everything = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapter.apply(adapter.extract(), optimizer)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) < everything / 2
    assert adapter.trainable_parameters() == adapter.plan.parameters
    before = model(**BATCH).loss.item()
    train(model, adapter, optimizer, [BATCH] * 10)
    assert model(**BATCH).loss.item() < before


def test_gradients_of_the_step_before_the_cut():
    """A graph made before the cut knows the old shapes; it may still be walked."""
    model, adapter, optimizer = searched()
    loss = model(**BATCH).loss
    adapter.apply(adapter.extract(), optimizer)
    loss.backward()
    assert all(p.grad is None for layer in layers_of(adapter).values() for p in (layer.lora_A, layer.lora_B))


@pytest.mark.parametrize("build", [vit, gpt2], ids=["with a head", "without"])
def test_an_optimizer_left_behind_is_noticed(build):
    """The old optimizer would go on moving the head alone while the adapter stands still, without an error anywhere."""
    batch = BATCH if build is vit else token_batch()
    model, adapter, optimizer = searched(build, batch)
    adapter.apply(adapter.extract())
    with pytest.warns(UserWarning, match=r"the optimizer holds the parameters from before the cut"):
        train(model, adapter, optimizer, [batch])


@pytest.mark.parametrize(("passed", "fused"), [(True, False), (False, False), (False, True)])
def test_no_warning_where_the_optimizer_knows(passed, fused):
    """An optimizer that took part in the cut, or came after it, moves every matrix; a fused one in its own way."""
    model, adapter, optimizer = searched()
    adapter.apply(adapter.extract(), optimizer if passed else None)
    if not passed:
        optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-3), fused=fused)
    before = {name: layer.lora_B.detach().clone() for name, layer in layers_of(adapter).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, adapter, optimizer, [BATCH] * 2)
    assert not any(torch.equal(layer.lora_B, before[name]) for name, layer in layers_of(adapter).items())


def muon(groups):
    return torch.optim.Muon(groups, lr=1e-3, momentum=0.9)


def split_search(first_class=torch.optim.AdamW, halves: bool = True, **changes):
    """As `searched`, with two optimizers: half of the matrices in the first one, or all; the rest in the second."""
    model = vit()
    settings = {"rank_budget": 12, "r_max": 4, "total_steps": 4, "gate_lr_scale": 50.0, "basis": "gates"} | changes
    adapter = cobra.attach(model, cobra.CobraConfig(**settings))
    stir(adapter)
    matrices, *others = adapter.parameter_groups(lr=1e-3)
    own = matrices["params"][: len(matrices["params"]) // 2 if halves else None]
    rest = [p for p in matrices["params"] if not any(p is q for q in own)]
    optimizers = first_class(own), torch.optim.AdamW([{"params": rest, "lr": 1e-3}, *others])
    split_train(model, adapter, optimizers, 3)
    return model.eval(), adapter, optimizers


def split_train(model, adapter, optimizers, steps: int) -> None:
    for _ in range(steps):
        (model(**BATCH).loss + adapter.kl_loss()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        adapter.step()


@pytest.mark.parametrize(("first_class", "halves"), [(torch.optim.AdamW, True), (muon, False)], ids=["two AdamW", "Muon"])
def test_two_optimizers_are_cut(first_class, halves):
    """All matrices go on, and each optimizer keeps its own with their moments: gates that Muon cannot take leave the other."""
    model, adapter, optimizers = split_search(first_class, halves)
    counts = [len([p for group in o.param_groups for p in group["params"]]) for o in optimizers]
    adapter.apply(adapter.extract(), list(optimizers))
    trained = {p for p in model.parameters() if p.requires_grad}
    held = [{p for group in o.param_groups for p in group["params"]} for o in optimizers]
    assert held[0] | held[1] == trained and not held[0] & held[1]
    assert all(set(o.state) == own and len(own) < count for o, own, count in zip(optimizers, held, counts, strict=True))
    before = {p: p.detach().clone() for p in trained}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split_train(model, adapter, optimizers, 2)
    assert not any(torch.equal(p, before[p]) for p in trained)


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_two_optimizers_is_refused(which):
    """The matrices of the other one would never train again; nothing is cut, and the cut of both still can be."""
    model, adapter, optimizers = split_search()
    before, states = dict(adapter.state_dict()), [{p: dict(v) for p, v in o.state.items()} for o in optimizers]
    plan = adapter.extract(48)
    layer = ("vit.layers.1.attention.q_proj", "vit.layers.0.attention.q_proj")[which]
    with pytest.raises(ValueError, match=rf"12 matrices that train are not in it .*{layer}\.lora_A; .*\[first, second\]"):
        adapter.apply(plan, optimizer=optimizers[which])
    assert adapter.plan is None and all(adapter.state_dict()[name] is tensor for name, tensor in before.items())
    assert all(o.state.keys() == state.keys() for o, state in zip(optimizers, states, strict=True))
    adapter.apply(plan, optimizers)
    split_train(model, adapter, optimizers, 1)


@pytest.mark.parametrize("as_list", [True, False], ids=["among others", "alone"])
def test_lbfgs_is_refused(as_list):
    """It steps by a list of its own, in which the matrices from before the cut would stay; nothing is cut."""
    model, adapter, _ = searched()
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], max_iter=1)
    before = dict(adapter.state_dict())
    with pytest.raises(ValueError, match=r"torch\.LBFGS keeps a list of parameters of its own .* new optimizer after the cut"):
        adapter.apply(adapter.extract(), [optimizer] if as_list else optimizer)
    assert adapter.plan is None and all(adapter.state_dict()[name] is tensor for name, tensor in before.items())
    heads = torch.optim.LBFGS(model.classifier.parameters())  # which the cut leaves as they are
    adapter.apply(adapter.extract(), [torch.optim.AdamW(adapter.parameter_groups(lr=1e-3)[:1]), heads])


def test_uncuttable_state_of_one_of_two_optimizers():
    """The other one keeps its moments."""
    _, adapter, (first, second) = split_search()
    state = next(iter(first.state.values()))
    state["exp_avg"] = state["exp_avg"].to(torch.uint8)
    with pytest.warns(UserWarning, match=r"torch\.AdamW keeps 'exp_avg'") as caught:
        adapter.apply(adapter.extract(48), (first, second))
    assert len(caught) == 1 and caught[0].filename == __file__
    assert not first.state and all(p in second.state for group in second.param_groups for p in group["params"])


def test_frozen_matrices_stay_frozen():
    """Frozen on purpose, with or without a place in an optimizer: no error, and no training after the cut."""
    model, adapter, _ = searched()
    for layer in layers_of(adapter).values():
        layer.lora_A.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    adapter.apply(adapter.extract(), optimizer)
    before = {name: copy.deepcopy(matrices_of(layer)) for name, layer in layers_of(adapter).items()}
    train(model, adapter, optimizer, [BATCH])
    for name, layer in layers_of(adapter).items():
        assert not layer.lora_A.requires_grad and torch.equal(layer.lora_A, before[name]["lora_A"])
        assert layer.lora_B.requires_grad and not torch.equal(layer.lora_B, before[name]["lora_B"])


def test_no_warning_where_all_matrices_are_frozen():
    """Training the head alone is one's own choice."""
    model, adapter, _ = searched()
    for layer in layers_of(adapter).values():
        layer.lora_A.requires_grad_(False)
        layer.lora_B.requires_grad_(False)
    adapter.apply(adapter.extract())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, adapter, torch.optim.AdamW(model.classifier.parameters(), lr=1e-3), [BATCH])


def test_schedulers_outlive_the_cut():
    """A scheduler counts the optimizer's groups: they must stay as many, each with its own rate."""
    model, adapter, optimizer = searched(gate_lr_scale=10.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    adapter.apply(adapter.extract(), optimizer)
    train(model, adapter, optimizer, [BATCH], scheduler)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert set(rates.values()) == {5e-4} and rates.keys() == {p for p in model.parameters() if p.requires_grad}


def test_layers_that_share_a_weight_are_cut_together():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(torch.tanh(self.one(x)))

    model = Tied()
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=2, r_max=4, gate="mean"))
    adapter.apply(adapter.extract())
    assert model.one.rank == model.two.rank == 2
    assert model.one.lora_A is model.two.lora_A and model.one.lora_B is model.two.lora_B


def test_a_bare_module_without_heads():
    """Nothing here needs transformers."""
    model, x = Mlp().eval(), torch.randn(5, 6)
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=3, r_max=4, gate="mean", modules_to_save=()))
    stir(adapter)
    model.eval()
    with adapter.hard_gates(adapter.extract()):
        expected = model(x)
    adapter.apply(adapter.extract())
    assert torch.equal(model(x), expected)
