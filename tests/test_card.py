"""The README.md of an export: true, complete, and short where models are long."""

import json

import pytest
import torch
from models import gpt2, minilm, review_batch, stir
from serving import llama

import cobra
from cobra.export.card import model_card, rank_tables
from cobra.export.check import check_adapter
from cobra.lora import LoraAdapter, LoraLayer


def lora(ranks: dict[str, int], **fields) -> LoraAdapter:
    layers = {name: LoraLayer(torch.ones(rank, 6), torch.ones(4, rank)) for name, rank in ranks.items()}
    return LoraAdapter(layers, **fields)


def rows(text: str) -> list[list[str]]:
    """Cells of every table line."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def trained(build, scores=None, budget=40):
    adapter = cobra.attach(build(), cobra.CobraConfig(rank_budget=budget, r_max=4, gate="mean"), scores)
    stir(adapter)
    adapter.apply(adapter.extract())
    return adapter


def front_matter(card: str) -> dict:
    import yaml

    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_front_matter():
    adapter = lora({"up": 2}, base_model="HuggingFaceTB/SmolLM2-135M")
    card = model_card(adapter, "compact")
    assert front_matter(card) == {"library_name": "peft", "base_model": "HuggingFaceTB/SmolLM2-135M", "tags": ["lora", "cobra"]}
    assert "# LoRA adapter for HuggingFaceTB/SmolLM2-135M\n" in card


@pytest.mark.parametrize("name", [None, "/home/someone/models/base", "C:\\models\\base", "a/b/c", "x: y\n---", "../base"])
def test_paths_stay_private(name):
    """Only names that the Hub takes are written: not paths of the writer's machine, nothing that breaks the front matter."""
    card = model_card(lora({"up": 2}, base_model=name), "compact")
    assert front_matter(card) == {"library_name": "peft", "tags": ["lora", "cobra"]}
    assert "# LoRA adapter\n" in card and (name is None or name not in card)


def test_blocks_by_modules():
    """Equal blocks that follow one another share a line; a module that a block lacks is a dash."""
    ranks = {f"model.layers.{i}.{m}": r for i in range(5) for m, r in (("attn.q_proj", 2), ("mlp.up_proj", 4 if i == 3 else 0))}
    del ranks["model.layers.4.mlp.up_proj"]
    (table,) = rank_tables(ranks | {"model.layers.10.attn.q_proj": 7})
    assert rows(table) == [
        ["`model.layers`", "q_proj", "up_proj"],
        ["---"] * 3,
        ["0–2", "2", "0"],
        ["3", "2", "4"],
        ["4", "2", "–"],
        ["10", "7", "–"],
    ]


def test_names_that_end_alike_stay_apart():
    (table,) = rank_tables({"layer.0.attention.dense": 1, "layer.0.output.dense": 2})
    assert rows(table)[0] == ["`layer`", "attention.dense", "output.dense"]


def test_experts_share_a_column():
    ranks = {f"layers.0.mlp.experts.{e}.up_proj": e % 3 for e in range(64)} | {
        f"layers.0.mlp.experts.{e}.gate": 1 for e in range(64)
    }
    (table,) = rank_tables(ranks)
    assert rows(table) == [["`layers`", "up_proj", "gate"], ["---"] * 3, ["0", "0–2", "1"]]


def test_stacks_and_single_modules():
    """An encoder beside a decoder, and modules outside both; every rank is somewhere."""
    tables = rank_tables({"encoder.block.0.q": 1, "decoder.block.0.q": 2, "pooler": 3, "0.weight.up": 4})
    assert [rows(table)[2] for table in tables] == [["0", "1"], ["0", "2"], ["0", "4"], ["`pooler`", "3"]]
    assert [rows(table)[0][0] for table in tables] == ["`encoder.block`", "`decoder.block`", "block", "module"]


def test_a_large_model_is_short():
    """7B: 224 layers of all ranks."""
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    card = model_card(
        lora({f"model.layers.{i}.{m}": (7 * i + j) % 32 for i in range(32) for j, m in enumerate(modules)}), "compact"
    )
    assert len(card.splitlines()) < 90 and max(map(len, card.splitlines())) < 320


@pytest.mark.parametrize("layout", ["compact", "padded"])
def test_budget(layout, tmp_path):
    """The numbers are those of the plan and of the file."""
    adapter = trained(llama)
    adapter.save_pretrained(tmp_path / "a", layout)
    card = (tmp_path / "a" / "README.md").read_text()
    table = dict(row for row in rows(card.split("## Budget")[1].split("## Ranks")[0])[2:])
    plan = adapter.plan
    assert table["budget"].startswith("40 ranks")
    assert table["ranks kept"] == f"{plan.total} in 21 groups"
    assert table["rank of a layer"] == f"{min(plan.ranks.values())} to {max(plan.ranks.values())}"
    assert table["adapter parameters"] == f"{plan.parameters:,}"
    assert ("the same with padding" in table) == (layout == "padded")
    if layout == "padded":
        from safetensors.torch import load_file

        written = sum(t.numel() for t in load_file(tmp_path / "a" / "adapter_model.safetensors").values())
        assert table["the same with padding"] == f"{written:,}"
    assert f"on {sum(rank > 0 for rank in plan.ranks.values())} of 21 linear layers" in card


