"""Attaching: which layers get an adapter, what trains beside them, and what is refused."""

import copy

import pytest
import torch
from models import (
    Mlp,
    attached,
    gates_of,
    gpt2,
    image_batch,
    layers_of,
    minilm,
    mlp_batch,
    same,
    state_of,
    stir,
    token_batch,
    vit,
)
from torch import nn

import cobra

BATCH = image_batch()


def test_a_cut_of_open_gates_keeps_what_was_learnt():
    """By energy, not the first ranks of every layer; with nothing to cut the matrices stay as they are."""
    model, adapter = attached(Mlp, gate="open", basis="auto", rank_budget=4)
    first, second = layers_of(adapter)
    with torch.no_grad():
        for layer in (first, second):
            layer.lora_B[:, 2:] = 1.0 + torch.arange(layer.lora_B[:, 2:].numel()).reshape(-1, 2)
    x = mlp_batch()[0]
    expected = model.eval()(x)
    plan = adapter.extract()
    assert adapter.config.basis == "singular" and plan.total == 4
    adapter.apply(plan)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    _, whole = attached(Mlp, gate="open", basis="auto", rank_budget=8)
    assert whole.config.basis == "gates"


def test_models_of_peft_are_refused():
    """peft's matrices are linear layers too: they would get adapters of their own."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(minilm(), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"peft has an adapter on .*query: unload\(\) it, or merge_and_unload\(\)"):
        cobra.attach(wrapped, cobra.CobraConfig(rank_budget=6, gate="mean"))
    with pytest.raises(ValueError, match="peft has an adapter on"):
        cobra.calibrate(wrapped, [], progress=False)
    cobra.attach(wrapped.unload(), cobra.CobraConfig(rank_budget=6, gate="mean"))


def test_layers_without_a_score_get_no_adapter():
    """A layer that calibration never saw used would take ranks from those that work."""
    model = Mlp()
    model.spare = nn.Linear(4, 4)
    with pytest.warns(UserWarning, match="1 layers have no score"):
        scores = cobra.calibrate(model, [mlp_batch()], steps=20, quadrature="trapezoid")
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=2, r_max=2, gate="mean"), scores)
    assert [group.name for group in adapter.groups] == ["up", "mid"]
    assert type(model.spare) is nn.Linear


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


@pytest.mark.filterwarnings("ignore:the path integral misses")
@pytest.mark.parametrize("granularity", ["site", "block"])
def test_scores_of_tied_weights(granularity):
    """They are under the first layer of a weight, and the budget of all of its layers goes by them."""
    model = Tied()
    scores = cobra.calibrate(model, [(torch.randn(4, 6), torch.tensor([0, 1, 2, 3]))], steps=3, granularity=granularity)
    assert scores.sites == ("one", "three")
    config = cobra.CobraConfig(rank_budget=4, r_max=2, gate="mean", granularity=granularity)
    adapter = cobra.attach(model, config, scores)
    assert [[name for name, _ in g.sites[0].modules] for g in adapter.groups] == [["one", "two"], ["three", "four"]]
    assert model.one.lora_A is model.two.lora_A


# refusals


@pytest.mark.parametrize(("granularity", "capacity"), [("site", 48), ("block", 8)])
def test_budget_above_capacity(granularity, capacity):
    attached(rank_budget=capacity, granularity=granularity)
    model = vit()
    before = state_of(model)
    with pytest.raises(ValueError, match=rf"budget={capacity + 1}: expected 0 to {capacity} ranks, the capacity of \d+ groups"):
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


@pytest.mark.parametrize("masked", [False, True])
def test_transformer_encoder_calls_its_adapters(masked):
    """torch's encoder has a fast path in evaluation mode that reads weights and would leave adapters out."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 5, 8)
    mask = torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]]) if masked else None
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=4, r_max=2, gate="mean"))
    for group in adapter.groups:
        nn.init.normal_(group.layers[0][0].lora_B)
    model.eval()
    with torch.no_grad():
        adapted = model(x, src_key_padding_mask=mask)
        adapter.merge()
        merged = model(x, src_key_padding_mask=mask)
    assert not any(module._forward_pre_hooks for module in model.modules())  # the base model has its fast path again
    valid = slice(None) if mask is None else ~mask
    torch.testing.assert_close(adapted[valid], merged[valid], rtol=1e-4, atol=1e-5)


