"""Adapters apart from any model: put on their base model, put together, and what fits where."""

import dataclasses

import pytest
import torch
from models import attached, gpt2, image_batch, logits_of, minilm, review_batch, smollm2, state_of, stir, token_batch, vit
from torch import nn

import cobra
from cobra.lora import LoraAdapter, LoraLayer, combine


def trained(build, seed: int = 0, budget: int = 9, **changes) -> tuple[nn.Module, cobra.Adapter]:
    """A cut adapter of uneven ranks, zeros among them, on a fresh model in evaluation mode."""
    model = build()
    config = {"rank_budget": budget, "r_max": 4, "gate": "mean", "modules_to_save": (), "seed": seed} | changes
    adapter = cobra.attach(model, cobra.CobraConfig(**config))
    stir(adapter, seed)
    adapter.apply(adapter.extract())
    model.eval()
    return model, adapter


MODELS = pytest.mark.parametrize(
    ("build", "batch"), [(vit, image_batch()), (gpt2, token_batch()), (minilm, review_batch())], ids=["vit", "gpt2", "minilm"]
)


@MODELS
def test_back_on_the_base_model(build, batch):
    """Off one model and on a fresh copy of it, nothing has changed."""
    model, adapter = trained(build)
    other = build()
    again = adapter.to_lora().attach(other)
    other.eval()
    torch.testing.assert_close(logits_of(other, batch), logits_of(model, batch), rtol=1e-5, atol=1e-6)
    assert again.trainable_parameters() == adapter.trainable_parameters() == adapter.to_lora().parameters
    assert again.to_lora().ranks == adapter.plan.ranks


def test_a_copy_of_its_own():
    """Training the one must not move the other."""
    _, adapter = trained(vit)
    lora = adapter.to_lora()
    again = lora.attach(vit())
    before = {name: layer.lora_B.clone() for name, layer in lora.layers.items()}
    with torch.no_grad():
        for group in again.groups:
            group.layers[0][0].lora_B.add_(1)
    assert all(torch.equal(layer.lora_B, before[name]) for name, layer in lora.layers.items())


def test_heads_travel():
    model, adapter = trained(vit, modules_to_save="auto")
    other = vit()
    again = adapter.to_lora().attach(other)
    assert torch.equal(other.classifier.weight, model.classifier.weight) and other.classifier.weight.requires_grad
    assert again.heads.keys() == {"classifier"}


def test_attached_adapter_trains_merges_and_is_cut():
    """It is an adapter like any other."""
    _, adapter = trained(vit)
    other = vit()
    again = adapter.to_lora().attach(other)
    optimizer = torch.optim.SGD(again.parameter_groups(lr=0.1))
    before = again.groups[0].layers[0][0].lora_B.clone()
    other.train()
    other(**image_batch()).loss.backward()
    optimizer.step()
    assert not torch.equal(before, again.groups[0].layers[0][0].lora_B)
    other.eval()
    expected = logits_of(other, image_batch())
    again.merge()
    torch.testing.assert_close(logits_of(other, image_batch()), expected, rtol=1e-5, atol=1e-6)
    again.unmerge()
    again.apply(again.extract(4), optimizer)
    assert again.plan.total == 4


def test_a_cut_keeps_what_carries_the_update():
    """Whichever of an adapter's ranks that is; a small update of another layer takes no rank from it."""
    model = nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 3))
    big = LoraLayer(torch.randn(4, 10), torch.randn(12, 4) * torch.tensor([0.0, 0.1, 0.1, 5.0]))
    wide = LoraLayer(torch.randn(5, 12), 1e-6 * torch.randn(3, 5))  # of more ranks than the layer has outputs
    adapter = LoraAdapter({"0": big, "1": wide}).attach(model)
    plan = adapter.extract(2)
    assert plan.ranks == {"0": 2, "1": 0}
    x = torch.randn(5, 10)
    whole = model(x)
    adapter.apply(plan)
    assert (model(x) - whole).norm() < 0.1 * whole.norm()
    everything = LoraAdapter({"0": big, "1": wide}).attach(nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 3)))
    before = everything.model(x)
    everything.apply(everything.extract(9))
    torch.testing.assert_close(everything.model(x), before, rtol=1e-4, atol=1e-5)


