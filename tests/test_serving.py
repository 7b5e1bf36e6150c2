"""Many adapters over one model: every row computes what its adapter alone would, and nothing of the others."""

import pytest
import torch
from models import (
    gpt2,
    image_batch,
    logits_of,
    minilm,
    review_batch,
    smollm2,
    smollm2_tokenizer,
    state_of,
    t5,
    token_batch,
    vit,
)
from test_lora import trained
from torch import nn

from cobra.deploy.serving import PackedLinear, serve
from cobra.lora import LoraAdapter, LoraLayer

BUILDS = {
    "vit": (vit, image_batch),
    "gpt2": (gpt2, token_batch),
    "minilm": (minilm, review_batch),
    "smollm2": (smollm2, token_batch),
}
MODELS = pytest.mark.parametrize(("build", "batch"), BUILDS.values(), ids=BUILDS)


def adapters_of(build, budgets=(20, 3, 9)) -> dict[str, LoraAdapter]:
    """Adapters of different ranks in different layers, one of them of few layers."""
    return {f"a{i}": trained(build, i, budget=budget)[1].to_lora() for i, budget in enumerate(budgets)}


def alone(build, adapter: LoraAdapter | None, batch) -> torch.Tensor:
    """Logits with one adapter, or none, on a model of its own."""
    model = build()
    if adapter is not None:
        adapter.attach(model)
    return logits_of(model.eval(), batch)


@MODELS
def test_every_row_its_own_adapter(build, batch):
    batch, adapters, model = batch(), adapters_of(build), build().eval()
    served = serve(model, adapters)
    rows = ["a2", None, "a0", "a1"]
    with served.use(rows):
        mixed = logits_of(model, batch)
    for i, name in enumerate(rows):
        expected = alone(build, adapters.get(name), batch)[i]
        torch.testing.assert_close(mixed[i], expected, rtol=1e-4, atol=1e-5 * expected.abs().max())
    assert not torch.equal(mixed[0], mixed[2])


@MODELS
def test_storage_is_the_sum_of_the_ranks(build, batch):
    adapters = adapters_of(build)
    served = serve(build(), adapters)
    assert served.parameters == sum(adapter.parameters for adapter in adapters.values())


def test_outside_of_use_the_base_model_computes():
    model = vit().eval()
    expected = logits_of(model, image_batch())
    served = serve(model, adapters_of(vit))
    assert torch.equal(logits_of(model, image_batch()), expected)
    with served.use([None] * 4):
        assert torch.equal(logits_of(model, image_batch()), expected)
    with served.use("a0"), served.use("a1"):
        inner = logits_of(model, image_batch())
    with served.use("a1"):
        assert torch.equal(logits_of(model, image_batch()), inner)
    assert torch.equal(logits_of(model, image_batch()), expected)


def test_state_dict_and_detach():
    """Keys are the base model's, and taking the adapters off leaves nothing behind."""
    model = vit()
    before = state_of(model)
    served = serve(model, adapters_of(vit))
    assert list(model.state_dict()) == list(vit().state_dict())
    layer = next(module for module in model.modules() if isinstance(module, PackedLinear))
    x = torch.randn(2, layer.in_features)
    assert torch.equal(layer(input=x), layer(x))  # as an nn.Linear is called
    served.detach()
    assert state_of(model) == before


def test_hooks_of_the_layers_run_on():
    """Those of before, and those put on while adapters are served, which stay when they are taken off."""
    model, seen = vit().eval(), []
    name = next(name for name, module in model.named_modules() if name.endswith("o_proj"))
    model.get_submodule(name).register_forward_hook(lambda module, args, y: seen.append("before"))
    served = serve(model, adapters_of(vit))
    model.get_submodule(name).register_forward_hook(lambda module, args, y: seen.append("within"))
    with served.use("a0"):
        logits_of(model, image_batch())
    assert seen == ["before", "within"]
    served.detach()
    logits_of(model, image_batch())
    assert seen == ["before", "within"] * 2
    assert not model.get_submodule(name)._forward_pre_hooks


