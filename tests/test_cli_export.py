"""`cobra export`: the other layout and the way back, adapters of peft, training checkpoints, cards, and what is refused."""

import json
import re

import pytest
import torch
from models import attached, image_batch, logits_of, minilm_folder, same, stir, train, vit
from safetensors.torch import load_file
from test_cli_merge import refused
from test_load import peft_folder
from test_lora import trained
from typer.testing import CliRunner

import cobra
from cobra import storage
from cobra.cli.app import app

TENSORS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"


def export(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes))


def exported(*arguments) -> str:
    result = export(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def made(tmp_path):
    """An adapter of uneven ranks, zeros among them, in both layouts, and its base model."""
    vit().save_pretrained(tmp_path / "base")
    _, adapter = trained(vit, modules_to_save="auto")
    assert 0 in adapter.plan.ranks.values()
    for layout in ("compact", "padded"):
        adapter.save_pretrained(tmp_path / layout, layout)
    return tmp_path, adapter


def assert_same_folder(found, expected) -> None:
    mine, theirs = load_file(found / TENSORS), load_file(expected / TENSORS)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    for name in (CONFIG, CARD, "cobra.json"):
        assert (found / name).read_text() == (expected / name).read_text(), name


def test_padded_to_compact_is_what_training_would_have_written(made):
    folder, _ = made
    printed = exported(folder / "padded", "--out", folder / "out")
    assert_same_folder(folder / "out", folder / "compact")
    assert re.search("sglang +no", printed) and printed.splitlines()[-1] == str(folder / "out")


def test_compact_to_padded(made):
    """With the base, rank 0 comes back as zeros and nothing differs; without it those layers stay away."""
    folder, adapter = made
    exported(folder / "compact", "--out", folder / "whole", "--layout", "padded", "--base", folder / "base")
    assert_same_folder(folder / "whole", folder / "padded")
    exported(folder / "compact", "--out", folder / "kept", "--layout", "padded")
    found = json.loads((folder / "kept" / CONFIG).read_text())
    assert found["target_modules"] == [name for name, rank in adapter.plan.ranks.items() if rank]
    assert found["rank_pattern"] == {}


def test_there_and_back(made):
    folder, _ = made
    exported(folder / "compact", "--out", folder / "there", "--layout", "padded")
    exported(folder / "there", "--out", folder / "back")
    for name in (TENSORS, CONFIG):
        assert (folder / "back" / name).read_bytes() == (folder / "compact" / name).read_bytes()


def test_an_edited_card_is_kept(made):
    folder, _ = made
    (folder / "compact" / CARD).write_text("# Mine\n")
    exported(folder / "compact", "--out", folder / "out", "--layout", "padded")
    assert (folder / "out" / CARD).read_text() == "# Mine\n"


def test_an_adapter_of_peft(tmp_path):
    """Card and task stay; outputs are those of the model that peft wrapped."""
    wrapped = peft_folder(vit, tmp_path / "peft", rank_pattern={"fc1": 2}, alpha_pattern={"fc2": 12}, task_type="SEQ_CLS")
    card = (tmp_path / "peft" / CARD).read_bytes()
    exported(tmp_path / "peft", "--out", tmp_path / "out", "--layout", "padded")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["task_type"] == "SEQ_CLS" and config["r"] == config["lora_alpha"] == 4
    assert (tmp_path / "out" / CARD).read_bytes() == card
    model = vit()
    cobra.load_adapter(tmp_path / "out").attach(model)
    with torch.no_grad():
        expected = wrapped(**image_batch()).logits
    torch.testing.assert_close(logits_of(model.eval(), image_batch()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("phase", ["in the search", "after the cut"])
@pytest.mark.parametrize("granularity", ["site", "block"])
def test_a_training_checkpoint(phase, granularity, tmp_path):
    """A run in its search is cut to its budget; outputs are those of the run, the file that save_pretrained writes the same."""
    vit().save_pretrained(tmp_path / "base")
    model, adapter = attached(vit, granularity=granularity, rank_budget=5)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
    train(model, adapter, optimizer, [image_batch()] * 3)
    if phase == "after the cut":
        adapter.apply(adapter.extract(), optimizer)
        train(model, adapter, optimizer, [image_batch()] * 2)
    adapter.save_checkpoint(tmp_path / "cobra.safetensors", optimizer)
    result = export(tmp_path, "--out", tmp_path / "out", "--base", tmp_path / "base", "--for", "peft")
    assert result.exit_code == 0, result.output
    assert ("the search was still going on, at step 3" in result.stderr) == (phase == "in the search")
    if phase == "in the search":
        adapter.apply(adapter.extract())
    adapter.save_pretrained(tmp_path / "expected")
    mine, theirs = (load_file(tmp_path / name / TENSORS) for name in ("out", "expected"))
    assert mine.keys() == theirs.keys() and same(list(mine.values()), [theirs[key] for key in mine])
    assert (
        cobra.load_adapter(tmp_path / "out").provenance["plan"] == cobra.load_adapter(tmp_path / "expected").provenance["plan"]
    )


def test_a_checkpoint_from_before_there_was_a_choice_of_basis(tmp_path):
    """It is cut by gates, as it was meant to be, and not as the default has it at this budget now."""
    vit().save_pretrained(tmp_path / "base")
    path = tmp_path / "cobra.safetensors"
    attached(vit, rank_budget=5)[1].save_checkpoint(path)
    tensors, meta = storage.read_tensors(path, "training checkpoint")
    del meta["config"]["basis"]
    storage.write_tensors(path, tensors, "training checkpoint", {k: v for k, v in meta.items() if k not in ("kind", "version")})
    exported(tmp_path, "--out", tmp_path / "out", "--base", tmp_path / "base")
    assert cobra.load_adapter(tmp_path / "out").provenance["plan"]["provenance"]["source"] == "gates"


def test_a_checkpoint_of_a_run_with_scores(tmp_path):
    """Directions, priors for each rank, a budget in parameters, layers chosen by a function: nothing of it is needed again."""
    vit().save_pretrained(tmp_path / "base")
    model = vit()
    some = {"target_modules": lambda name, module: "mlp" in name}
    scores = cobra.calibrate(model, [image_batch()], steps=3, directions=4, progress=False, **some)
    config = cobra.CobraConfig(
        cobra.Budget(600, "parameters"), r_max=4, gate="mean", init="gradient", prior_level="rank", alpha=3.0, **some
    )
    adapter = cobra.attach(model, config, scores)
    stir(adapter)
    adapter.save_checkpoint(tmp_path / "run.safetensors")
    exported(tmp_path / "run.safetensors", "--out", tmp_path / "out", "--base", tmp_path / "base")
    adapter.apply(adapter.extract())
    found, expected = cobra.load_adapter(tmp_path / "out"), adapter.to_lora()
    assert found.ranks == {name: rank for name, rank in expected.ranks.items() if rank}
    assert all(torch.equal(layer.lora_B, expected.layers[name].lora_B) for name, layer in found.layers.items())


def test_a_checkpoint_on_a_named_model_or_a_bare_encoder(tmp_path):
    """The head's labels are the checkpoint's, whatever the base has."""
    from cobra.cli.encoder import load_encoder

    model = load_encoder(labels=3)[0]
    adapter = cobra.attach(model, cobra.CobraConfig(20, r_max=2, gate="mean"))
    stir(adapter)
    adapter.save_checkpoint(tmp_path / "run.safetensors")
    exported(tmp_path / "run.safetensors", "--out", tmp_path / "named", "--base", "minilm")
    bert = ("--base", minilm_folder(), "--architecture", "BertForSequenceClassification")
    exported(tmp_path / "run.safetensors", "--out", tmp_path / "bare", *bert)
    adapter.apply(adapter.extract())
    for name in ("named", "bare"):
        found = cobra.load_adapter(tmp_path / name)
        assert found.ranks == {layer: rank for layer, rank in adapter.plan.ranks.items() if rank}
        assert torch.equal(found.heads["classifier"]["weight"], model.classifier.weight)


def head_of(model, base, folder) -> dict[str, torch.Tensor]:
    """Of the exported checkpoint of an adapter on the model."""
    adapter = cobra.attach(model, cobra.CobraConfig(5, r_max=2, gate="mean"))
    stir(adapter)
    adapter.save_checkpoint(folder / "run.safetensors")
    exported(folder / "run.safetensors", "--out", folder / "out", "--base", base)
    return cobra.load_adapter(folder / "out").heads["classifier"]


def test_a_head_that_trained_in_fp32_on_a_base_in_bf16(tmp_path):
    """As it trained, bit for bit."""
    model = vit().bfloat16().float()
    vit().bfloat16().save_pretrained(tmp_path / "base")
    found = head_of(model, tmp_path / "base", tmp_path)
    assert found["weight"].dtype == torch.float32 and torch.equal(found["weight"], model.classifier.weight)


def test_a_head_of_other_labels_than_the_base(tmp_path):
    """The checkpoint's labels count, in the class that the base has too."""
    vit(labels=3).save_pretrained(tmp_path / "base")
    model = type(vit()).from_pretrained(tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True)
    found = head_of(model, tmp_path / "base", tmp_path)
    assert torch.equal(found["weight"], model.classifier.weight) and torch.equal(found["bias"], model.classifier.bias)


def test_json(made):
    folder, _ = made
    found = json.loads(exported(folder / "padded", "--out", folder / "out", "--for", "peft, vllm", "--json"))
    assert found["folder"] == str(folder / "out") and list(found["verdicts"]) == ["peft", "vllm"] and found["ok"]


# refusals


def test_an_engine_that_would_not_load_it(tmp_path):
    """Nothing is written; the error says what to change."""
    trained(llama)[1].save_pretrained(tmp_path / "a", "padded")
    refused(
        export(tmp_path / "a", "--out", tmp_path / "out", "--for", "peft,sglang"),
        "sglang 0.5.23 would not load it",
        'layout="padded"',
        "nothing was written",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    exported(tmp_path / "a", "--out", tmp_path / "out", "--layout", "padded", "--for", "sglang")


def test_refuses(made):
    folder, adapter = made
    refused(export(folder / "compact", "--out", folder / "padded"), "padded exists; name a new folder")
    refused(export(folder / "nowhere", "--out", folder / "out"), "nowhere", "no such folder")
    refused(export(folder / "compact", "--out", folder / "out", "--for", "ollama"), "engine 'ollama' is unknown")
    adapter.save_checkpoint(folder / "run.safetensors")
    refused(export(folder / "run.safetensors", "--out", folder / "out"), "is a training checkpoint", "--base MODEL")
    (folder / "other").mkdir()
    other = vit()
    with torch.no_grad():
        other.vit.layers[0].mlp.fc1.weight.add_(1)
    other.save_pretrained(folder / "other")
    refused(
        export(folder / "run.safetensors", "--out", folder / "out", "--base", folder / "other"),
        "run.safetensors is of another model: fingerprint",
    )
    refused(
        export(folder / "compact" / TENSORS, "--out", folder / "out", "--base", folder / "base"),
        "expected a COBRA training checkpoint",
    )
    assert not (folder / "out").exists()
