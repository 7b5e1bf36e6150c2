"""Exported adapters through the real peft and transformers: loaded, swapped, mixed in one batch, merged; both layouts.

Matrices arrive bit for bit. Outputs and merged weights differ by the order of fp32 sums alone; with -rP each test prints by how
much, relative to the largest value.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
import transformers
from models import logits_of, minilm, prose_batch, review_batch, smollm2, stir
from peft.utils.hotswap import hotswap_adapter
from torch import nn

import cobra
from cobra.export.check import check_adapter
from cobra.lora import LoraAdapter
from cobra.sites import find_sites

PREFIX = "base_model.model."
TOLERANCE = 5e-5  # of the largest value; measured: 1.4e-6, and 1.2e-5 behind all 30 layers of SmolLM2


@dataclass(frozen=True)
class Case:
    """A model, a batch of four rows for it, and whether a head trains along."""

    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, torch.Tensor]]
    head: bool


def prose() -> dict[str, torch.Tensor]:
    return prose_batch(("Bread is made from flour.", "Snow melts.", "The river rises in the hills.", "Rain"))


CASES = {
    "minilm": Case(minilm, review_batch, head=True),
    "smollm2": Case(lambda: smollm2(2), prose, head=False),
    "smollm2-whole": Case(lambda: smollm2(30), prose, head=False),
}


@dataclass(frozen=True, eq=False)
class Made:
    """A cut adapter of uneven ranks, and what COBRA computes with it, merged and not."""

    lora: LoraAdapter
    logits: torch.Tensor
    merged: dict[str, torch.Tensor]
    merged_logits: torch.Tensor


@cache
def made(name: str, seed: int) -> Made:
    """Two seeds are two adapters: other ranks, other layers left out, other matrices."""
    case = CASES[name]
    model = case.build()
    settings = {"r_max": 4 + seed, "gate": "mean", "seed": seed, "modules_to_save": "auto" if case.head else ()}
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=len(find_sites(model)), **settings))
    stir(adapter, seed)
    adapter.apply(adapter.extract())
    with torch.no_grad():
        for group in adapter.groups:
            group.layers[0][0].lora_B.mul_(0.1)
    model.eval()
    lora, logits = adapter.to_lora(), logits_of(model, case.batch())
    ranks = set(lora.ranks.values())
    assert 0 in ranks and len(ranks) > 2
    adapter.merge()
    merged = {name: model.get_submodule(name).weight.detach().clone() for name, rank in lora.ranks.items() if rank}
    return Made(lora, logits, merged, logits_of(model, case.batch()))


MODELS = pytest.mark.parametrize("name", ["minilm", "smollm2", pytest.param("smollm2-whole", marks=pytest.mark.slow)])
LAYOUTS = pytest.mark.parametrize("layout", ["compact", "padded"])


def saved(tmp_path: Path, name: str, layout: str, *, heads: bool = True) -> list[Path]:
    folders = [tmp_path / f"adapter{seed}" for seed in range(2)]
    for seed, folder in enumerate(folders):
        lora = made(name, seed).lora
        (lora if heads else replace(lora, heads={})).save_pretrained(folder, layout)
    return folders


def loaded(name: str, folder: Path) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of keys that are missing or left over
        return peft.PeftModel.from_pretrained(CASES[name].build(), folder).eval()


def assert_matrices(model: nn.Module, lora: LoraAdapter, layout: str, adapter: str = "default", prefix: str = PREFIX) -> None:
    """Every matrix bit for bit, beyond its own rank zeros, the scale 1; no other layer is adapted."""
    found = {n.removeprefix(prefix): m for n, m in model.named_modules() if adapter in getattr(m, "lora_A", ())}
    assert found.keys() == {n for n, rank in lora.ranks.items() if rank or layout == "padded"}
    for n, module in found.items():
        layer, A, B = lora.layers[n], module.lora_A[adapter].weight, module.lora_B[adapter].weight
        assert torch.equal(A[: layer.rank], layer.lora_A) and torch.equal(B[:, : layer.rank], layer.lora_B), n
        assert not A[layer.rank :].any() and not B[:, layer.rank :].any(), n
        assert module.scaling[adapter] == 1


def assert_close(what: str, found: torch.Tensor, expected: torch.Tensor, within: float = TOLERANCE) -> None:
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    print(f"{what}: {difference:.1e}")
    assert difference <= within, (what, difference)


@MODELS
@LAYOUTS
def test_load(name, layout, tmp_path):
    """Loaded beside one another, each computes what it does in COBRA, and what it does alone."""
    folders = saved(tmp_path, name, layout)
    model, batch = loaded(name, folders[0]), CASES[name].batch()
    assert_matrices(model, made(name, 0).lora, layout)
    assert_close("load", logits_of(model, batch), made(name, 0).logits)
    model.load_adapter(folders[1], "second")
    model.set_adapter("second")
    model.eval()
    assert_matrices(model, made(name, 1).lora, layout, "second")
    assert_close("second adapter", logits_of(model, batch), made(name, 1).logits)
    model.set_adapter("default")
    assert torch.equal(logits_of(model, batch), logits_of(loaded(name, folders[0]), batch))


@MODELS
@LAYOUTS
def test_saved_by_peft_and_read_back(name, layout, tmp_path):
    """COBRA's file, peft's file of it, and COBRA's adapter of that are one."""
    folder, again = saved(tmp_path, name, layout)[0], tmp_path / "again"
    loaded(name, folder).save_pretrained(again)
    lora, found = cobra.load_adapter(folder), cobra.load_adapter(again)
    assert found.ranks == lora.ranks and found.heads.keys() == lora.heads.keys()
    for n, layer in lora.layers.items():
        assert torch.equal(found.layers[n].lora_A, layer.lora_A) and torch.equal(found.layers[n].lora_B, layer.lora_B)
    assert all(torch.equal(found.heads[n][k], v) for n, head in lora.heads.items() for k, v in head.items())


