"""What the exported files hold, and what becomes of a folder when the export cannot go through."""

import json
import os
import re

import pytest
import torch
from models import gpt2, image_batch, layers_of, logits_of, stir, token_batch, vit
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import cobra
from cobra import storage
from cobra.lora import LoraAdapter, LoraLayer
from cobra.plan import RankPlan

LAYOUTS = pytest.mark.parametrize("layout", ["compact", "padded"])
FILES = {"adapter_config.json", "adapter_model.safetensors", "cobra.json", "README.md"}


def cut_adapter(build=vit, budget: int = 8, **changes):
    """An adapter of several ranks, some of them 0."""
    model = build()
    adapter = cobra.attach(model, cobra.CobraConfig(**{"rank_budget": budget, "r_max": 4, "gate": "mean"} | changes))
    stir(adapter)
    adapter.apply(adapter.extract())
    model.eval()
    return model, adapter


def read(folder) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def load_in_peft(base, folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(base, folder).eval()


def test_compact_config(tmp_path):
    """Every field a reader of LoRA checkpoints looks at; layers without rank appear nowhere."""
    _, adapter = cut_adapter()
    adapter.save_pretrained(tmp_path / "a")
    ranks = {name: rank for name, rank in adapter.plan.ranks.items() if rank}
    largest = max(ranks.values())
    smaller = {name: rank for name, rank in ranks.items() if rank < largest}
    assert len(ranks) < 12 and smaller
    config, tensors = read(tmp_path / "a")
    assert config == {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {
            "base_model_class": "ViTForImageClassification",
            "parent_library": "transformers.models.vit.modeling_vit",
        },
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(ranks),
        "modules_to_save": ["classifier"],
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
    }
    matrices = {f"base_model.model.{name}.lora_{x}.weight" for name in ranks for x in "AB"}
    assert tensors.keys() == matrices | {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    assert all(tensors[f"base_model.model.{name}.lora_A.weight"].shape[0] == rank for name, rank in ranks.items())
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == FILES


def test_padded_config(tmp_path):
    """One rank for all, rank 0 too, for engines that read only one and want all of a layer's projections."""
    _, adapter = cut_adapter()
    adapter.save_pretrained(tmp_path / "a", layout="padded")
    config, tensors = read(tmp_path / "a")
    assert config["target_modules"] == list(adapter.plan.ranks) and 0 in adapter.plan.ranks.values()
    dropped = [name for name, rank in adapter.plan.ranks.items() if not rank]
    assert not any(tensors[f"base_model.model.{name}.lora_{x}.weight"].any() for name in dropped for x in "AB")
    assert config["r"] == config["lora_alpha"] == max(adapter.plan.ranks.values())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert {t.shape[0] for key, t in tensors.items() if "lora_A" in key} == {config["r"]}
    assert {t.shape[1] for key, t in tensors.items() if "lora_B" in key} == {config["r"]}


@LAYOUTS
@pytest.mark.parametrize("cut", [False, True], ids=["search", "cut"])
def test_scale_and_gates_are_folded(layout, cut, tmp_path):
    """A reader multiplies lora_B by lora_A and knows of nothing else, so that product is the whole update."""
    model = gpt2()
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=9, r_max=3, alpha=5.0, gate="mean", fold="mean"))
    stir(adapter)
    if cut:
        adapter.apply(adapter.extract())
    adapter.save_pretrained(tmp_path / "a", layout)
    config, tensors = read(tmp_path / "a")
    assert config["target_modules"]
    for name in config["target_modules"]:
        layer = model.get_submodule(name)
        if not isinstance(layer, cobra.CobraLinear):
            continue
        gates = 1 if layer.lora_gate is None else layer.lora_gate.sigmoid()
        expected = 5 / (9 / 8) * (layer.lora_B * gates) @ layer.lora_A
        found = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "BA")
        torch.testing.assert_close(torch.matmul(*found), expected.detach())


@pytest.mark.parametrize(("build", "transposed"), [(vit, False), (gpt2, True)])
def test_conv1d_is_told(build, transposed, tmp_path):
    """The matrices have one orientation; only the flag says that the base weight has the other."""
    _, adapter = cut_adapter(build)
    adapter.save_pretrained(tmp_path / "a")
    config, tensors = read(tmp_path / "a")
    assert config["fan_in_fan_out"] is transposed
    for group in adapter.groups:
        site = group.sites[0]
        assert tensors[f"base_model.model.{site.name}.lora_A.weight"].shape == (group.rank, site.in_features)