def test_checkpoints_that_older_versions_wrote_of_it(tmp_path):
    """Their basis was that of gates, of which there are none."""
    lora = trained(vit)[1].to_lora()
    older = lora.attach(vit())
    older.config = dataclasses.replace(older.config, basis="gates")
    older.groups[0].layers[0][0].lora_A.data += 1
    older.save_checkpoint(tmp_path / "a")
    newer = lora.attach(vit())
    newer.load_checkpoint(tmp_path / "a")
    assert all(torch.equal(found, newer.state_dict()[name]) for name, found in older.state_dict().items())


@MODELS
def test_combined_adapters(build, batch):
    """ΔW = 0.7 ΔW_1 - 0.2 ΔW_2, to the last digits; layers that one of them lacks are the other's alone."""
    first, second = trained(build, 1)[1].to_lora(), trained(build, 2, budget=5)[1].to_lora()
    both = combine([(first, 0.7), (second, -0.2)])
    for name, layer in both.layers.items():
        parts = [(a.layers[name], w) for a, w in ((first, 0.7), (second, -0.2)) if name in a.layers]
        expected = sum(w * part.lora_B.double() @ part.lora_A.double() for part, w in parts)
        torch.testing.assert_close(layer.lora_B.double() @ layer.lora_A.double(), expected, rtol=1e-6, atol=1e-7)
        assert layer.rank == sum(part.rank for part, _ in parts)
    model = build()
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in both.layers}
    adapter = both.attach(model)
    report = adapter.merge()
    assert len(report.sites) == sum(rank > 0 for rank in both.ranks.values())
    for name, layer in both.layers.items():
        delta = layer.lora_B.double() @ layer.lora_A.double()
        delta = delta.t() if build is gpt2 else delta
        torch.testing.assert_close(
            model.get_submodule(name).weight.detach(), (weights[name].double() + delta).float(), rtol=1e-5, atol=1e-6
        )
    adapter.unmerge()
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in weights.items())


def test_combining_rounds_once_in_half_precision():
    """One after the other, every merge rounds; together they round once, which is at least as close."""
    parts = [(trained(vit, seed)[1].to_lora(), 1e-3) for seed in range(8)]
    exact = vit()
    combine(parts).attach(exact).merge()
    together = vit().bfloat16()
    combine(parts).attach(together).merge()
    one_by_one = vit().bfloat16()
    for part in parts:
        combine([part]).attach(one_by_one).merge()
    layers = [name for name, rank in combine(parts).ranks.items() if rank]
    base = vit().bfloat16()

    def lost(model):
        return sum(
            (
                (model.get_submodule(n).weight.double() - base.get_submodule(n).weight.double())
                - (exact.get_submodule(n).weight.double() - vit().get_submodule(n).weight.double())
            ).norm()
            for n in layers
        )

    assert lost(together) < 0.9 * lost(one_by_one)


