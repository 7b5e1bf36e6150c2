"""The handle that trains: from attach to merge, and what must not change on the way."""

import copy
import math

import pytest
import torch
from models import (
    REVIEWS,
    Mlp,
    gpt2,
    image_batch,
    logits_of,
    minilm,
    mlp_batch,
    review_batch,
    stir,
    token_batch,
    tokenizer,
    train,
    vit,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import cobra
from cobra import CobraLinear
from cobra.config import CHOICES
from cobra_kernels import gate_kl_sampled, gate_noise

BATCH = image_batch()


def attached(build=vit, **changes):
    model = build()
    return model, cobra.attach(model, cobra.CobraConfig(**{"rank_budget": 6, "r_max": 4, "total_steps": 10} | changes))


def layers_of(adapter) -> list[CobraLinear]:
    return [layer for group in adapter.groups for layer in group.all_layers]


def gates_of(adapter) -> list[torch.Tensor]:
    return [layer.gates().detach() for layer in layers_of(adapter)]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def state_of(model: nn.Module) -> list:
    """What a refusal must leave as it is: every module, its mode, every parameter's flag."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)]
    return modules + [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]


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


@pytest.mark.parametrize(
    ("build", "modules_to_save", "expected"),
    [
        (vit, "auto", ["classifier"]),
        (minilm, "auto", ["classifier"]),
        (gpt2, "auto", []),  # an output projection tied to the embeddings is no task head
        (vit, (), []),
        (vit, "layernorm", ["vit.layernorm"]),
        (vit, ["classifier", "patch_embeddings"], ["classifier", "vit.embeddings.patch_embeddings"]),
    ],
)
def test_modules_to_save(build, modules_to_save, expected):
    """A head on random weights must train; nothing else does unless it is named."""
    model, adapter = attached(build, modules_to_save=modules_to_save)
    assert list(adapter.heads) == expected
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained == {f"{head}.{name}" for head in expected for name, _ in model.get_submodule(head).named_parameters()}


@pytest.mark.parametrize(
    ("modules_to_save", "message"),
    [
        ("pooler", "modules_to_save: the model has no module 'pooler'"),
        ("o_proj", "modules_to_save and target_modules both name 'vit.layers.0.attention.o_proj'"),
        ("attention", "modules_to_save and target_modules both name 'vit.layers.0.attention"),
    ],
    ids=["unknown", "adapted", "holds adapted ones"],
)
def test_modules_to_save_are_checked(modules_to_save, message):
    """Training a layer whole and by an adapter would leave its weight to two optimizer groups."""
    model = vit()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        cobra.attach(model, cobra.CobraConfig(rank_budget=6, gate="mean", modules_to_save=modules_to_save))
    assert state_of(model) == before


def test_layers_without_a_score_get_no_adapter():
    """A layer that calibration never saw used would take ranks from those that work."""
    model = Mlp()
    model.spare = nn.Linear(4, 4)
    with pytest.warns(UserWarning, match="1 layers have no score"):
        scores = cobra.calibrate(model, [mlp_batch()], steps=20, quadrature="trapezoid")
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=2, r_max=2, gate="mean"), scores)
    assert [group.name for group in adapter.groups] == ["up", "mid"]
    assert type(model.spare) is nn.Linear


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


def test_evaluation_has_no_noise():
    """Evaluation uses the mean gate, whatever the step and temperature."""
    model, adapter = attached()
    stir(adapter)
    model.eval()
    assert same(gates_of(adapter), [layer.lora_gate.detach().sigmoid() for layer in layers_of(adapter)])
    first = logits_of(model, BATCH)
    adapter.step()
    assert torch.equal(logits_of(model, BATCH), first)
    model.train()
    assert not torch.equal(logits_of(model, BATCH), first)


def test_seeds():
    """A seed fixes matrices and gates, also beside other layers; another seed changes both."""
    drawn = {}
    for key, changes in {"a": {}, "again": {}, "other": {"seed": 1}}.items():
        _, adapter = attached(**changes)
        drawn[key] = [layer.lora_A.detach() for layer in layers_of(adapter)], gates_of(adapter)
    for matrices_or_gates in (0, 1):
        a, again, other = (drawn[key][matrices_or_gates] for key in ("a", "again", "other"))
        assert same(again, a)
        assert not any(torch.equal(x, y) for x, y in zip(other, a, strict=True))
        assert len({x.flatten()[0].item() for x in a}) == len(a)  # no two layers alike
    _, alone = attached(target_modules=("layers.1.mlp.fc1",), rank_budget=2)
    assert torch.equal(layers_of(alone)[0].lora_A, drawn["a"][0][10])


def test_a_block_shares_its_gates():
    """One gate opens or closes a rank in every layer of the block."""
    _, adapter = attached(granularity="block")
    first, second = (gates_of(adapter)[i : i + 6] for i in (0, 6))
    assert all(torch.equal(z, first[0]) for z in first) and all(torch.equal(z, second[0]) for z in second)
    assert not torch.equal(first[0], second[0])


def test_mean_gates_train_without_noise():
    model, adapter = attached(gate="mean", total_steps=None)
    stir(adapter)
    assert all(layer.training and layer.gate_noise is None for layer in layers_of(adapter))
    training = logits_of(model, BATCH)
    assert torch.equal(logits_of(model.eval(), BATCH), training)
    (model(**BATCH).loss + adapter.kl_loss()).backward()
    assert all(layer.lora_gate.grad.abs().max() > 0 for layer in layers_of(adapter))


@pytest.mark.parametrize(("build", "batch"), [(vit, BATCH), (gpt2, token_batch())], ids=["linear", "conv1d"])
def test_open_gates_are_plain_lora(build, batch):
    """gate="open" is LoRA itself: peft, given the same matrices, takes the same steps."""
    from peft import LoraConfig, get_peft_model

    model, adapter = attached(build, gate="open", r_max=8, alpha=None)
    names = [group.name for group in adapter.groups]
    settings = {"modules_to_save": list(adapter.heads) or None, "fan_in_fan_out": build is gpt2}
    theirs = get_peft_model(build(), LoraConfig(r=8, lora_alpha=16, target_modules=names, **settings)).eval()
    with torch.no_grad():
        for name, layer in zip(names, layers_of(adapter), strict=True):
            theirs.base_model.model.get_submodule(name).lora_A["default"].weight.copy_(layer.lora_A)
    ours_optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=5e-3))
    theirs_optimizer = torch.optim.AdamW((p for p in theirs.parameters() if p.requires_grad), lr=5e-3, weight_decay=0.0)
    before = logits_of(model, batch)
    for _ in range(5):
        for each, optimizer in ((model, ours_optimizer), (theirs, theirs_optimizer)):
            each(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        adapter.step()
    assert adapter.kl_loss().item() == 0
    assert (logits_of(model, batch) - before).abs().max() > 0.05
    torch.testing.assert_close(logits_of(model, batch), logits_of(theirs, batch), rtol=0, atol=1e-5)


def test_temperature_runs_from_the_first_to_the_last():
    """The layers follow the config's schedule, also when all steps are over."""
    _, adapter = attached(temperature=(2.0, 0.5), total_steps=4)
    seen = []
    for _ in range(6):
        seen.append(layers_of(adapter)[0].gate_temperature.item())
        adapter.step()
    assert seen == pytest.approx([2.0, 2**0.5, 1.0, 2**-0.5, 0.5, 0.5])
    assert seen[0] == 2.0 and seen[4] == seen[5] == 0.5
    linear = cobra.CobraConfig(rank_budget=1, total_steps=4, temperature=(2.0, 0.5), anneal="linear")
    assert [linear.temperature_at(step) for step in (0, 1, 2, 4, 9)] == [2.0, 1.625, 1.25, 0.5, 0.5]


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


def test_dropout_is_on_the_branch_alone():
    """The frozen path sees the whole input, and so does the branch outside of training."""
    linear, x = nn.Linear(6, 5), torch.randn(7, 6)
    layer = CobraLinear.from_linear(linear, 3, scaling=2.0, dropout=0.5, gate_logit=0.4)
    nn.init.normal_(layer.lora_B)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(5)
    torch.testing.assert_close(layer(x), linear(x) + dropped @ layer.folded()[0].T @ layer.folded()[1].T)
    torch.testing.assert_close(layer.eval()(x), linear(x) + x @ layer.folded()[0].T @ layer.folded()[1].T)


@pytest.mark.parametrize("rank", [0, 6])
def test_a_layer_holds_no_more_ranks_than_its_smaller_side(rank):
    with pytest.raises(ValueError, match=rf"rank={rank} for a layer of 7 -> 5 features: expected 1 to 5"):
        CobraLinear.from_linear(nn.Linear(7, 5), rank)
    adapter = cobra.attach(Mlp(hidden=2), cobra.CobraConfig(rank_budget=4, r_max=16, gate="mean"))
    assert [group.rank for group in adapter.groups] == [2, 2]


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


# refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_budget": -1}, "rank_budget=-1: expected an integer >= 0"),
        ({"rank_budget": 1.5}, "rank_budget=1.5: expected an integer"),
        ({"rank_budget": True}, "rank_budget=True: expected an integer"),
        ({"r_max": 0}, "r_max=0: expected an integer from 1 to 1024"),
        ({"r_max": 1025}, "r_max=1025"),
        ({"seed": -1}, "seed=-1"),
        ({"dropout": 1.0}, "dropout=1.0: expected at least 0 and below 1"),
        ({"alpha": 0.0}, "alpha=0.0: expected greater than 0"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"gate_lr_scale": -1.0}, "gate_lr_scale=-1.0"),
        ({"temperature": (0.1, 1.0)}, "first >= last > 0"),
        ({"temperature": (1.0, 0.0)}, "first >= last > 0"),
        ({"total_steps": 0}, "total_steps=0: expected an integer greater than 0"),
        ({"total_steps": None}, "gate='concrete' anneals its temperature: pass total_steps"),
        *(({name: "no"}, f"{name}='no' is not one of {choices[0]!r}, ") for name, choices in CHOICES.items()),
    ],
    ids=str,
)
def test_config_names_what_is_wrong(settings, message):
    """A setting out of range is refused where it is written, with the range."""
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        cobra.CobraConfig(**{"rank_budget": 4, "total_steps": 10} | settings)