@LAYOUTS
def test_heads_load_in_peft(layout, tmp_path):
    """A head trained whole travels with the adapter and replaces the one of the base model."""
    model, adapter = cut_adapter()
    adapter.save_pretrained(tmp_path / "a", layout)
    loaded = load_in_peft(vit(), tmp_path / "a")
    head = loaded.base_model.model.classifier.modules_to_save["default"]
    assert torch.equal(head.weight, model.classifier.weight) and not torch.equal(head.weight, vit().classifier.weight)
    torch.testing.assert_close(logits_of(loaded, image_batch()), logits_of(model, image_batch()), rtol=1e-5, atol=1e-5)


@LAYOUTS
def test_what_is_not_finite_is_not_written(layout, tmp_path):
    """Over a good adapter neither."""
    _, adapter = cut_adapter()
    adapter.save_pretrained(tmp_path / "a", layout)
    good = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    layers_of(adapter)[0].lora_A.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"lora_A\.weight holds NaN or Inf: the training diverged; nothing was written"):
        adapter.save_pretrained(tmp_path / "a", layout)
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == good


def test_rank_zero_is_dropped(tmp_path):
    """peft has no rank 0: such a layer must stay a plain layer there."""
    _, adapter = cut_adapter(budget=3)
    adapter.save_pretrained(tmp_path / "a")
    loaded = load_in_peft(vit(), tmp_path / "a")
    adapted = {n.removeprefix("base_model.model.") for n, m in loaded.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {name for name, rank in adapter.plan.ranks.items() if rank}
    assert len(adapted) <= 3


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("ranks", [(1, 3), (3, 1), (2, 2), (0, 2), (2, 0)], ids=str)
def test_names_that_end_alike(ranks, tmp_path):
    """peft takes "up" for every layer whose name ends in it: the other one must not get its rank."""

    def build():
        torch.manual_seed(0)
        return nn.ModuleDict({"up": nn.Linear(6, 6), "inner": nn.ModuleDict({"up": nn.Linear(6, 6)})})

    def outputs(model):
        model = getattr(model, "base_model", model)
        return [model.get_submodule(name)(torch.ones(1, 6)) for name in (n for n, _ in model.named_modules() if n[-2:] == "up")]

    model = build()
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=sum(ranks), r_max=3, gate="mean"))
    with torch.no_grad():
        for group, rank in zip(adapter.groups, ranks, strict=True):
            group.gate[:rank] += 1
    assert [site.rank for site in adapter.extract().sites] == list(ranks)
    adapter.apply(adapter.extract())
    stir(adapter)
    adapter.save_pretrained(tmp_path / "a")
    for found, expected in zip(outputs(load_in_peft(build(), tmp_path / "a")), outputs(model), strict=True):
        torch.testing.assert_close(found, expected)


@LAYOUTS
@pytest.mark.parametrize("task", ["c++", "en|de", "question answering", "a/b", "f(x)", "[a]"])
def test_names_that_are_no_plain_words(task, layout, tmp_path):
    """Keys of patterns are regular expressions: with the name itself peft would get another rank, or an error."""

    class Tasks(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.tasks = nn.ModuleDict({task: nn.Linear(6, 6), "other": nn.Linear(6, 6)})

        def forward(self, x):
            return sum(part(x) for part in self.tasks.values())

    def random(rank):
        return LoraLayer(torch.randn(rank, 6), torch.randn(6, rank))

    lora, model = LoraAdapter({f"tasks.{task}": random(2), "tasks.other": random(4)}), Tasks()
    lora.save_pretrained(tmp_path / "a", layout)
    again = cobra.load_adapter(tmp_path / "a")
    assert again.ranks == lora.ranks
    again.attach(model)
    x = torch.ones(1, 6)
    torch.testing.assert_close(load_in_peft(Tasks(), tmp_path / "a")(x), model.eval()(x))
    table = (tmp_path / "a" / "README.md").read_text().split("## Ranks")[1].split("##")[0].strip().splitlines()
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in table] == [3] * 4


