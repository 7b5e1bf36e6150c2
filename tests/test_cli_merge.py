"""`cobra merge` with what strangers bring: classes, quantised and broken bases, tokenizers; and when it cannot go through."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from models import attached, image_batch, logits_of, minilm, minilm_folder, review_batch, stir, vit
from test_lora import trained
from test_storage import content, ended, limit_file_size
from typer.testing import CliRunner

import cobra
from cobra.cli.app import app
from cobra.cli.base import head_tensors, load_base, name_labels, with_class
from cobra.cli.encoder import MeanPoolClassifier, load_encoder
from cobra.cli.merge import merge_folders
from cobra.export.card import model_card
from cobra.lora import class_name

run = CliRunner().invoke


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base model's folder and an adapter's."""
    folder = tmp_path_factory.mktemp("merge")
    vit().save_pretrained(folder / "base")
    trained(vit)[1].save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def merge(*arguments):
    return run(app, ["merge", *map(str, arguments)])


def refused(result, *words):
    """One line, code 2, no traceback."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def test_a_head_is_merged_into_a_class_with_one(tmp_path):
    """The packaged encoder has none; the class and the adapter trained on it bring one. The tokenizer comes along."""
    model, adapter = attached(minilm, gate="mean")
    stir(adapter)
    adapter.save_pretrained(tmp_path / "adapter")
    adapter.merge()
    refused(merge(minilm_folder(), tmp_path / "adapter", "--out", tmp_path / "m"), "loaded as BertModel", "--architecture")
    result = merge(
        minilm_folder(), tmp_path / "adapter", "--out", tmp_path / "m", "--architecture", "BertForSequenceClassification"
    )
    assert result.exit_code == 0, result.output
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(logits_of(found, review_batch()), logits_of(model.eval(), review_batch()), rtol=0, atol=1e-5)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "m")("a fine film")
    assert tokens["input_ids"] == AutoTokenizer.from_pretrained(minilm_folder())("a fine film")["input_ids"]


def test_names_of_the_classes_come_along(tmp_path):
    """From the adapter, where the base has none; a base's own stay."""
    model, adapter = attached(partial(minilm, 3), gate="mean")
    model.config.id2label = {0: "dull", 1: "fine", 2: "odd"}
    kind = "BertForSequenceClassification"
    named = with_class(adapter.to_lora(), kind, model.config)
    named.save_pretrained(tmp_path / "adapter")
    assert "The outputs are, in this order: `dull`, `fine`, `odd`." in model_card(named, "compact")
    merge_folders(minilm_folder(), [tmp_path / "adapter"], [1.0], tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_bytes())
    assert config["id2label"] == {"0": "dull", "1": "fine", "2": "odd"} and config["label2id"]["odd"] == 2
    base = load_base(minilm_folder(), kind, head_tensors(named))
    name_labels(base, named)
    base.config.id2label = {0: "a", 1: "b", 2: "c"}
    name_labels(base, named)
    assert base.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_no_head_is_made_up(tmp_path):
    """A class with a head that neither the base nor the adapter has: its weights would be random."""
    _, adapter = attached(minilm, gate="mean", modules_to_save=())
    adapter.save_pretrained(tmp_path / "adapter")
    options = ("--out", tmp_path / "m", "--architecture", "BertForSequenceClassification")
    refused(merge(minilm_folder(), tmp_path / "adapter", *options), "has no classifier.bias", "no adapter brings it")
    assert not (tmp_path / "m").exists()


@pytest.fixture(scope="module")
def pooled(tmp_path_factory):
    """Adapters on the class of `cobra train --model minilm`, with and without that on record, and what it answers."""
    folder = tmp_path_factory.mktemp("pooled")
    model = load_encoder(labels=3)[0]
    with torch.no_grad():
        model.classifier.weight.normal_()
    adapter = cobra.attach(model, cobra.CobraConfig(20, r_max=2, gate="mean"))
    stir(adapter)
    adapter.apply(adapter.extract())
    adapter.save_pretrained(folder / "unknown")
    with_class(adapter.to_lora(), class_name(type(model))).save_pretrained(folder / "recorded")
    return folder, logits_of(model.eval(), review_batch())