@pytest.mark.parametrize(("granularity", "capacity"), [("site", 48), ("block", 8)])
def test_budget_above_capacity(granularity, capacity):
    attached(rank_budget=capacity, granularity=granularity)
    model = vit()
    before = state_of(model)
    with pytest.raises(ValueError, match=rf"rank_budget={capacity + 1} is above the capacity {capacity} of .* {granularity}s"):
        cobra.attach(model, cobra.CobraConfig(rank_budget=capacity + 1, r_max=4, gate="mean", granularity=granularity))
    assert state_of(model) == before


def test_attach_twice():
    model, adapter = attached()
    before = state_of(model)
    with pytest.raises(ValueError, match="an adapter is attached already"):
        cobra.attach(model, adapter.config)
    assert state_of(model) == before
    adapter.detach()
    cobra.attach(model, adapter.config)


@pytest.mark.filterwarnings("ignore:the path integral misses")
@pytest.mark.parametrize(
    ("build", "batch", "settings", "message"),
    [
        (lambda: vit(4), BATCH, {"target_modules": ("classifier",)}, "fingerprint"),
        (gpt2, token_batch(), {}, "this one has no layer 'transformer.h.0"),
        (vit, BATCH, {"granularity": "block"}, "granularity 'block', the config 'site'; use one granularity for both"),
        (vit, BATCH, {"target_modules": ("fc1", "fc2")}, "the scores lack 8 of the target layers, e.g. 'vit.layers.0.att"),
    ],
    ids=["other weights", "other layers", "other granularity", "fewer layers"],
)
def test_scores_that_do_not_fit(build, batch, settings, message):
    """Scores of something else would put the ranks in the wrong places without any other sign."""
    scores = cobra.calibrate(build(), [batch], steps=1, **settings)
    model = vit()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        cobra.attach(model, cobra.CobraConfig(rank_budget=6, r_max=2, gate="mean"), scores)
    assert state_of(model) == before