def hooked(layer: nn.Module, calls: list[str]) -> list:
    """The handles of hooks of every kind: each notes its call, and those of the forward change what passes."""

    def before(module, args):
        calls.append("before")
        return (args[0] * 2,)

    def after(module, args, kwargs, output):
        calls.append("after")
        return output * 3

    return [
        layer.register_forward_pre_hook(before),
        layer.register_forward_hook(after, with_kwargs=True, always_call=True),
        layer.register_full_backward_pre_hook(lambda *_: calls.append("backward before")),
        layer.register_full_backward_hook(lambda *_: calls.append("backward")),
    ]


@pytest.mark.parametrize("end", ["merge", "detach", "cut"])
def test_hooks_run_once_on_whichever_layer_is_in_place(end):
    """A user's hook, as one that scales or watches an output, is part of the model: before, with and after an adapter."""
    model, (x, _), calls = Mlp().eval(), mlp_batch(), []
    handles = hooked(model.mid, calls)

    def outputs(model):
        calls.clear()
        y = model(x)
        y.sum().backward()
        assert calls == ["before", "after", "backward before", "backward"]
        return y.detach()

    plain = outputs(model)
    settings = {"rank_budget": 2, "r_max": 2, "gate": "mean", "target_modules": ("mid",), "modules_to_save": ()}
    adapter = cobra.attach(model, cobra.CobraConfig(**settings))
    torch.testing.assert_close(outputs(model), plain)
    torch.testing.assert_close(outputs(copy.deepcopy(model)), plain)
    stir(adapter)
    adapted = outputs(model.eval())
    if end == "merge":
        adapter.merge()
        model.up.weight.requires_grad_()  # merged, nothing before the hooks has a gradient
        torch.testing.assert_close(outputs(model), adapted)
        adapter.unmerge()
        torch.testing.assert_close(outputs(model), adapted)
    elif end == "detach":
        adapter.detach()
        torch.testing.assert_close(outputs(model), plain)
    else:
        adapter.apply(adapter.extract(0))
        model.up.weight.requires_grad_()
        torch.testing.assert_close(outputs(model), plain)
    for handle in handles:
        handle.remove()
    calls.clear()
    model(x)
    assert not calls


def test_hooks_follow_into_the_base_model():
    """Those put on a layer while it is adapted, and those of a full backward, which torch tells by a flag."""
    model, (x, _), calls = Mlp(), mlp_batch(), []
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=2, r_max=2, gate="mean", target_modules=("mid",)))
    hooked(model.mid, calls)
    adapter.detach()
    model(x).sum().backward()
    assert type(model.mid) is nn.Linear and calls == ["before", "after", "backward before", "backward"]


def test_a_layer_with_a_forward_of_its_own_is_left_alone():
    """Set on the module as in a subclass: an adapter in its place would leave it out. Named outright it is refused."""
    model, (x, _) = Mlp(), mlp_batch()
    forward = model.mid.forward
    model.mid.forward = lambda h: forward(h) * 3
    plain = model(x)
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=2, r_max=2, gate="mean"))
    assert [group.name for group in adapter.groups] == ["up"]
    assert torch.equal(model(x), plain)
    adapter.detach()
    with pytest.raises(ValueError, match="target_modules that match no linear layer: 'mid'"):
        cobra.attach(model, cobra.CobraConfig(rank_budget=2, gate="mean", target_modules=("mid",)))
    other = Mlp()
    lora = cobra.attach(other, cobra.CobraConfig(rank_budget=2, r_max=2, gate="mean", target_modules=("mid",))).to_lora()
    with pytest.raises(ValueError, match="mid is a Linear, which has a forward of its own"):
        lora.attach(model)