@MODELS
@LAYOUTS
def test_merge_and_unload(name, layout, tmp_path):
    """The base model's own modules again, with the weights that COBRA's merge has."""
    merged = loaded(name, saved(tmp_path, name, layout)[0]).merge_and_unload().eval()
    expected, base = made(name, 0), CASES[name].build()
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
    for n, weight in expected.merged.items():
        difference = (merged.get_submodule(n).weight - weight).abs().max().item()
        assert difference <= 2 * torch.finfo(weight.dtype).eps * weight.abs().max().item(), n
    worst = max((merged.get_submodule(n).weight - w).abs().max() / w.abs().max() for n, w in expected.merged.items())
    print(f"merged weights: {worst:.1e}")
    untouched = {n: p for n, p in base.named_parameters() if n.removesuffix(".weight") not in expected.merged}
    heads = tuple(expected.lora.heads)
    assert all(torch.equal(merged.get_parameter(n), p) for n, p in untouched.items() if not n.startswith(heads or "\0"))
    assert_close("merge_and_unload", logits_of(merged, CASES[name].batch()), expected.merged_logits)


@MODELS
@LAYOUTS
def test_mixed_batch(name, layout, tmp_path):
    """Rows of one batch with the first adapter, the second, and none: each as if all rows were its own."""
    folders = saved(tmp_path, name, layout)
    model, batch = loaded(name, folders[0]), CASES[name].batch()
    model.load_adapter(folders[1], "second")
    model.eval()
    rows = ["default", "second", "__base__", "second"]
    with torch.no_grad():
        logits = model(**batch, adapter_names=rows).logits
    alone = {
        "default": made(name, 0).logits,
        "second": made(name, 1).logits,
        "__base__": logits_of(CASES[name].build(), batch),
    }
    for i, row in enumerate(rows):
        shown = batch["attention_mask"][i].bool() if logits.ndim == 3 else ...
        assert_close(f"row of {row}", logits[i][shown], alone[row][i][shown])


@MODELS
@LAYOUTS
def test_load_adapter_of_transformers(name, layout, tmp_path):
    """Without peft's wrapper: names have no prefix, and a second adapter comes beside the first."""
    folders = saved(tmp_path, name, layout)
    model, batch = CASES[name].build(), CASES[name].batch()
    for i, folder in enumerate(folders):
        info = model.load_adapter(folder, adapter_name=f"adapter{i}")
        missing = {key for key in info.missing_keys if f"adapter{i}" in key}  # it lists those of other adapters too
        assert not missing and not info.unexpected_keys and not info.mismatched_keys
    for i in range(2):
        model.set_adapter(f"adapter{i}")
        model.eval()
        assert_matrices(model, made(name, i).lora, layout, f"adapter{i}", prefix="")
        assert_close(f"load_adapter, {i}", logits_of(model, batch), made(name, i).logits)