def test_a_rank_above_the_layers_own():
    """Put together, adapters may have more ranks than a layer has features; they still attach and merge."""
    parts = [(trained(vit, seed, budget=48)[1].to_lora(), 1.0) for seed in range(10)]
    both = combine(parts)
    assert max(both.ranks.values()) == 40 > 32
    model = vit()
    adapter = both.attach(model)
    model.eval()
    expected = logits_of(model, image_batch())
    adapter.merge()
    torch.testing.assert_close(logits_of(model, image_batch()), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_combined():
    with_head = trained(vit, modules_to_save="auto")[1].to_lora()
    with pytest.raises(ValueError, match=r"2 of the adapters bring heads \(classifier\)"):
        combine([(with_head, 1.0), (with_head, 1.0)])
    with pytest.raises(ValueError, match="no adapters"):
        combine([])
    assert combine(zip([with_head], [0.5], strict=True)).heads.keys() == {"classifier"}  # pairs of any kind
    other = LoraAdapter({name: LoraLayer(torch.zeros(1, 3), torch.zeros(5, 1)) for name in with_head.layers})
    with pytest.raises(ValueError, match=r"different base models, its features are 3 -> 5 and 32 -> 32"):
        combine([(with_head, 1.0), (other, 1.0)])


def peft_record(lora: LoraAdapter) -> tuple:
    return lora.task_type, lora.dropout, lora.provenance.get("architecture"), lora.base_model


def test_the_record_goes_along(tmp_path):
    """Loaded, attached, trained on and saved, or combined and saved: an adapter says what it is as its first writer did."""
    first = trained(minilm, dropout=0.1)[1].to_lora()
    record = first.provenance | {"architecture": "BertForSequenceClassification"}
    first = dataclasses.replace(first, task_type="SEQ_CLS", provenance=record)
    first.save_pretrained(tmp_path / "0")
    loaded = cobra.load_adapter(tmp_path / "0")
    loaded.attach(minilm()).save_pretrained(tmp_path / "1")
    combine([(loaded, 0.5), (loaded, 0.5)]).save_pretrained(tmp_path / "2")
    expected = ("SEQ_CLS", 0.1, "BertForSequenceClassification", first.base_model)
    assert [peft_record(cobra.load_adapter(tmp_path / str(i))) for i in range(3)] == [expected] * 3 and first.base_model
    cut = loaded.attach(minilm())
    cut.apply(cut.extract(4))
    assert peft_record(cut.to_lora()) == expected


def test_what_adapters_do_not_agree_on():
    """A record that one of them does not have is not one of all."""
    one = trained(vit, 1, dropout=0.1)[1].to_lora()
    one = dataclasses.replace(one, task_type="A", provenance={"architecture": "ViTForImageClassification"})
    other = trained(vit, 2)[1].to_lora()
    for pair in ([(one, 1.0), (other, 1.0)], [(other, 1.0), (one, 1.0)]):
        both = combine(pair)
        assert peft_record(both) == (None, 0.0, None, None) and both.provenance == {}
        assert both.auto_mapping == one.auto_mapping == other.auto_mapping is not None


def test_the_class_on_record_is_that_of_the_model():
    """A class of another module stays on record, without a path for Auto classes; put on another class, an adapter is one of
    that. Where nothing is on record nothing is."""

    class Mine(type(minilm())):
        pass

    def mine() -> nn.Module:
        model = minilm()
        model.__class__ = Mine
        return model

    lora = trained(minilm)[1].to_lora()
    assert "architecture" not in lora.attach(mine()).to_lora().provenance
    name = f"{__name__}.{Mine.__qualname__}"
    recorded = {at: dataclasses.replace(lora, provenance={"architecture": at}) for at in (name, type(minilm()).__name__)}
    for at, build, expected in (
        (name, mine, (name, None)),
        (name, minilm, ("BertForSequenceClassification", lora.base_model)),
        ("BertForSequenceClassification", mine, ("BertForSequenceClassification", lora.base_model)),  # it is one
    ):
        assert peft_record(recorded[at].attach(build()).to_lora())[2:] == expected


def layer(K: int = 6, N: int = 4) -> LoraLayer:
    return LoraLayer(torch.ones(2, K), torch.ones(N, 2))


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(6, 4), nn.Linear(4, 6), nn.LayerNorm(6)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraAdapter({"three": layer()}), "this one has no layer 'three'"),
        (LoraAdapter({"two": layer()}), "two is 6 -> 4 in the adapter, 4 -> 6 here"),
        (LoraAdapter({"norm": layer()}), "norm is a LayerNorm, and the adapter is for nn.Linear"),
        (LoraAdapter({"one": layer()}, {"head": {}}), "brings a head 'head', which this model lacks"),
        (LoraAdapter({"one": layer()}, {"two": {"weight": torch.ones(3, 4)}}), "head 'two' is .* here and"),
        (LoraAdapter({"one": LoraLayer(torch.ones(0, 6), torch.ones(4, 0))}), "no layer with a rank"),
    ],
)
def test_adapters_of_another_model(lora, message):
    """The model is as it was."""
    model = Small()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        lora.attach(model)
    assert state_of(model) == before


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def test_layers_with_a_forward_of_their_own():
    """Not left out in silence: the adapter would lose their update."""
    model = Small()
    model.one = Halved(6, 4)
    model.attention = nn.MultiheadAttention(6, 2)
    before = state_of(model)
    for name, kind, N in (("one", "Halved", 4), ("attention.out_proj", "NonDynamicallyQuantizableLinear", 6)):
        lora = LoraAdapter({"two": layer(4, 6), name: layer(6, N)})
        with pytest.raises(ValueError, match=f"{name} is a {kind}, which has a forward of its own or is read and never called"):
            lora.attach(model)
        assert state_of(model) == before