def test_the_class_on_record_is_the_one_that_is_merged(pooled, tmp_path):
    """By the model's name and by its folder, whatever class its config.json names; the result loads as no other one."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, expected = pooled
    calls = (("minilm",), (minilm_folder(),), (minilm_folder(), "--architecture", "MeanPoolClassifier"))
    for number, (base, *options) in enumerate(calls):
        result = merge(base, folder / "recorded", "--out", tmp_path / str(number), *options)
        assert result.exit_code == 0 and result.stderr == "", result.output
        found = MeanPoolClassifier.from_pretrained(tmp_path / str(number)).eval()
        torch.testing.assert_close(logits_of(found, review_batch()), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="bert-mean-pool"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path / str(number))
    tokens = AutoTokenizer.from_pretrained(tmp_path / "0")("a fine film")
    assert tokens["input_ids"] == AutoTokenizer.from_pretrained(minilm_folder())("a fine film")["input_ids"]


def test_another_class_than_that_on_record_is_refused(pooled, tmp_path):
    folder, _ = pooled
    out = ("--out", tmp_path / "m")
    for architecture in ("BertForSequenceClassification", "AutoModelForSequenceClassification"):
        result = merge(minilm_folder(), folder / "recorded", *out, "--architecture", architecture)
        refused(result, "was trained as cobra.cli.encoder.MeanPoolClassifier, and the base was loaded as BertFor")
    with_class(cobra.load_adapter(folder / "recorded"), "mine.Classifier").save_pretrained(tmp_path / "foreign")
    refused(merge("minilm", tmp_path / "foreign", *out), "mine.Classifier is no class of transformers", "in Python")
    wrong = merge(minilm_folder(), folder / "unknown", *out, "--architecture", "Nothing")
    refused(wrong, "Nothing is no class of transformers", "nor MeanPoolClassifier")
    assert "config.json" not in wrong.stderr and not (tmp_path / "m").exists()


def test_a_class_that_no_adapter_confirms_is_named(pooled, tmp_path):
    folder, _ = pooled
    result = merge("minilm", folder / "unknown", "--out", tmp_path / "m")
    assert result.exit_code == 0, result.output
    assert "unknown does not say which class it was trained as: right only if that was cobra.cli.encoder." in result.stderr


@pytest.mark.slow
def test_smollm2_as_the_class_on_record():
    """From its GGUF file, with the head that the adapter brings."""
    head = {"score.weight": torch.ones(3, 576)}
    model = load_base(Path("smollm2"), "LlamaForSequenceClassification", head)
    assert class_name(type(model)) == "LlamaForSequenceClassification" and model.score.out_features == 3
    assert class_name(type(load_base(Path("smollm2"), None, {}))) == "LlamaForCausalLM"


def changed(base, folder, **settings):
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_bases_that_do_not_fit(made, tmp_path):
    base, adapter = made
    out = ("--out", tmp_path / "m")
    refused(merge(tmp_path / "none", adapter, *out), "none/config.json: no such file; expected a transformers model folder")
    refused(merge(base, tmp_path / "none", *out), "none: no such folder; expected that of an adapter")
    refused(merge(adapter, base, *out), "base/adapter_config.json: no such file")
    quantised = changed(base, tmp_path / "q", quantization_config={"quant_method": "bitsandbytes"})
    refused(merge(quantised, adapter, *out), "q/config.json: the base is quantised (bitsandbytes)", "dequantize")
    unknown = changed(base, tmp_path / "u", architectures=["Foreign"])
    refused(merge(unknown, adapter, *out), "architectures is ['Foreign']", "--architecture")
    broken = changed(base, tmp_path / "b")
    (broken / "config.json").write_text('{"architectures": [')
    refused(merge(broken, adapter, *out), "b/config.json: expected a model's configuration (JSON)")
    empty = changed(base, tmp_path / "e")
    (empty / "model.safetensors").unlink()
    refused(merge(empty, adapter, *out), "model.safetensors")
    other = changed(base, tmp_path / "o", hidden_size=64)
    assert "o: the weights are not those of config.json" in merge(other, adapter, *out).stderr
    assert not (tmp_path / "m").exists()


def test_a_base_of_other_labels(tmp_path):
    """The adapter's count, in the class that the base has too."""
    vit(labels=3).save_pretrained(tmp_path / "base")
    model = type(vit()).from_pretrained(tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True)
    adapter = cobra.attach(model, cobra.CobraConfig(20, r_max=2, gate="mean"))
    stir(adapter)
    adapter.apply(adapter.extract())
    adapter.save_pretrained(tmp_path / "adapter")
    assert merge(tmp_path / "base", tmp_path / "adapter", "--out", tmp_path / "m").exit_code == 0
    merged = type(model).from_pretrained(tmp_path / "m")
    assert merged.config.num_labels == 5
    torch.testing.assert_close(logits_of(merged, image_batch()), logits_of(model.eval(), image_batch()), rtol=0, atol=1e-5)


def test_a_base_of_other_sizes_in_another_class(pooled, tmp_path):
    """Only the head may be of another shape than the base's."""
    other = changed(minilm_folder(), tmp_path / "o", intermediate_size=64)
    result = merge(other, pooled[0] / "recorded", "--out", tmp_path / "m")
    refused(result, "o: the weights are not those of config.json: bert.encoder.layer.0.intermediate.dense.bias has the shape")
    assert "(1536,) and not (64,)" in result.stderr and not (tmp_path / "m").exists()


def test_a_tolerance_that_is_exceeded(made, tmp_path):
    vit().bfloat16().save_pretrained(tmp_path / "half")
    refused(merge(tmp_path / "half", made[1], "--out", tmp_path / "m", "--tolerance", "1e-9"), "would lose", "fp32 copy")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "disk full"])
def test_a_merge_that_cannot_be_written(made, kill, tmp_path):
    """The model's own save_pretrained ends in its middle: there is no folder, and nothing half-written under its name."""
    base, adapter = made
    size = (base / "model.safetensors").stat().st_size
    out = tmp_path / "m"

    def write() -> None:
        limit_file_size(size // 2, kill=kill)
        try:
            merge_folders(base, [adapter], [1.0], out)
        except OSError as error:
            os._exit(3 if str(out) in str(error) and "nothing was written" in str(error) else 4)

    assert ended(write) == (-signal.SIGXFSZ if kill else 3)
    assert not out.exists()
    assert kill or not list(tmp_path.iterdir())
    merge_folders(base, [adapter], [1.0], out)
    assert content(out)["config.json"]