@MODELS
def test_hotswap_of_padded_adapters(name, tmp_path):
    """Any for any other: to larger ranks and to smaller ones, to layers that had none, and back again."""
    folders = saved(tmp_path, name, "padded", heads=False)
    model, batch = loaded(name, folders[0]), CASES[name].batch()
    logits = [logits_of(loaded(name, folder), batch) for folder in folders]
    for i in (1, 0, 1):
        hotswap_adapter(model, folders[i], "default", torch_device="cpu")
        assert_matrices(model, made(name, i).lora, "padded")
        assert_close(f"hotswap to {i}", logits_of(model, batch), logits[i], within=TOLERANCE if i == 0 else 0)


@MODELS
def test_hotswap_of_compact_adapters(name, tmp_path):
    """Of equal ranks, as the checkpoints of one run are. Others are refused by peft, and nothing is swapped."""
    folders = saved(tmp_path, name, "compact", heads=False)
    lora = replace(made(name, 0).lora, heads={})
    later = replace(lora, layers={n: replace(layer, lora_B=2 * layer.lora_B) for n, layer in lora.layers.items()})
    later.save_pretrained(tmp_path / "later")
    model, batch = loaded(name, folders[0]), CASES[name].batch()
    with pytest.raises(ValueError, match="Configs are incompatible: for alpha_pattern"):
        hotswap_adapter(model, folders[1], "default", torch_device="cpu")
    assert_matrices(model, lora, "compact")
    hotswap_adapter(model, tmp_path / "later", "default", torch_device="cpu")
    assert_matrices(model, later, "compact")
    assert torch.equal(logits_of(model, batch), logits_of(loaded(name, tmp_path / "later"), batch))


def distilbert() -> nn.Module:
    """Its head is a classifier behind a pre_classifier, which peft's rule of endings takes for one too."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 16}
    return transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**sizes)).eval()


def test_heads_that_end_alike(tmp_path):
    """peft's adapter loads here and ours loads there, and the check says so of both."""
    batch = {"input_ids": torch.arange(14).view(2, 7)}
    settings = {"r": 4, "target_modules": ["q_lin", "v_lin"], "init_lora_weights": False}
    theirs = peft.get_peft_model(distilbert(), peft.LoraConfig(task_type="SEQ_CLS", **settings)).eval()
    with torch.no_grad():
        theirs.base_model.model.pre_classifier.modules_to_save["default"].weight.mul_(2)
    theirs.save_pretrained(tmp_path / "theirs")
    lora, model = cobra.load_adapter(tmp_path / "theirs"), distilbert()
    assert lora.heads.keys() == {"classifier", "pre_classifier"}
    lora.attach(model)
    assert_close("theirs, here", logits_of(model.eval(), batch), logits_of(theirs, batch))

    model = distilbert()
    config = cobra.CobraConfig(4, r_max=4, gate="open", target_modules=("q_lin", "v_lin"), modules_to_save=("classifier",))
    adapter = cobra.attach(model, config)
    with torch.no_grad():
        for p in [*(group.layers[0][0].lora_B for group in adapter.groups), model.classifier.weight]:
            p.normal_()
    adapter.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = peft.PeftModel.from_pretrained(distilbert(), tmp_path / "ours").eval()
    assert_close("ours, there", logits_of(loaded, batch), logits_of(model.eval(), batch))
    for folder in ("theirs", "ours"):
        assert not check_adapter(tmp_path / folder, ["peft"]).verdicts["peft"].findings


def test_adapted_modules_that_peft_takes_for_heads(tmp_path):
    """A layer whose name ends as the head's does: peft cannot load it, and both the export and the check say so."""
    model = nn.ModuleDict({"multihead": nn.Linear(6, 6), "head": nn.Linear(6, 2)})
    adapter = cobra.attach(model, cobra.CobraConfig(2, r_max=2, gate="open", modules_to_save=("head",)))
    with pytest.warns(UserWarning, match="multihead ends as head does, .* cannot load the adapter of multihead"):
        adapter.save_pretrained(tmp_path / "a")
    assert cobra.load_adapter(tmp_path / "a").ranks == {"multihead": 2}
    assert not check_adapter(tmp_path / "a", ["peft"]).ok