@pytest.mark.parametrize("held", ["one", "again"])
def test_one_of_two_names_of_a_module(held):
    """As peft trains it, which adapts the first name only."""
    model = Small()
    model.again = model.one
    before = state_of(model)
    with pytest.raises(ValueError, match=f"{held} and .* are one module here, and the adapter holds .* {held} alone"):
        LoraAdapter({held: layer()}).attach(model)
    assert state_of(model) == before
    LoraAdapter({"one": layer(), "again": layer()}).attach(model)


def test_zero_layers_of_a_padded_adapter_stay(tmp_path):
    """Some engines want all of a layer's projections: loaded, attached and saved again, none is lost."""
    lora = LoraAdapter({"one": layer(), "two": LoraLayer(torch.ones(0, 4), torch.ones(6, 0))})
    lora.save_pretrained(tmp_path / "0", "padded")
    adapter = cobra.load_adapter(tmp_path / "0").attach(Small())
    assert isinstance(adapter.model.one, cobra.CobraLinear) and type(adapter.model.two) is nn.Linear
    adapter.save_pretrained(tmp_path / "1", "padded")
    assert [cobra.load_adapter(tmp_path / str(i)).ranks for i in range(2)] == [{"one": 2, "two": 0}] * 2


def test_quantised_layers_ask_for_a_choice():
    model = Small()
    model.one.weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"one is a Linear, .* quantised, choose its dequantised form"):
        LoraAdapter({"one": layer()}).attach(model)


def test_an_export_says_that_peft_would_merge_it_twice(tmp_path):
    model = Small()
    model.three = nn.Linear(6, 4)
    model.three.weight = model.one.weight
    adapter = cobra.attach(model, cobra.CobraConfig(2, r_max=2, gate="open", target_modules=("one", "three")))
    with pytest.warns(UserWarning, match="one and three share one weight: .* merge_and_unload"):
        adapter.save_pretrained(tmp_path / "a")


def test_two_updates_for_one_weight():
    model = Small()
    model.three = nn.Linear(6, 4)
    model.three.weight = model.one.weight
    lora = LoraAdapter({"one": layer(), "three": LoraLayer(torch.zeros(2, 6), torch.ones(4, 2))})
    with pytest.raises(ValueError, match="one and three share one weight here"):
        lora.attach(model)
    both = LoraAdapter({"one": layer(), "three": layer()})
    assert len(both.attach(model).groups) == 1


def test_only_one_adapter_at_a_time():
    model, _ = attached()
    with pytest.raises(ValueError, match="attached already"):
        LoraAdapter({}).attach(model)


def test_repr():
    lora = trained(smollm2, budget=3)[1].to_lora()
    assert repr(lora) == f"LoraAdapter(21 layers of rank 0 to 1, {lora.parameters:,} parameters)"
