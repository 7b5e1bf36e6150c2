"""The check as its users see it: verdicts, what they advise, and adapters of other programs."""

import json

import pytest
import serving
import torch
from models import Mlp, minilm, stir
from safetensors.torch import save_file
from test_folder import write

import cobra
from cobra.export.check import ENGINES, AdapterCheck, Verdict, check_adapter
from cobra.export.folder import PREFIX
from cobra.export.rules import Finding


def lora(ranks: dict[str, int], **config):
    """Settings and tensors of an adapter with these ranks, alpha 4."""
    r = max(ranks.values())
    pattern = {name: rank for name, rank in ranks.items() if rank != r}
    tensors = {f"{PREFIX}{name}.lora_A.weight": torch.ones(rank, 3) for name, rank in ranks.items()}
    tensors |= {f"{PREFIX}{name}.lora_B.weight": torch.ones(5, rank) for name, rank in ranks.items()}
    return {"r": r, "lora_alpha": 4, "target_modules": list(ranks), "rank_pattern": pattern} | config, tensors


def findings(folder, engine) -> list[tuple[str, str]]:
    return [(f.level, f"{f.message} -> {f.fix}") for f in check_adapter(folder, [engine]).verdicts[engine].findings]


def has(found, level, words) -> bool:
    return any(level == their_level and words in text for their_level, text in found)


@pytest.mark.parametrize("rank", [4, 16, 17, 200, 512])
def test_vllm_flag(rank, tmp_path):
    """Up to 16 nothing need be said; above it the smallest value that vLLM allows."""
    found = findings(write(tmp_path / "a", *lora({"layers.0.o_proj": rank})), "vllm")
    flag = {17: 32, 200: 256, 512: 512}.get(rank)
    assert has(found, "warning", f"--max-lora-rank {flag}") == (flag is not None)
    assert check_adapter(tmp_path / "a", ["vllm"]).ok


def test_the_largest_rank_may_be_in_the_pattern(tmp_path):
    config, tensors = lora({"layers.0.o_proj": 40, "layers.1.o_proj": 2})
    config |= {"r": 2, "rank_pattern": {"layers.0.o_proj": 40}}
    assert has(findings(write(tmp_path / "a", config, tensors), "vllm"), "warning", "--max-lora-rank 64")


def test_older_vllm_is_told(tmp_path):
    """One alpha for all: right since rank_pattern is read, wrong before."""
    folder = write(tmp_path / "a", *lora({"layers.0.o_proj": 4, "layers.1.o_proj": 2}))
    assert has(
        findings(folder, "vllm"), "note", "vLLM <= 0.31 knows no rank_pattern and scales every module with lora_alpha / r"
    )


def test_patterns_that_do_nothing(tmp_path):
    """A name with peft's prefix, and one that another key catches first."""
    config, tensors = lora({"layers.0.o_proj": 4})
    config["alpha_pattern"] = {f"{PREFIX}layers.0.o_proj": 8, "o_proj": 4, "layers.0.o_proj": 8, "0.o_proj": 4}
    found = findings(write(tmp_path / "a", config, tensors), "peft")
    assert [level for level, _ in found] == ["warning", "warning"]
    assert has(found, "warning", f"alpha_pattern['{PREFIX}layers.0.o_proj'] matches no module")
    assert has(found, "warning", "alpha_pattern['layers.0.o_proj'] never applies: layers.0.o_proj matches 'o_proj' first")


EXPERTS = {f"layers.{i}.mlp.experts.{e}.{p}_proj": 2 for i in range(2) for e in range(3) for p in ("gate", "up", "down")}


def test_experts_of_one_rank(tmp_path):
    folder = write(tmp_path / "a", *lora(EXPERTS))
    assert not any(level == "error" for level, _ in findings(folder, "vllm"))
    assert not any("experts" in text for _, text in findings(folder, "peft"))


@pytest.mark.parametrize(
    "lacking", [["layers.1.mlp.experts.2.up_proj"], [n for n in EXPERTS if n.startswith("layers.1") and "up" in n]]
)
def test_experts_that_lack_one(lacking, tmp_path):
    """vLLM stacks them: all experts need all projections, in every layer that has any."""
    ranks = {name: rank for name, rank in EXPERTS.items() if name not in lacking}
    assert has(findings(write(tmp_path / "a", *lora(ranks)), "vllm"), "error", f"{lacking[0]} has no adapter")