def test_layers_that_share_a_weight(tmp_path):
    """peft sees two layers where COBRA trained one weight: each gets a copy."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(torch.tanh(self.one(x)))

    model, adapter = cut_adapter(Tied, budget=2)
    adapter.save_pretrained(tmp_path / "a")
    x = torch.ones(1, 6)
    torch.testing.assert_close(load_in_peft(Tied(), tmp_path / "a")(x), model(x))


def test_a_module_with_two_names(tmp_path):
    """peft would put the adapter under the first name only and compute something else, without a word."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(6, 6)
            self.two = self.one

    _, adapter = cut_adapter(Twice, budget=2)
    with pytest.raises(ValueError, match="one and two are one module"):
        adapter.save_pretrained(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_provenance(tmp_path):
    """The plan and the config travel along, in a file that other readers ignore."""
    _, adapter = cut_adapter()
    adapter.move_to_step(7)
    adapter.save_pretrained(tmp_path / "a", "padded")
    value = storage.read_json(tmp_path / "a" / "cobra.json", "adapter provenance")
    assert value["calibration"] is None
    assert RankPlan.from_dict(value["plan"]) == adapter.plan
    assert value["config"]["r_max"] == 4
    assert (value["layout"], value["step"], value["fingerprint"]) == ("padded", 7, adapter.base_fingerprint)


@pytest.mark.parametrize(("build", "batch"), [(gpt2, token_batch), (vit, image_batch)], ids=["gpt2", "vit"])
@LAYOUTS
def test_the_auto_classes_of_peft(build, batch, layout, tmp_path):
    """They make the base model from what the folder says, as they do for folders of peft, and nothing differs."""
    import peft

    build().save_pretrained(tmp_path / "base")
    model, adapter = cut_adapter(lambda: type(build()).from_pretrained(tmp_path / "base"))
    adapter.save_pretrained(tmp_path / "a", layout)
    classes = [peft.AutoPeftModel, *([peft.AutoPeftModelForCausalLM] if build is gpt2 else [])]
    for kind in classes:
        options = {"num_labels": 3} if build is vit else {}
        found = kind.from_pretrained(tmp_path / "a", **options).eval()
        reference = load_in_peft(type(build()).from_pretrained(tmp_path / "base"), tmp_path / "a")
        assert torch.equal(logits_of(found, batch()), logits_of(reference, batch()))
        assert layout == "padded" or torch.equal(logits_of(found, batch()), logits_of(model, batch()))
    peft.get_peft_model(build(), peft.LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "theirs")
    assert read(tmp_path / "a")[0]["auto_mapping"] == read(tmp_path / "theirs")[0]["auto_mapping"]


def test_classes_that_peft_does_not_know(tmp_path):
    """It imports none of them, and another class than the one that was trained would be wrong without a word."""

    class Mine(type(vit())):
        pass

    mine = vit()
    mine.__class__ = Mine
    for i, model in enumerate((mine, nn.Sequential(nn.Linear(6, 6)))):
        _, adapter = cut_adapter(lambda model=model: model, budget=1, modules_to_save=())
        adapter.save_pretrained(tmp_path / str(i))
        assert "auto_mapping" not in read(tmp_path / str(i))[0]


def test_the_class_behind_that_of_fsdp():
    """fully_shard gives a model a class of its own, made of the one that it had."""
    model, adapter = cut_adapter()
    kind = type(model)
    model.__class__ = type(f"FSDP{kind.__name__}", (kind,), {"__module__": "torch.distributed.fsdp"})
    assert adapter.to_lora().auto_mapping == {"base_model_class": kind.__name__, "parent_library": kind.__module__}


def test_merged_or_not_the_files_are_the_same(tmp_path):
    _, adapter = cut_adapter()
    adapter.save_pretrained(tmp_path / "a")
    adapter.merge()
    adapter.save_pretrained(tmp_path / "b")
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in FILES)


def test_nothing_left_to_save(tmp_path):
    _, adapter = cut_adapter(budget=0)
    with pytest.raises(ValueError, match="the plan keeps no rank"):
        adapter.save_pretrained(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_unknown_layout(tmp_path):
    _, adapter = cut_adapter()
    with pytest.raises(ValueError, match="layout='dense' is not one of compact, padded"):
        adapter.save_pretrained(tmp_path / "a", layout="dense")
    assert not list(tmp_path.iterdir())


def test_foreign_folders_are_refused(tmp_path):
    """The folder is replaced as a whole, so it must hold nothing else."""
    _, adapter = cut_adapter()
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match=r"holds other files \(notes\.txt\); name a new folder"):
        adapter.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a file; name a folder"):
        adapter.save_pretrained(tmp_path / "notes.txt")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["keep me"]


