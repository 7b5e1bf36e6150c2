"""Adapter folders read back: our own in both layouts, those of the real peft, and what is refused in them."""

import json

import pytest
import torch
from models import gpt2, image_batch, logits_of, minilm, review_batch, smollm2, token_batch, vit
from safetensors.torch import load_file, save_file
from test_lora import trained

import cobra
from cobra import FormatError
from cobra.export.load import load_adapter

LAYOUTS = pytest.mark.parametrize("layout", ["compact", "padded"])


@LAYOUTS
@pytest.mark.parametrize("build", [vit, gpt2, minilm, pytest.param(smollm2, marks=pytest.mark.slow)])
def test_round_trip(build, layout, tmp_path):
    """Every bit of the matrices, heads and provenance comes back; padding does not."""
    _, adapter = trained(build, modules_to_save="auto")
    adapter.save_pretrained(tmp_path / "a", layout)
    lora, found = adapter.to_lora(), load_adapter(tmp_path / "a")
    kept = {name: layer for name, layer in lora.layers.items() if layer.rank or layout == "padded"}
    assert found.layers.keys() == kept.keys()
    for name, layer in kept.items():
        assert torch.equal(found.layers[name].lora_A, layer.lora_A) and torch.equal(found.layers[name].lora_B, layer.lora_B)
    assert found.heads.keys() == lora.heads.keys()
    assert all(torch.equal(found.heads[n][k], v) for n, head in lora.heads.items() for k, v in head.items())
    assert (found.transposed, found.base_model) == (lora.transposed, lora.base_model)
    assert found.auto_mapping == lora.auto_mapping and lora.auto_mapping
    assert json.dumps(found.provenance) == json.dumps(lora.provenance)
    again = tmp_path / "b"
    found.save_pretrained(again, layout)
    assert (
        load_file(again / "adapter_model.safetensors").keys() == load_file(tmp_path / "a" / "adapter_model.safetensors").keys()
    )


def test_dropout_is_for_training(tmp_path):
    """Loaded on a model in evaluation mode, as from_pretrained gives them, it adds no noise."""
    _, adapter = trained(vit, dropout=0.5)
    adapter.save_pretrained(tmp_path / "a")
    model = vit().eval()
    load_adapter(tmp_path / "a").attach(model)
    assert torch.equal(logits_of(model, image_batch()), logits_of(model, image_batch()))
    model.train()
    assert not torch.equal(logits_of(model, image_batch()), logits_of(model, image_batch()))


def peft_folder(build, path, batch=None, **settings):
    """What the real peft saves of an adapter whose matrices are all nonzero; and the wrapped model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "fan_in_fan_out": build is gpt2}
    model = get_peft_model(build(), LoraConfig(**{**defaults, **settings})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    model.save_pretrained(path, save_embedding_layers=False)
    return model


@pytest.mark.parametrize(
    ("build", "batch", "settings"),
    [
        (minilm, review_batch(), {}),
        (gpt2, token_batch(), {}),
        (vit, image_batch(), {"modules_to_save": ["classifier"]}),
        (minilm, review_batch(), {"use_rslora": True, "target_modules": ["query", "value"]}),
        (
            minilm,
            review_batch(),
            {"rank_pattern": {"layer.1.attention.self.query": 2, "query": 3}, "alpha_pattern": {"^bert.*value": 9, "key": 5}},
        ),
        (smollm2, token_batch(), {"target_modules": r".*\.(q_proj|down_proj)", "lora_dropout": 0.1}),
    ],
    ids=["plain", "conv1d", "head", "rslora", "patterns", "expression"],
)
def test_adapters_of_peft(build, batch, settings, tmp_path):
    """The same logits as in peft, whatever its configuration says about ranks and scales."""
    theirs = peft_folder(build, tmp_path, **settings)
    model = build()
    lora = load_adapter(tmp_path)
    lora.attach(model)
    model.eval()
    torch.testing.assert_close(logits_of(model, batch), logits_of(theirs, batch), rtol=1e-4, atol=1e-4)
    assert lora.provenance == {} and lora.dropout == settings.get("lora_dropout", 0.0)


def rewrite(folder, tensors=None, drop=(), **config):
    """The folder with some of its content replaced."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    stored = {k: v for k, v in load_file(folder / "adapter_model.safetensors").items() if k not in drop}
    save_file({**stored, **(tensors or {})}, folder / "adapter_model.safetensors", {"format": "pt"})