# the way back


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


def test_merge_and_unmerge_are_checked():
    _, adapter = attached()
    with pytest.raises(ValueError, match="not merged"):
        adapter.unmerge()
    plan = adapter.extract()
    adapter.merge()
    for call in (adapter.merge, lambda: adapter.apply(plan)):
        with pytest.raises(ValueError, match="merged"):
            call()


def test_merge_of_a_diverged_adapter_changes_nothing():
    """The layers merged before the bad one are put back, bit for bit."""
    model, adapter = attached()
    stir(adapter)
    with torch.no_grad():
        layers_of(adapter)[5].lora_B[0, 0] = float("nan")
    before, weights = state_of(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"vit\.layers\.0\.mlp\.fc2: the merged weight is not finite"):
        adapter.merge()
    assert state_of(model) == before
    assert all(torch.equal(value.nan_to_num(), weights[name].nan_to_num()) for name, value in model.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_mode_follows_through_a_merge(training):
    """model.eval() while merged holds after unmerge: evaluation must never see noise, nor training go without."""
    model, adapter = attached()
    stir(adapter)
    model.train(not training)
    adapter.merge()
    model.train(training)
    adapter.unmerge()
    assert all(layer.training is training for layer in layers_of(adapter))


def test_unmerge_in_mid_search():
    """Merging to look and going on is as if nothing had been merged."""
    model, adapter = attached()
    stir(adapter)
    noisy = logits_of(model, BATCH)
    adapter.merge()
    merged = logits_of(model, BATCH)
    adapter.unmerge()
    assert torch.equal(logits_of(model, BATCH), noisy)
    torch.testing.assert_close(merged, logits_of(model.eval(), BATCH), rtol=1e-5, atol=1e-5)


def test_merge_report():
    """What each layer gained, beside what it had, and what its dtype could not hold."""
    _, adapter = attached()
    stir(adapter)
    updates = [(2 * layer.lora_B * layer.lora_gate.sigmoid() @ layer.lora_A).norm().item() for layer in layers_of(adapter)]
    weights = [layer.weight.norm().item() for layer in layers_of(adapter)]
    report = adapter.merge()
    assert [site.name for site in report.sites] == [group.name for group in adapter.groups]
    assert [site.delta_norm for site in report.sites] == pytest.approx(updates)
    assert [site.weight_norm for site in report.sites] == pytest.approx(weights)
    assert 0 < report.worst_rounding_loss < 1e-6
    assert len(report.table().splitlines()) == 13
    assert repr(report).startswith("MergeReport(12 layers, at most ")


class Tied(nn.Module):
    """Two layers with one weight and a bias each, and a layer under two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.four = self.three

    def forward(self, x):
        for layer in (self.one, self.two, self.three, self.four):
            x = torch.tanh(layer(x))
        return x


def test_tied_weights_train_one_adapter():
    """One weight, one adapter: trained by all its uses, merged once, restored once."""
    model, x = Tied(), torch.randn(4, 6)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=4, r_max=2, gate="mean"))
    assert [[name for name, _ in g.sites[0].modules] for g in adapter.groups] == [["one", "two"], ["three", "four"]]
    assert model.one.lora_A is model.two.lora_A and model.three is model.four
    assert len(adapter.parameter_groups(lr=1.0)[0]["params"]) == 4
    stir(adapter)
    model(x).sum().backward()
    assert model.one.lora_B.grad.abs().max() > 0
    model.eval()
    adapted, update = model(x), torch.matmul(*reversed(model.one.folded()))
    adapter.merge()
    assert model.one.weight is model.two.weight and type(model.one) is type(model.two) is nn.Linear
    torch.testing.assert_close(model.one.weight, base["one.weight"] + update)
    torch.testing.assert_close(model(x), adapted)
    adapter.unmerge()
    assert torch.equal(model(x), adapted)
    adapter.detach()
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())


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


# precision


def test_half_precision_weights_train_in_fp32():
    """Steps of 1e-4 vanish in bf16; the adapter keeps them, and the merge rounds the sum once."""
    model, adapter = attached(lambda: vit().bfloat16(), dropout=0.1)
    batch = BATCH | {"pixel_values": BATCH["pixel_values"].bfloat16()}
    assert {p.dtype for layer in layers_of(adapter) for p in (layer.lora_A, layer.lora_B, layer.lora_gate)} == {torch.float32}
    before = layers_of(adapter)[0].lora_A.detach().clone()
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-5))
    train(model, adapter, optimizer, [batch] * 3)
    assert 0 < (layers_of(adapter)[0].lora_A - before).abs().max() < 1e-4
    stir(adapter)
    model.eval()
    adapted = logits_of(model, batch)
    exact = {
        group.name: layer.weight.double() + torch.matmul(*(m.double() for m in reversed(layer.folded())))
        for group, layer in zip(adapter.groups, layers_of(adapter), strict=True)
    }
    report = adapter.merge()
    for name, weight in exact.items():
        merged = model.get_submodule(name).weight
        assert merged.dtype == torch.bfloat16
        assert ((merged - weight).abs() <= weight.abs() * 2**-8 + 1e-6).all()  # half a unit in the last place
    assert 1e-4 < report.worst_rounding_loss < 1e-1
    torch.testing.assert_close(logits_of(model, batch), adapted, rtol=0.1, atol=0.1)
    adapter.unmerge()
    assert torch.equal(logits_of(model, batch), adapted)


def test_autocast():
    """Mixed precision runs the products in bf16 and leaves gradients in fp32."""
    model, adapter = attached()
    stir(adapter)
    exact = logits_of(model, BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**BATCH)
        (outputs.loss + adapter.kl_loss()).backward()
    assert not torch.equal(outputs.logits, exact)
    torch.testing.assert_close(outputs.logits.float(), exact, rtol=0.1, atol=0.1)
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