def test_a_readme_alone_is_not_an_adapter(tmp_path):
    (tmp_path / "README.md").write_text("my project")
    _, adapter = cut_adapter()
    with pytest.raises(ValueError, match=r"holds other files \(README\.md\)"):
        adapter.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my project"


def test_calibration_travels(tmp_path):
    """The scores behind the ranks are named by their fingerprint, with the prior they made."""
    model = vit()
    scores = cobra.calibrate(model, [image_batch()], steps=4, progress=False)
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=8, r_max=4, gate="mean"), scores)
    adapter.save_pretrained(tmp_path / "a")
    calibration = storage.read_json(tmp_path / "a" / "cobra.json", "adapter provenance")["calibration"]
    assert calibration["fingerprint"] == scores.fingerprint and calibration["settings"] == scores.settings
    assert list(calibration["prior"]) == list(scores.sites) and sum(calibration["prior"].values()) == pytest.approx(1)


def test_an_older_export_is_replaced(tmp_path):
    cut_adapter(gpt2)[1].save_pretrained(tmp_path / "a")
    _, adapter = cut_adapter(vit)
    adapter.save_pretrained(tmp_path / "a")
    config, _ = read(tmp_path / "a")
    assert config["target_modules"] == [name for name, rank in adapter.plan.ranks.items() if rank]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def interrupt(monkeypatch, calls, error):
    """The renaming after so many of them fails; those that follow do not."""
    replace, left = os.replace, [calls]

    def interrupted(source, target):
        left[0] -= 1
        if left[0] == -1:
            raise error("interrupted")
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize(("calls", "exchange"), [*((calls, True) for calls in range(4)), (4, False), (5, False)])
def test_a_crash_in_mid_write(calls, exchange, error, tmp_path, monkeypatch):
    """Wherever it is interrupted, the old folder is there, whole, and nothing else."""
    if not exchange:
        monkeypatch.setattr(storage, "_exchange", lambda *_: False)
    folder = tmp_path / "a"
    cut_adapter(gpt2)[1].save_pretrained(folder)
    old = {p.name: p.read_bytes() for p in folder.iterdir()}
    _, adapter = cut_adapter(vit)
    interrupt(monkeypatch, calls, error)  # four files into the new folder, the old folder away, the new one into its place
    with pytest.raises(error, match="interrupted"):
        adapter.save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == old
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("calls", range(12))
def test_a_crash_in_the_current_directory(calls, error, tmp_path, monkeypatch):
    """It is filled file by file: four are written, four put aside, four moved in. Whichever fails, all is put back."""
    folder = tmp_path / "a"
    cut_adapter(gpt2)[1].save_pretrained(folder)
    old = {p.name: p.read_bytes() for p in folder.iterdir()}
    _, adapter = cut_adapter(vit)
    monkeypatch.chdir(folder)
    interrupt(monkeypatch, calls, error)
    with pytest.raises(error, match="interrupted"):
        adapter.save_pretrained(".")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == old
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    adapter.save_pretrained(".")
    assert read(folder)[0]["target_modules"] == [name for name, rank in adapter.plan.ranks.items() if rank]


def test_a_crash_leaves_no_new_folder(tmp_path, monkeypatch):
    _, adapter = cut_adapter(gpt2)
    monkeypatch.setattr(storage, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        adapter.save_pretrained(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_dtype_of_the_adapter(tmp_path):
    """A half-precision base trains fp32 matrices, and they are saved as they are."""
    model = gpt2().bfloat16()
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=4, r_max=2, gate="mean"))
    stir(adapter)
    model.eval()
    adapter.save_pretrained(tmp_path / "a")
    _, tensors = read(tmp_path / "a")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    loaded = load_in_peft(gpt2().bfloat16(), tmp_path / "a")
    torch.testing.assert_close(logits_of(loaded, token_batch()), logits_of(model, token_batch()), rtol=5e-2, atol=5e-2)