@pytest.mark.parametrize("removed", [False, True])
def test_accelerate_on_a_layer_is_no_forward_of_its_own(removed):
    """A device map sets a forward on every layer, which moves its input and calls the class's; removed, it leaves that one."""
    from accelerate.hooks import attach_execution_device_hook, remove_hook_from_module

    model, (x, _) = Mlp(), mlp_batch()
    plain = model(x)
    attach_execution_device_hook(model, "cpu")
    if removed:
        remove_hook_from_module(model, recurse=True)
    assert "forward" in vars(model.mid)
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=2, r_max=2, gate="mean"))
    assert [group.name for group in adapter.groups] == ["up", "mid"]
    torch.testing.assert_close(model(x), plain)
    adapter.detach()
    forward = model.mid.forward
    model.mid.forward = lambda h: forward(h) * 3
    if not removed:
        return
    attach_execution_device_hook(model, "cpu")  # around a forward of the user's
    assert [group.name for group in cobra.attach(model, adapter.config).groups] == ["up"]


def test_offloaded_weights_are_refused():
    """Before anything is touched; attached without them, the others train."""
    from accelerate import cpu_offload

    model, (x, _) = Mlp(), mlp_batch()
    lora = attached(Mlp, rank_budget=2, r_max=2)[1].to_lora()
    cpu_offload(model.mid, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"mid\.weight is on the meta device \(1 layers\): .* as where accelerate offloads"):
        cobra.attach(model, cobra.CobraConfig(rank_budget=2, r_max=2, gate="mean"))
    with pytest.raises(ValueError, match=r"mid\.weight is on the meta device"):
        lora.attach(model)
    cobra.attach(model, cobra.CobraConfig(rank_budget=2, r_max=2, gate="mean", target_modules=("up",)))
    model(x).sum().backward()


def test_attached_and_cut_within_inference_mode():
    """What is made there cannot be trained, and training comes after."""
    model, (x, _) = Mlp(), mlp_batch()
    with torch.inference_mode():
        adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=4, r_max=4, total_steps=10))
        lora = adapter.to_lora()
        adapter.apply(adapter.extract())
    model(x).sum().backward()
    assert all(layer.lora_B.grad is not None for layer in layers_of(adapter))
    other = Mlp()
    with torch.inference_mode():
        loaded = lora.attach(other)
    other(x).sum().backward()
    assert all(layer.lora_B.grad is not None for layer in layers_of(loaded))


class Shared(nn.Module):
    """Two layers that compute with one weight, and a third."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.third(self.second(self.first(x)))


def test_attach_counts_as_extract_does():
    """A budget that fits is not refused, and one that does not fit is refused before training."""
    config = cobra.CobraConfig(cobra.Budget(4 * 3 * 24, "flops"), r_max=4, gate="mean")  # a weight used twice costs twice
    adapter = cobra.attach(Shared(), config)
    assert adapter.extract().total == 8
    config = cobra.CobraConfig(cobra.Budget(4 * 2 * 12 * 8, "bytes"), r_max=4, gate="mean")
    assert cobra.attach(Shared().double(), config).extract().total == 8
    with pytest.raises(ValueError, match="expected 0 to 384 bytes"):
        cobra.attach(Shared(), config)


def test_a_budget_below_the_cheapest_rank():
    """Before anything is touched."""
    model = vit()
    with pytest.raises(ValueError, match="a budget of 10 parameters keeps no rank: the cheapest step costs 64"):
        cobra.attach(model, cobra.CobraConfig(cobra.Budget(10, "parameters"), r_max=4, gate="mean"))
    assert not any(isinstance(module, cobra.CobraLinear) for module in model.modules())


@pytest.mark.filterwarnings("error")
def test_a_budget_that_looks_like_a_rank():
    """A number below the number of layers is asked about; a Budget, and a rank a layer, are not."""
    with pytest.warns(UserWarning, match=r"rank_budget=8 is the total over 12 layers; 8 a layer would be 96\. .*Budget\(8\)"):
        cobra.attach(vit(), cobra.CobraConfig(8, r_max=4, gate="mean"))
    for budget in (cobra.Budget(8), 12):
        cobra.attach(vit(), cobra.CobraConfig(budget, r_max=4, gate="mean"))