def test_experts_of_uneven_ranks(tmp_path):
    ranks = EXPERTS | {"layers.1.mlp.experts.2.up_proj": 1}
    folder = write(tmp_path / "a", *lora(ranks))
    assert has(findings(folder, "vllm"), "error", "layers.1.mlp.experts.*.up_proj has ranks 1, 2: experts are stacked")
    assert has(findings(folder, "transformers"), "warning", "layers.1.mlp.experts.2.up_proj: experts of a rank other than r=2")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 2])
def test_vllm_packs_experts(rank, tmp_path):
    """Its own packing raises where the rule says so."""
    folder = write(tmp_path / "a", *lora(EXPERTS | {"layers.1.mlp.experts.2.up_proj": rank}))
    with serving.loaded("vllm", serving.VLLM, {"vllm.envs": {"VLLM_LORA_ENABLE_DUAL_STREAM": False}}):
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.lora_weights import PackedLoRALayerWeights
        from vllm.lora.peft_helper import PEFTHelper

        helper = PEFTHelper.from_local_dir(str(folder), None)
        names = {name[name.find("experts") :] for name in EXPERTS}
        model = LoRAModel.from_local_checkpoint(str(folder), names, helper, lora_model_id=1, device="cpu")
        experts = [model.loras[f"layers.1.mlp.experts.{e}.{p}_proj"] for e in range(3) for p in ("gate", "down", "up")]
        try:
            PackedLoRALayerWeights.pack_moe(experts, "layers.1.mlp.experts")
            packed = True
        except ValueError:
            packed = False
    assert packed == (rank == 2) == check_adapter(folder, ["vllm"]).ok


def test_fused_experts(tmp_path):
    name = f"{PREFIX}layers.0.mlp.experts.lora_"
    tensors = {f"{name}A.weight": torch.ones(6, 3), f"{name}B.weight": torch.ones(4, 6)}
    found = check_adapter(write(tmp_path / "a", {"target_modules": [], "target_parameters": ["down_proj"]}, tensors))
    assert {engine: verdict.ok for engine, verdict in found.verdicts.items() if engine != "transformers"} == {
        "peft": True,
        "vllm": True,
        "sglang": False,
        "gguf": False,
    }


def test_convolutions(tmp_path):
    name = f"{PREFIX}layers.0.conv.lora_"
    tensors = {f"{name}A.weight": torch.ones(2, 3, 5, 5), f"{name}B.weight": torch.ones(4, 2, 1, 1)}
    found = check_adapter(write(tmp_path / "a", {"target_modules": ["conv"]}, tensors))
    assert [engine for engine, verdict in found.verdicts.items() if verdict.ok] == ["peft", "transformers"]


def test_norms_are_lost_by_llama_cpp(tmp_path):
    config, tensors = lora({"layers.0.o_proj": 2}, modules_to_save=["input_layernorm"], base_model_name_or_path="some/base")
    tensors[f"{PREFIX}layers.0.input_layernorm.weight"] = torch.ones(3)
    folder = write(tmp_path / "a", config, tensors)
    assert findings(folder, "gguf")[0][1].startswith(
        "layers.0.input_layernorm.weight: weights of norms are converted, and dropped"
    )


def test_heads(tmp_path):
    """A classifier goes to vLLM under this name, and only as one linear layer."""
    config, tensors = lora({"layers.0.o_proj": 2}, modules_to_save=["classifier"])
    one = write(tmp_path / "one", config, tensors | {f"{PREFIX}classifier.weight": torch.ones(2, 5)})
    two = write(tmp_path / "two", config, tensors | {f"{PREFIX}classifier.dense.weight": torch.ones(2, 5)})
    assert check_adapter(one, ["peft", "vllm"]).ok
    assert has(findings(two, "vllm"), "error", "classifier.dense.weight: unsupported LoRA weight")