@pytest.mark.parametrize(
    ("budget", "said"), [(6, "6 ranks"), (cobra.Budget(30, minimum=1), "30 ranks"), (cobra.Budget(900, "bytes"), "900 bytes")]
)
def test_budget_of_an_adapter_that_is_not_cut(budget, said, tmp_path):
    adapter = cobra.attach(llama(), cobra.CobraConfig(budget, r_max=2, gate="open"))
    adapter.save_pretrained(tmp_path / "a")
    assert f"| budget | {said} |" in (tmp_path / "a" / "README.md").read_text()


def test_engines():
    """What the check says of this layout and of the other; the flag is the smallest that vLLM allows."""

    def served(adapter, layout):
        return {row[0].split()[0]: row[1:] for row in rows(model_card(adapter, layout).split("## Serving")[1])[2:]}

    adapter = lora({"model.layers.0.self_attn.o_proj": 17, "model.layers.1.self_attn.o_proj": 3})
    compact, padded = served(adapter, "compact"), served(adapter, "padded")
    assert compact["vllm"] == padded["vllm"] == ["yes", "`--enable-lora --max-lora-rank 32`"]
    assert compact["sglang"][0] == compact["gguf"][0] == "layout `padded` only"
    assert padded["sglang"] == ["yes", "`--enable-lora --lora-paths NAME=FOLDER --max-lora-rank 17`"]
    assert padded["gguf"][0] == "yes"
    of_gpt2 = served(trained(gpt2, budget=8).to_lora(), "padded")
    assert (of_gpt2["sglang"][0], of_gpt2["gguf"][0]) == ("no", "no") and "fan_in_fan_out" in of_gpt2["gguf"][1]
    with_head = served(lora({"layers.0.up": 2}, heads={"classifier": {"weight": torch.ones(2, 3)}}), "padded")
    assert (with_head["vllm"][0], with_head["gguf"][0]) == ("yes", "no")


@pytest.mark.parametrize("layout", ["compact", "padded"])
def test_engines_as_the_folder_is_judged(layout, tmp_path):
    """The card is written before the folder can be read: both must come to the same end."""
    for build in (llama, gpt2):
        adapter = trained(build, budget=12)
        adapter.save_pretrained(tmp_path / "a", layout)
        found = check_adapter(tmp_path / "a").verdicts
        table = rows((tmp_path / "a" / "README.md").read_text().split("## Serving")[1])[2:]
        assert {row[0].split()[0]: row[1] == "yes" for row in table} == {e: found[e].ok for e in ("vllm", "sglang", "gguf")}


@pytest.mark.filterwarnings("ignore:the path integral misses")
def test_calibration(tmp_path):
    """Settings and priors of the scores that the adapter was attached with."""
    batches = [review_batch(2)]
    scores = cobra.calibrate(minilm(), batches, steps=2, progress=False)
    adapter = trained(minilm, scores)
    adapter.save_pretrained(tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    text = card.split("## Calibration")[1].split("## Loading")[0]
    table = rows(text)
    assert (
        ["base model's fingerprint", scores.fingerprint] in table
        and ["steps", "2"] in table
        and ["estimator", "paper"] in table
    )
    best = scores.sites[int(scores.prior.argmax())]
    assert table[table.index(["group", "prior"]) + 2] == [f"`{best}`", f"{scores.prior.max().item():.3g}"]
    assert f"The other {len(scores.sites) - 12} are lower." in text
    assert "`classifier`" in card


def loading(**provenance) -> str:
    head = {"classifier": {"weight": torch.ones(3, 6), "bias": torch.ones(3)}}
    return model_card(lora({"up": 2}, heads=head, provenance=provenance), "compact").split("## Loading")[1]


def test_class_it_was_trained_as():
    """One that is not of transformers is imported, loaded with the adapter's labels, and warned of."""
    own = loading(architecture="cobra.cli.encoder.MeanPoolClassifier")
    assert "from cobra.cli.encoder import MeanPoolClassifier\n" in own
    assert 'base = MeanPoolClassifier.from_pretrained("path/to/the/base/model", num_labels=3)' in own
    assert "trained on `cobra.cli.encoder.MeanPoolClassifier`, which is no class of transformers" in own
    plain = loading(architecture="BertForSequenceClassification")
    assert (
        "of the class that the adapter was trained on: BertForSequenceClassification\n" in plain and "no class of" not in plain
    )
    for strange in (None, 3, "a.b; import os", "a\nimport os"):
        assert loading(architecture=strange) == loading()


def test_nothing_is_invented():
    """An adapter of another program has no plan, no budget and no calibration."""
    card = model_card(lora({"up": 2}), "compact")
    assert "## Calibration" not in card and "chosen" not in card and "| budget |" not in card
    assert ["adapter parameters", "20"] in rows(card)


def test_provenance_of_any_release():
    """All of it is optional, and survives JSON."""
    site = {"name": "up", "members": ["up"], "cost": 10, "kept": [0, 1], "posterior": [0.9, 0.8, 0.1]}
    plan = {"sites": [site], "fold": "one", "fingerprint": "0", "provenance": {"budget": {"amount": 1000, "unit": "bytes"}}}
    for provenance in (
        {"plan": None},
        {"plan": {"sites": [site]}},
        {"plan": plan},
        {"calibration": {"settings": {"steps": 50}}},
    ):
        card = model_card(lora({"up": 2}, provenance=json.loads(json.dumps(provenance))), "padded")
        assert ("| budget | 1,000 bytes |" in card) == (provenance.get("plan") is plan)
        assert ("| steps | 50 |" in card) == ("calibration" in provenance)