def test_add_and_remove():
    """Adapters come and go without the others noticing."""
    adapters, model = adapters_of(vit), vit().eval()
    served = serve(model, {"a0": adapters["a0"]})
    served.add("a2", adapters["a2"])
    served.add("a1", adapters["a1"])
    served.remove("a0")
    assert served.names == ("a2", "a1")
    assert served.parameters == adapters["a1"].parameters + adapters["a2"].parameters
    with served.use(["a1", "a2", None, "a1"]):
        mixed = logits_of(model, image_batch())
    for i, name in enumerate(["a1", "a2", None, "a1"]):
        torch.testing.assert_close(mixed[i], alone(vit, adapters.get(name), image_batch())[i], rtol=1e-5, atol=1e-5)
    served.add("a0", adapters["a0"])
    with served.use("a0"):
        torch.testing.assert_close(
            logits_of(model, image_batch()), alone(vit, adapters["a0"], image_batch()), rtol=1e-5, atol=1e-5
        )


def test_adapters_stay_while_rows_use_them():
    """Rows know adapters by their places; and after detach() there is nothing left to use."""
    adapters, model = adapters_of(vit), vit().eval()
    served = serve(model, adapters)
    with served.use("a1"):
        before = logits_of(model, image_batch())
        with pytest.raises(ValueError, match=r"rows use adapters now: remove 'a0' after the block of use\(\)"):
            served.remove("a0")
        assert torch.equal(logits_of(model, image_batch()), before)
    served.detach()
    for request in (
        lambda: served.add("new", adapters["a0"]),
        lambda: served.remove("a0"),
        lambda: served.use("a0").__enter__(),
    ):
        with pytest.raises(ValueError, match=r"these adapters are detached: .* serve\(\) them anew"):
            request()


