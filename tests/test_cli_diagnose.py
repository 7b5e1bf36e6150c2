"""`cobra diagnose` as a shell calls it, on small models of every task and on files in every shape."""

import csv
import json

import pytest
import torch
import transformers
from models import REVIEWS, tokenizer
from typer.testing import CliRunner

from cobra import storage
from cobra.cli.app import app
from cobra.cli.subject import RANDOM_TYPES, find_model
from cobra.cli.textfile import Columns, read_examples

pytestmark = pytest.mark.filterwarnings("ignore:the path integral misses")

ROWS = [(text, label) for text, label in zip(REVIEWS, (1, 0, 1, 0), strict=True)]
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
QUICK = ["--steps", "4", "--examples", "4", "--draws", "2"]


def run(*arguments):
    return CliRunner().invoke(app, ["diagnose", *map(str, arguments)])


def model_folder(folder, architecture: str, kind: str = "bert", **changes):
    """A saved model of random weights with MiniLM's tokenizer beside it."""
    config = transformers.AutoConfig.for_model(kind, vocab_size=len(tokenizer()), **TINY, **changes)
    config.pad_token_id = 0
    torch.manual_seed(0)
    getattr(transformers, architecture)(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models") / "critic", "BertForSequenceClassification")


@pytest.fixture
def texts(tmp_path):
    """Twelve rows: three draws of four."""
    return written(tmp_path / "texts.csv", ROWS * 3)


def written(path, rows, header=("text", "label"), delimiter=","):
    with open(path, "w", encoding="utf-8", newline="") as f:
        csv.writer(f, delimiter=delimiter, lineterminator="\n").writerows([header, *rows])
    return path


def test_diagnose(classifier, texts, tmp_path):
    """A table for people; JSON, CSV and figures in the folder."""
    result = run(classifier, texts, "--out", tmp_path / "d", *QUICK)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("critic, 13 sites\ntexts.csv, 12 rows; 4 examples, 4 midpoint points")
    names = {path.name for path in (tmp_path / "d").iterdir()}
    assert names == {"diagnosis.json", "layers.csv", "profile.png", "profile.svg", "scatter.png", "scatter.svg"}
    saved = storage.read_json(tmp_path / "d" / "diagnosis.json", "diagnosis")
    assert len(saved["layers"]) == 13 and saved["layers"][0]["name"] == "bert.encoder.layer.0.attention.self.query"
    assert [(row["what"], row["setting"]) for row in saved["stability"]] == [
        *(("size", 2), ("seeds", 4), ("points", 1), ("points", 2))
    ]
    assert "random" not in result.stdout


def test_json(classifier, texts, tmp_path):
    """Nothing but JSON on stdout."""
    result = run(classifier, texts, "--out", tmp_path / "d", *QUICK, "--granularity", "block", "--json")
    found = json.loads(result.stdout)
    assert [layer["name"] for layer in found["layers"]] == ["bert.encoder.layer.0", "bert.encoder.layer.1", "bert.pooler.dense"]
    assert found["settings"]["granularity"] == "block" and "they need 4 layers" in found["notes"][-1]


@pytest.mark.parametrize(
    ("architecture", "kind", "changes", "note"),
    [
        ("BertForSequenceClassification", "bert", {"num_labels": 1}, None),
        ("GPT2LMHeadModel", "gpt2", {}, None),
        ("BertModel", "bert", {}, "a head fitted on frozen features of 12 rows, those of the calibration among them"),
        ("BertForMaskedLM", "bert", {}, "a head fitted on frozen features"),
        ("T5ForConditionalGeneration", "t5", {"d_kv": 8, "d_ff": 32}, "a head fitted on frozen features"),
    ],
)
def test_tasks(tmp_path, texts, architecture, kind, changes, note):
    """The task is that of the architecture."""
    folder = model_folder(tmp_path / "m", architecture, kind, **changes)
    result = run(folder, texts, "--out", tmp_path / "d", *QUICK, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert any(note in text for text in found["notes"]) if note else not any("head" in text for text in found["notes"])
    assert ("of plain text" in found["data"]) == (architecture == "GPT2LMHeadModel")
    assert all(layer["contribution"] > 0 and layer["gradient"] > 0 for layer in found["layers"])


def test_regression_of_an_encoder(tmp_path):
    """Labels that are not whole numbers make the fitted head a regression."""
    folder = model_folder(tmp_path / "m", "BertModel")
    data = written(tmp_path / "r.csv", [(text, label + 0.25) for text, label in ROWS * 3])
    result = run(folder, data, "--out", tmp_path / "d", *QUICK)
    assert result.exit_code == 0, result.output


def test_classes_by_name(tmp_path):
    """A classifier's own names of its classes, and texts longer than its positions."""
    names = {"id2label": {0: "rotten", 1: "fresh"}, "label2id": {"rotten": 0, "fresh": 1}, "max_position_embeddings": 16}
    folder = model_folder(tmp_path / "m", "BertForSequenceClassification", **names)
    data = written(tmp_path / "w.csv", [(text * 9, ("rotten", "fresh")[label]) for text, label in ROWS])
    by_name = run(folder, data, "--out", tmp_path / "a", *QUICK)
    assert by_name.exit_code == 0, by_name.output
    numbered = written(tmp_path / "w.csv", [(text * 9, label) for text, label in ROWS])
    run(folder, numbered, "--out", tmp_path / "b", *QUICK)
    assert (tmp_path / "a" / "layers.csv").read_bytes() == (tmp_path / "b" / "layers.csv").read_bytes()


def test_named_model_on_words(tmp_path):
    """MiniLM with its own names of layers, labels that are words, fewer rows than asked for."""
    data = written(tmp_path / "w.tsv", [(text, ("rotten", "fresh")[label]) for text, label in ROWS], delimiter="\t")
    result = run("minilm", data, "--out", tmp_path / "d", "--steps", "2", "--examples", "9")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("all-MiniLM-L6-v2, pretrained, 36 sites")
    assert "w.tsv has 4 rows, fewer than the 9 examples asked for" in result.stdout
    assert "w.tsv has rows for 1 of the 3 draws of 4 examples" in result.stdout
    assert "bert.encoder.layer.5.output.dense" in (tmp_path / "d" / "layers.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["llama", pytest.param("deberta-v2", marks=pytest.mark.slow), "vit"])
def test_random_weights_are_named(tmp_path, texts, kind):
    """In the title and in a note, and in the file."""
    data, options = (texts, []) if kind != "vit" else ("random-images", [])
    options += ["--baseline", "token:[MASK]"] if kind == "llama" else []
    result = run(kind, data, "--out", tmp_path / "d", "--random-init", "--steps", "2", "--examples", "2", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{kind}, 12 layers of width 128, random weights, ")
    assert "note: the weights are random" in result.stdout
    assert "random weights" in storage.read_json(tmp_path / "d" / "diagnosis.json", "diagnosis")["model"]
    assert ("random images with random labels" in result.stdout) == (kind == "vit")
    assert ("the path starts at the embedding of '[MASK]'" in result.stdout) == (kind == "llama")


def test_random_weights_of_a_folder(classifier, texts, tmp_path):
    result = run(classifier, texts, "--out", tmp_path / "d", "--random-init", *QUICK)
    assert result.exit_code == 0 and result.stdout.startswith("bert of critic's size, random weights, 13 sites")


@pytest.mark.parametrize("kind", RANDOM_TYPES)
def test_random_types(kind):
    """Every type that is offered builds, the same from the same seed and another from another."""
    source = find_model(kind, random_init=True)
    assert source.random and "random weights" in source.words
    weights = [list(source.load(seed).parameters())[-2] for seed in (0, 0)]
    assert torch.equal(*weights) and source.load(0).training is False


def test_reviews():
    """The demo's training reviews, other ones first for another seed."""
    one, other = (read_examples("reviews", Columns(), seed) for seed in (0, 1))
    assert len(one) == len(other) > 9000 and one[0] != other[0] and {e.label for e in one} == {"0", "1"}


def test_files(tmp_path):
    """CSV with quotes and commas, TSV where a quote is a character, JSONL with numbers; a byte order mark is no column."""
    rows = [('a "fine", film', "1"), ("dull", "0")]
    expected = read_examples(str(written(tmp_path / "a.csv", rows)), Columns())
    assert [(e.text, e.label) for e in expected] == rows
    (tmp_path / "a.tsv").write_text("\ufeff" + "text\tlabel\n" + "".join(f"{t}\t{v}\n" for t, v in rows), encoding="utf-8")
    lines = [json.dumps({"review": t, "stars": int(v), "other": None}) for t, v in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    assert read_examples(str(tmp_path / "a.tsv"), Columns()) == expected
    assert read_examples(str(tmp_path / "a.jsonl"), Columns("review", "stars")) == expected
    assert [e.label for e in read_examples(str(tmp_path / "a.jsonl"), Columns("review", None))] == [None, None]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.csv", "text,label\n", [], "a.csv has no rows"),
        ("a.csv", "", [], "a.csv has no rows"),
        ("a.csv", "text,label\nfine,1\n", ["--text", "review"], "no column 'review'; it has text, label"),
        ("a.csv", "text,label\nfine,1\n", ["--label", "stars"], "no column 'stars'"),
        ("a.csv", "text,label\nfine,1\ndull,NaN\n", [], "row 2: column 'label' is NaN"),
        ("a.csv", "text,label\nfine,1\n,0\n", [], "row 2: column 'text' is empty"),
        ("a.csv", "text,label\nfine\n", [], "row 1: column 'label' is empty"),
        (
            "a.csv",
            "text,label\nfine,1\ndull,7\n",
            [],
            "label '7' is none of the model's 2 classes: LABEL_0, LABEL_1, or their numbers",
        ),
        ("a.csv", "text,label\nfine,good\ndull,bad\n", [], "label 'bad' is none of the model's 2 classes"),
        ("a.csv", "text,label\nfine,1\ndull,0.5\n", [], "label '0.5' is none of the model's 2 classes"),
        ("a.jsonl", '{"text": "fine", "label": 1}\n{"text": \n', [], "a.jsonl, row 2: not JSON: Expecting value"),
        ("a.jsonl", "[1, 2]\n", [], "row 1: expected an object with columns"),
        ("a.txt", "fine\n", [], "expected a file ending in .csv, .tsv, .jsonl"),
        ("a.csv", "text,label\nfine,1\ndull,0\n", ["--granularity", "layer"], "granularity='layer' is not one of site, block"),
        ("a.csv", "text,label\nfine,1\ndull,0\n", ["--baseline", "token:zzz"], "the tokenizer has no token 'zzz'"),
        ("a.csv", "text,label\nfine,1\ndull,0\n", ["--estimator", "guess"], "estimator='guess' is not one of"),
    ],
)
def test_data_errors(classifier, tmp_path, name, content, options, message):
    """Exit code 2, one line that says what is wrong, and nothing written."""
    (tmp_path / name).write_text(content, encoding="utf-8")
    failed(run(classifier, tmp_path / name, "--out", tmp_path / "d", *QUICK, *options), message)
    assert not (tmp_path / "d").exists()


def failed(result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and message in result.stderr and result.stdout == ""


def test_latin1_file(classifier, tmp_path):
    (tmp_path / "a.csv").write_bytes("text,label\nrechauffé,1\n".encode("latin-1"))
    failed(run(classifier, tmp_path / "a.csv", "--out", tmp_path / "d"), "not a CSV file in UTF-8")


def test_missing_files(classifier, texts, tmp_path):
    failed(run(classifier, tmp_path / "none.csv"), "none.csv: no such file")
    failed(run(tmp_path / "none", texts), "expected a transformers folder, or of the named models minilm, smollm2")
    failed(run("gru", texts, "--random-init"), "of the types bert, deberta-v2")


def test_labels_of_one_class(tmp_path):
    """A head cannot be fitted."""
    folder = model_folder(tmp_path / "m", "BertModel")
    failed(run(folder, written(tmp_path / "a.csv", [("fine", 1), ("dull", 1)])), "all labels are '1'; a head needs two classes")


def test_models_that_do_not_fit(classifier, texts, tmp_path):
    """Data of another kind, an architecture of no known task, weights that are gone or not numbers."""
    failed(run("vit", texts, "--random-init"), "is measured on DATA random-images, not on")
    failed(run(classifier, "random-images"), "is measured on texts, not on random-images")
    tagger = model_folder(tmp_path / "tagger", "BertForTokenClassification")
    failed(run(tagger, texts), "BertForTokenClassification is no sequence or image classifier")
    broken = model_folder(tmp_path / "broken", "BertForSequenceClassification")
    model = transformers.BertForSequenceClassification.from_pretrained(broken)
    torch.nn.init.constant_(model.bert.encoder.layer[0].output.dense.weight, float("nan"))
    model.save_pretrained(broken)
    failed(run(broken, texts, "--out", tmp_path / "d", *QUICK), "is nan: check its inputs and labels")
    (broken / "model.safetensors").unlink()
    failed(run(broken, texts), "holds no weights that load")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((classifier / "config.json").read_bytes())
    failed(run(bare, texts), "holds no tokenizer: none of tokenizer.json")