def test_sglang_warnings(tmp_path):
    """Modules it may not know, files it would read too, tokens it refuses, and gates that are not there."""
    folder = write(tmp_path / "a", *lora({"layers.0.mlp.up_proj": 4, "layers.0.mlp.dense": 4}))
    save_file({}, folder / "optimizer.safetensors")
    (folder / "added_tokens.json").write_text("{}")
    found = findings(folder, "sglang")
    for words in (
        "dense: modules that load only where",
        "optimizer.safetensors: every",
        "added_tokens.json",
        "models that have no gate",
    ):
        assert has(found, "warning", words)
    assert has(found, "note", "--max-lora-rank 4 or more")


@pytest.mark.filterwarnings("ignore:Adapter 'default'")
def test_adalora(tmp_path):
    """Another format, written by peft itself: bare parameters, and lists of bools for ranks."""
    from peft import AdaLoraConfig, get_peft_model

    model = get_peft_model(Mlp(), AdaLoraConfig(target_modules=["up", "mid"], init_r=3, target_r=1, tfinal=1, total_step=6))
    for step in range(5):
        model(torch.randn(4, 6)).square().mean().backward()
        model.base_model.update_and_allocate(step)
    model.save_pretrained(tmp_path)
    assert any(isinstance(v, list) for v in json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"].values())
    found = check_adapter(tmp_path)
    assert {engine: [f.level for f in verdict.findings] for engine, verdict in found.verdicts.items()} == {
        "peft": ["warning"],
        "transformers": ["warning"],
        "vllm": ["error"],
        "sglang": ["error"],
        "gguf": ["error"],
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["compact", "padded"])
def test_minilm(layout, tmp_path):
    """Real weights: an encoder with a head loads in peft and transformers, head and all, and where it cannot, that is said."""
    model = minilm()
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=40, r_max=4, gate="mean"))
    stir(adapter)
    adapter.apply(adapter.extract())
    adapter.save_pretrained(tmp_path / "a", layout)
    found = check_adapter(tmp_path / "a")
    assert [engine for engine, verdict in found.verdicts.items() if verdict.ok] == ["peft", "transformers", "vllm"]
    lost = "bert.encoder.layer.0.attention.self.query"
    assert any(lost in f.message and "dropped in silence" in f.message for f in found.verdicts["sglang"].findings)
    updates = {name: layer.lora_B @ layer.lora_A for name, layer in adapter.to_lora().layers.items() if layer.rank}
    for load in (serving.peft_updates, serving.transformers_updates):
        base = minilm()
        loaded = load(tmp_path / "a", base)
        assert all(torch.allclose(loaded[name], update, atol=1e-6) for name, update in updates.items())
        (head,) = [m.modules_to_save["default"] for m in base.modules() if hasattr(m, "modules_to_save")]
        assert torch.equal(head.weight, model.classifier.weight)


CHECK = AdapterCheck(
    "adapters/a",
    {
        "peft": Verdict("peft", "1.2", ()),
        "sglang": Verdict("sglang", "3.4", (Finding("error", "up: rank 2", "pad it"), Finding("note", "by the way"))),
    },
)


def test_table():
    assert CHECK.table().splitlines() == [
        "engine  loads  version",
        "peft    yes    1.2",
        "sglang  no     3.4",
        "  error: up: rank 2",
        "    fix: pad it",
        "  note: by the way",
    ]


def test_values():
    assert repr(CHECK) == "AdapterCheck(adapters/a: peft yes, sglang no)"
    assert not CHECK.ok and CHECK.verdicts["peft"].ok
    assert json.loads(json.dumps(CHECK.to_dict()))["verdicts"]["sglang"] == {
        "ok": False,
        "version": "3.4",
        "findings": [
            {"level": "error", "message": "up: rank 2", "fix": "pad it"},
            {"level": "note", "message": "by the way", "fix": ""},
        ],
    }


def test_engines_are_chosen_by_name(tmp_path):
    folder = write(tmp_path / "a")
    assert tuple(check_adapter(folder).verdicts) == ENGINES
    assert tuple(check_adapter(folder, ["gguf", "peft"]).verdicts) == ("gguf", "peft")
    for engines in (["ollama"], "peft"):
        with pytest.raises(ValueError, match="expected a list of some of peft, transformers, vllm, sglang, gguf"):
            check_adapter(folder, engines)