@pytest.mark.parametrize(
    "options", [pytest.param({}, id="greedy"), pytest.param({"num_beams": 2}, id="beams", marks=pytest.mark.slow)]
)
def test_generation_with_an_adapter_a_row(options):
    """Real weights, a decoder with a cache: each row's text is that of its adapter alone."""
    tokenizer = smollm2_tokenizer()
    prompts = ["The river rises in the hills", "Bread is made from", "Once upon a time"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    adapters = adapters_of(smollm2, (40, 12))
    model = smollm2().eval()
    served = serve(model, adapters)
    rows = ["a1", None, "a0"]
    with served.use(rows):
        mixed = model.generate(**batch, **settings)
    singles = []
    for name in rows:
        other = smollm2()
        if name:
            adapters[name].attach(other)
        singles.append(other.eval().generate(**batch, **settings))
    for i, single in enumerate(singles):
        assert torch.equal(mixed[i], single[i]), i
    assert not torch.equal(singles[0][0], singles[1][0])


def test_half_precision():
    """Matrices take the base model's dtype."""
    adapters = adapters_of(vit)
    model = vit().bfloat16().eval()
    batch = image_batch()
    half = {**batch, "pixel_values": batch["pixel_values"].bfloat16()}
    with serve(model, adapters).use(["a0", "a1", "a2", None]):
        found = logits_of(model, half).float()
    expected = torch.stack([alone(vit, adapters.get(n), batch)[i] for i, n in enumerate(["a0", "a1", "a2", None])])
    assert ((found - expected).norm() / expected.norm()) < 0.05


def test_encoder_decoder():
    adapters, model, batch = adapters_of(t5), t5().eval(), token_batch()
    with serve(model, adapters).use(["a0", "a1", None, "a2"]):
        mixed = logits_of(model, batch)
    for i, name in enumerate(["a0", "a1", None, "a2"]):
        torch.testing.assert_close(mixed[i], alone(t5, adapters.get(name), batch)[i], rtol=1e-4, atol=1e-4)


def test_a_broken_adapter_reaches_its_own_rows_only():
    adapters, model = adapters_of(vit), vit().eval()
    expected = logits_of(model, image_batch())
    name = next(name for name, layer in adapters["a0"].layers.items() if layer.rank and name.endswith("fc2"))
    adapters["a0"].layers[name].lora_B.detach().fill_(float("nan"))
    with serve(model, adapters).use(["a0", None, None, None]):
        found = logits_of(model, image_batch())
    assert found[0].isnan().any()
    torch.testing.assert_close(found[1:], expected[1:])


def test_bad_requests():
    adapters, model = adapters_of(vit), vit().eval()
    served = serve(model, adapters)
    with pytest.raises(ValueError, match="no adapter 'b'"), served.use(["a0", "b"]):
        pass
    with pytest.raises(ValueError, match="no rows; the adapters are a0, a1, a2"), served.use([]):
        pass
    with (
        pytest.raises(ValueError, match=r"3 rows have adapters, and the layer got an input of shape \(4,"),
        served.use(["a0"] * 3),
    ):
        logits_of(model, image_batch())
    with served.use(["a0"] * 4):  # the failed batch left nothing behind
        logits_of(model, image_batch())
    with pytest.raises(ValueError, match="'a0' is served already"):
        served.add("a0", adapters["a0"])
    with pytest.raises(ValueError, match="no adapter 'b'; there are a0, a1, a2"):
        served.remove("b")
    with pytest.raises(ValueError, match="attached already"):
        serve(model, adapters)
    with pytest.raises(ValueError, match="no adapters to serve"):
        serve(vit(), {})


def test_adapters_that_cannot_share_a_batch():
    head = trained(vit, modules_to_save="auto")[1].to_lora()
    with pytest.raises(ValueError, match=r"'x' brings a head \(classifier\), and rows cannot choose heads"):
        serve(vit(), {"x": head})
    few = LoraAdapter({"vit.layers.0.mlp.fc1": LoraLayer(torch.ones(1, 32), torch.ones(64, 1))})
    other = LoraAdapter({"vit.layers.1.mlp.fc1": LoraLayer(torch.ones(1, 32), torch.ones(64, 1))})
    served = serve(vit(), {"few": few})
    with pytest.raises(
        ValueError, match=r"'other' adapts vit\.layers\.1\.mlp\.fc1, which is not packed; serve it from the start"
    ):
        served.add("other", other)
    wide = LoraAdapter({"vit.layers.0.mlp.fc1": LoraLayer(torch.ones(1, 31), torch.ones(64, 1))})
    for call in (lambda: serve(vit(), {"wide": wide}), lambda: served.add("wide", wide)):
        with pytest.raises(ValueError, match="31 -> 64 in the adapter, 32 -> 64 here"):
            call()
    assert served.names == ("few",)


class Experts(nn.Module):
    """Two experts that tokens (rows, n) go to by turns, and a layer that sees whole rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.out = nn.Embedding(8, 6), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, ids):
        flat = self.embedding(ids).flatten(0, 1)
        chosen = ids.flatten() % 2
        found = torch.zeros_like(flat)
        for k, expert in enumerate(self.experts):
            found[chosen == k] = expert(flat[chosen == k])
        return self.out(found.view(*ids.shape, -1))


@torch.no_grad()
def test_experts_take_one_adapter_a_batch():
    """Their tokens are of any rows, in any number: guessing would mix the rows up."""
    torch.manual_seed(1)
    adapters = {
        key: LoraAdapter({name: LoraLayer(torch.randn(2, 6), torch.randn(N, 2)) for name, N in layers.items()})
        for key, layers in {"a": {"experts.0": 6, "out": 3}, "b": {"experts.1": 6, "out": 3}, "c": {"out": 3}}.items()
    }
    model = Experts()
    served = serve(model, adapters)
    ids = torch.tensor([[0, 1, 2, 4], [1, 2, 3, 6]])  # 5 and 3 tokens, of 2 rows
    for rows in (["a", "b"], ["a", None], [None, "a"], ["a", "c"]):
        with pytest.raises(ValueError, match=r"experts\.0 belongs to an expert.* the rows use 2 adapters"), served.use(rows):
            model(ids)
    for rows in ("a", ["a", "a"], ["c", None], [None, "c"]):
        for batch in (ids, ids // 2 * 2):  # the second expert has none of these
            names = [rows] * 2 if isinstance(rows, str) else rows
            with served.use(rows):
                found = model(batch)
            for i, name in enumerate(names):
                other = Experts()
                if name:
                    adapters[name].attach(other)
                torch.testing.assert_close(found[i], other(batch)[i])


def test_layers_that_cannot_be_packed():
    """The adapter would have no effect there; the model stays as it was."""

    class Halved(nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    lora = LoraAdapter({name: LoraLayer(torch.ones(1, 6), torch.ones(6, 1)) for name in ("0", "1")})
    model = nn.Sequential(nn.Linear(6, 6), Halved(6, 6))
    with pytest.raises(ValueError, match="1 is a Halved, which has a forward of its own"):
        serve(model, {"a": lora})
    twice = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    twice.append(twice[1])
    with pytest.raises(ValueError, match="1 and 2 are one module here, and the adapter holds an update for 1 alone"):
        serve(twice, {"a": lora})
    assert [type(module) for module in (*model, *twice)] == [nn.Linear, Halved, *[nn.Linear] * 3]


def test_batches_second_are_refused():
    """Rows are told apart by the first dimension; guessing would mix them up."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=False), 1)
    lora = LoraAdapter({"layers.0.linear1": LoraLayer(torch.ones(1, 8), torch.ones(16, 1))})
    with pytest.raises(ValueError, match="takes batches in its second dimension"):
        serve(model, {"a": lora})


@pytest.mark.parametrize("masked", [False, True])
def test_transformer_encoder_calls_its_adapters(masked):
    """torch's encoder has a fast path in evaluation mode that reads weights and would leave adapters out."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    lora = LoraAdapter({"layers.0.linear1": LoraLayer(torch.randn(2, 8), torch.randn(16, 2))})
    x, mask = torch.randn(3, 5, 8), torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]])
    options = {"src_key_padding_mask": mask} if masked else {}
    valid = ~mask if masked else slice(None)
    with torch.no_grad():
        plain = model(x, **options)
        served = serve(model, {"a": lora})
        with served.use("a"):
            found = model(x, **options)
        served.detach()
        assert model.use_nested_tensor and torch.equal(model(x, **options), plain)
        lora.attach(model).merge()
        torch.testing.assert_close(found[valid], model(x, **options)[valid], rtol=1e-4, atol=1e-5)


def test_autocast():
    """Layers get inputs in fp32, as norms leave them, and compute in bf16."""
    adapters, model = adapters_of(vit), vit().eval()
    served = serve(model, adapters)
    with torch.autocast("cpu", torch.bfloat16), served.use(["a0", "a1", None, "a2"]):
        found = logits_of(model, image_batch()).float()
    with served.use(["a0", "a1", None, "a2"]):
        expected = logits_of(model, image_batch())
    assert 0 < ((found - expected).norm() / expected.norm()) < 0.05


def test_training_is_refused():
    model = vit()
    with serve(model, adapters_of(vit)).use("a0"), pytest.raises(RuntimeError, match="no backward"):
        model(**image_batch())


def test_repr():
    adapters = adapters_of(vit)
    served = serve(vit(), adapters)
    assert repr(served).startswith("ServedAdapters(a0, a1, a2; 11 layers, ")
    packed = [module for module in served.model.modules() if isinstance(module, PackedLinear)]
    assert "3 adapters" in repr(packed[0])