Q = "base_model.model.vit.layers.0.attention.q_proj"
WEIGHTS = "adapter_model.safetensors"
BAD = {
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "truncated or foreign"),
    "no lora": (lambda f: rewrite(f, peft_type="IA3"), "peft_type is 'IA3', expected 'LORA'; peft.convert_to_lora"),
    "dora": (lambda f: rewrite(f, use_dora=True), "use_dora is set: DoRA is no plain low-rank update"),
    "replicated": (lambda f: rewrite(f, layer_replication=[[0, 2]]), "layer_replication is set: replicated layers is no plain"),
    "bdlora": (lambda f: rewrite(f, use_bdlora={"nblocks": 2}), "use_bdlora is set: BD-LoRA is no plain low-rank update"),
    "bias": (lambda f: rewrite(f, bias="all"), "bias='all' trains the base model's biases"),
    "rank": (lambda f: rewrite(f, r=5), r"expected rank 5, as r in adapter_config\.json says, found lora_A \(4, 32\)"),
    "nan": (lambda f: rewrite(f, {f"{Q}.lora_B.weight": torch.full((32, 4), float("nan"))}), "holds NaN or Inf"),
    "dropout": (lambda f: rewrite(f, lora_dropout="x"), r"adapter_config\.json: lora_dropout is 'x', expected a number from 0"),
    "auto mapping": (lambda f: rewrite(f, auto_mapping={"base_model_class": 1}), "'auto_mapping': expected an object of names"),
    "magnitude": (
        lambda f: rewrite(f, {f"{Q}.lora_magnitude_vector": torch.ones(32)}),
        "neither a LoRA matrix of a linear layer",
    ),
    "embedding": (
        lambda f: rewrite(f, {f"base_model.model.e.lora_embedding_{x}": torch.ones(4, 4) for x in "AB"}),
        "e is an embedding, a convolution or fused experts",
    ),
    "convolution": (
        lambda f: rewrite(f, {f"base_model.model.c.lora_{x}.weight": torch.ones(4, 4, 1, 1) for x in "AB"}),
        "c is an embedding, a convolution or fused experts",
    ),
    "provenance": (lambda f: (f / "cobra.json").write_text("{}"), r"cobra\.json: expected a COBRA adapter provenance"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_bad_folders(spoil, message, tmp_path):
    """The message names the file, the key, what was expected and what was found."""
    peft_folder(vit, tmp_path)
    load_adapter(tmp_path)
    spoil(tmp_path)
    with pytest.raises(FormatError, match=message) as error:
        load_adapter(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga"])
def test_inits_that_change_the_base_model_are_refused(init, tmp_path):
    """Their update is one of weights that the folder does not hold; peft, told the initial weights, writes a plain one."""
    peft_folder(vit, tmp_path / "plain")
    config = tmp_path / "plain" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": init}))
    with pytest.raises(FormatError, match=f"init_lora_weights='{init}' belongs to a base model whose weights were changed"):
        load_adapter(tmp_path / "plain")


def test_pissa_as_peft_converts_it(tmp_path):
    """The way out that the refusal names: the same logits on the base model as it was."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(vit(), LoraConfig(r=4, lora_alpha=4, target_modules=["fc1"], init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(0.05 * torch.randn_like(p))
    expected = logits_of(model.eval(), image_batch())
    model.save_pretrained(tmp_path / "pissa", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = vit()
    load_adapter(tmp_path / "pissa").attach(ours)
    torch.testing.assert_close(logits_of(ours.eval(), image_batch()), expected, rtol=1e-3, atol=1e-4)


def test_half_precision_files(tmp_path):
    """Matrices stored in bf16 are read as fp32, so that scaling them does not round."""
    peft_folder(vit, tmp_path, lora_alpha=6)
    stored = {k: v.bfloat16() for k, v in load_file(tmp_path / WEIGHTS).items()}
    save_file(stored, tmp_path / WEIGHTS, {"format": "pt"})
    layer = load_adapter(tmp_path).layers["vit.layers.0.attention.q_proj"]
    assert torch.equal(layer.lora_B, 1.5 * stored[f"{Q}.lora_B.weight"].float())
    assert torch.equal(layer.lora_A, stored[f"{Q}.lora_A.weight"].float())


def test_public_name():
    assert cobra.load_adapter is load_adapter
