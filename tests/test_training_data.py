"""Rows of `cobra train`: every kind of file, splits, labels and tokens of every task, and what is refused."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
import torch
import transformers
from models import REVIEWS, smollm2_tokenizer, tokenizer
from pyarrow import parquet
from test_cli_diagnose import ROWS, model_folder, written

from cobra.cli.subject import Source, find_model
from cobra.cli.subject_data import label_values
from cobra.cli.textfile import Columns, Example, read_examples
from cobra.cli.training.data import check_task, find_targets, read_rows, read_split
from cobra.cli.training.model import fit_new_head, load_model
from cobra.cli.training.prepare import prepare
from cobra.cli.training.settings import CalibrateSettings, TrainSettings
from cobra.cli.training.tokens import MASKED, batches_of, collator_of, labelled_rows, language_rows, padded_tokenizer

MODELS = {
    "encoder": ("BertModel", "bert", {"initializer_range": 0.5}),
    "classifier": ("BertForSequenceClassification", "bert", {}),
    "regressor": ("BertForSequenceClassification", "bert", {"num_labels": 1}),
    "lm": ("GPT2LMHeadModel", "gpt2", {}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: model_folder(folder / name, *arguments[:2], **arguments[2]) for name, arguments in MODELS.items()}


@pytest.fixture
def texts(tmp_path):
    return written(tmp_path / "texts.csv", ROWS * 5)


def settings(folder, data, **values) -> TrainSettings:
    return TrainSettings(model=str(folder), data=str(data), **values)


def targets(some: TrainSettings):
    source = find_model(some.model)
    check_task(some, source)
    return find_targets(some, source, read_split(some, source))


# files


def test_parquet_holds_what_the_other_files_hold(tmp_path):
    """Whole and real numbers, pairs; a null is an empty cell."""
    columns = {"a": ["fine film", "dull"], "b": ["x", "y"], "label": [1, 0]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = [read_examples(str(tmp_path / f"a.{kind}"), Columns("a", "label", "b")) for kind in ("parquet", "jsonl")]
    assert found[0] == found[1] == [Example("fine film", "1", "x"), Example("dull", "0", "y")]
    parquet.write_table(pyarrow.table({"text": ["fine", None], "label": [0.5, 1.0]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet, row 2: column 'text' is empty"):
        read_examples(str(tmp_path / "b.parquet"), Columns())
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"c\.parquet: not a Parquet file"):
        read_examples(str(tmp_path / "c.parquet"), Columns())


def test_long_cells(tmp_path):
    """The limit of the csv module is that of the process again afterwards."""
    long, limit = "fine " * 40_000, csv.field_size_limit()
    found = read_examples(str(written(tmp_path / "a.csv", [(long, 1), ("dull", 0)])), Columns())
    assert [example.text for example in found] == [long, "dull"]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\ndull,0\nfine, really,1\n", "row 2: 1 cells more than the header has columns; quote texts"),
        ("a.tsv", "text\tlabel\nfine\t\t1\n", "row 1: 1 cells more than the header has columns; drop tabs"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', "row 2: no column 'label'; it has text"),
    ],
)
def test_rows_of_another_shape(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError) as raised:
        read_examples(str(tmp_path / name), Columns())
    assert f"{name}, {message}" in str(raised.value)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_texts_are_as_they_stand(tmp_path, kind):
    """Code and prompts live by their blanks; labels do not, and may be any word."""
    rows = [
        {"text": "def f():\n", "second": "    return 1\n", "label": " none "},
        {"text": " a", "second": "b", "label": "null"},
    ]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        with open(path, "w", encoding="utf-8", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    found = read_examples(str(path), Columns(second="second"))
    assert found == [Example("def f():\n", "none", "    return 1\n"), Example(" a", "null", "b")]
    row = language_rows(found[:1], smollm2_tokenizer(), 99, chat=False)[0]
    assert smollm2_tokenizer().decode(row["input_ids"]).startswith("def f():\n    return 1\n")


def test_half_a_character(tmp_path):
    """What JavaScript leaves of an emoji that it cut in two is no text."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine", "label": 1}\n{"text": "cut \\ud83d off", "label": 0}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="row 2: column 'text' holds half a character"):
        read_examples(str(path), Columns())


# splits


def test_held_out_share(folders, texts):
    """No row twice, another order for another seed, limits from the front."""
    source = find_model(str(folders["classifier"]))
    split = read_split(settings(folders["classifier"], texts, eval_share=0.25), source)
    assert (len(split.train), len(split.test)) == (15, 5)
    assert sorted(e.text for e in split.train + split.test) == sorted(text for text, _ in ROWS * 5)
    other = read_split(settings(folders["classifier"], texts, eval_share=0.25, seed=1), source)
    assert other.train != split.train
    few = read_split(settings(folders["classifier"], texts, eval_share=0.25, train_examples=3, eval_examples=2), source)
    assert (few.train, few.test) == (split.train[:3], split.test[:2])
    ((file, fingerprint),) = split.fingerprints.items()
    assert file == str(texts) and len(fingerprint) == 64


def test_another_file_to_evaluate_on(folders, texts, tmp_path):
    more = written(tmp_path / "more.csv", ROWS[:2])
    source = find_model(str(folders["classifier"]))
    split = read_split(settings(folders["classifier"], texts, eval_data=str(more)), source)
    assert (len(split.train), [e.text for e in split.test]) == (20, REVIEWS[:2])
    assert [*split.fingerprints] == [str(texts), str(more)]


def test_reviews(folders):
    """The demo's split by movie, with labels for a classifier and without for a language model."""
    for name, labels in (("classifier", {"0", "1"}), ("lm", {None})):
        some = settings(folders[name], "reviews", train_examples=50, eval_examples=30)
        split = read_split(some, find_model(some.model))
        assert (len(split.train), len(split.test)) == (50, 30)
        assert {e.label for e in split.train + split.test} == labels


# labels


def test_classes_of_a_new_head(folders, tmp_path):
    """Words by the alphabet, numbers by their size; the same class for both parts."""
    words = targets(settings(folders["encoder"], written(tmp_path / "w.csv", [("a", "ok"), ("b", "bad")] * 5)))
    assert words.task == "classification" and words.classes == ("bad", "ok")
    assert set(words.train) == {0, 1} == set(words.train + words.test)
    numbers = written(tmp_path / "n.csv", [(f"t{i}", label) for i, label in enumerate((10, 9, 100) * 5)])
    assert targets(settings(folders["encoder"], numbers)).classes == ("9", "10", "100")
    mixed = written(tmp_path / "m.csv", [(f"t{i}", label) for i, label in enumerate(("1", "0.0", "1.0", "0", "01") * 4)])
    assert set(targets(settings(folders["encoder"], mixed)).classes) == {"0", "1", "01"}


def test_numbers(folders, tmp_path):
    """Fractions make a regression of an encoder; whole numbers where it is asked for."""
    halves = written(tmp_path / "h.csv", [("a", 0.5), ("b", 1)] * 5)
    found = targets(settings(folders["encoder"], halves))
    assert (found.task, set(found.train), found.classes) == ("regression", {0.5, 1.0}, None)
    whole = written(tmp_path / "w.csv", [("a", 1), ("b", 3)] * 5)
    assert targets(settings(folders["encoder"], whole, task="regression")).train[0] in (1.0, 3.0)
    assert targets(settings(folders["regressor"], whole)).task == "regression"


@pytest.mark.parametrize(
    ("model", "rows", "changes", "message"),
    [
        ("encoder", [("a", 1)] * 4, {}, "all labels to train on are '1'; there is nothing to learn from one"),
        ("classifier", [("a", 1)] * 4, {}, "all labels to train on are '1'"),
        ("regressor", [("a", 1.5)] * 4, {}, "all labels to train on are '1.5'"),
        ("classifier", [("a", 1), ("b", 5)] * 4, {}, "label '5' is none of the model's 2 classes"),
        (
            "classifier",
            [("a", "good"), ("b", "bad")] * 4,
            {},
            "LABEL_1, or their numbers from 0 to 1; classes are named by id2label",
        ),
        ("encoder", [("a", "x"), ("b", 1)] * 4, {"task": "regression"}, "label 'x' is no number"),
        ("encoder", [("a", 1)], {}, "has 1 rows and all are held out"),
        ("classifier", [("a", 1), ("b", 0)], {"task": "regression"}, "is a classification model, and the task is regression"),
        ("encoder", [("a", 1), ("b", 0)], {"task": "causal-lm"}, "is an encoder: it writes no text"),
        (
            "encoder",
            [("a", 1), ("b", 0)],
            {"prompt": "text", "response": "label"},
            "prompt and response are for language models",
        ),
        ("lm", [("a", 1), ("b", 0)], {"pair": "label"}, "pair is for classification and regression"),
        ("classifier", [], {}, "has no rows"),
        ("classifier", [("a", 1), ("b", 0)], {"label": "stars"}, "no column 'stars'; it has text, label"),
        ("classifier", [("a", 1), ("b", 0)], {"pair": "other"}, "no column 'other'"),
    ],
)
def test_refused(folders, tmp_path, model, rows, changes, message):
    with pytest.raises(ValueError) as raised:
        targets(settings(folders[model], written(tmp_path / "a.csv", rows), **changes))
    assert message in str(raised.value)


STARS = {str(i + 1): i for i in range(5)}


@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        (STARS, ["1", "2", "4"], [0, 1, 3]),
        (STARS, ["1.0", "5"], [0, 4]),
        ({"1": 0, "0": 1}, ["0", "1"], [1, 0]),
        ({"none": 0, "1": 1, "2": 2}, ["none", "2"], [0, 2]),
        ({"none": 0, "1": 1, "2": 2}, ["2", "1.0"], [2, 1]),
        ({"0.5": 0, "1": 1}, ["1", "0.50"], [1, 0]),
        ({"bad": 0, "good": 1}, ["good", "bad"], [1, 0]),
        ({"bad": 0, "good": 1}, ["1", "0.0"], [1, 0]),
        ({"LABEL_0": 0, "LABEL_1": 1}, ["1", "0"], [1, 0]),
    ],
    ids=str,
)
def test_names_that_are_numbers_are_no_class_numbers(names, labels, expected):
    """Of a class called "1" the number is what label2id says, which counts from 0 or in another order."""
    assert label_values(classifier_of(names), [Example("a", label) for label in labels]) == expected


@pytest.mark.parametrize(
    ("names", "labels", "message"),
    [
        (STARS, ["0", "1"], "label '0' is none of the model's 5 classes: 1, 2, 3, 4, 5; classes are named by"),
        ({"none": 0, "1": 1}, ["0", "1"], "label '0' is none of the model's 2 classes: none, 1; classes are named by"),
        (
            {"bad": 0, "good": 1},
            ["1", "2"],
            "label '2' is none of the model's 2 classes: bad, good, or their numbers from 0 to 1;",
        ),
        ({"bad": 0, "good": 1}, ["good", "1"], "label '1' is none"),
    ],
    ids=str,
)
def test_labels_of_no_class(names, labels, message):
    with pytest.raises(ValueError) as raised:
        label_values(classifier_of(names), [Example("a", label) for label in labels])
    assert message in str(raised.value)


def classifier_of(names: dict[str, int]) -> Source:
    config = transformers.BertConfig(id2label={i: name for name, i in names.items()}, label2id=names)
    return Source("a classifier", "classification", "BertForSequenceClassification", config, None, None, (Path(), None))


def test_files_of_one_name_are_told_apart(folders, tmp_path):
    """In folders of their own; a resumed run looks at both."""
    paths = [tmp_path / part / "data.csv" for part in ("train", "test")]
    for path, rows in zip(paths, (ROWS * 2, ROWS), strict=True):
        path.parent.mkdir()
        written(path, rows)
    some = settings(folders["classifier"], paths[0], eval_data=str(paths[1]))
    found = read_split(some, find_model(some.model)).fingerprints
    assert list(found) == [str(path) for path in paths] and len(set(found.values())) == 2


@pytest.mark.parametrize(("value", "kind"), [([1, 2], "list"), ({"text": "fine"}, "record")])
def test_cells_that_are_no_text(tmp_path, value, kind):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "fine", "label": 1}) + "\n" + json.dumps({"text": value, "label": 0}), encoding="utf-8")
    with pytest.raises(
        ValueError, match=rf"a\.jsonl, row 2: column 'text' holds a {kind}, not a text: write one text a column"
    ):
        read_examples(str(path), Columns())


def test_labels_that_are_lists(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "fine", "label": [1, 0]}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.jsonl, row 1: column 'label' holds a list, not a label: rows have one label"):
        read_examples(str(path), Columns())


def test_xlnet_is_padded_on_the_left(texts, tmp_path):
    """Where its head does not look; it has no limit of tokens, and with its language head it is an encoder."""
    sizes = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32}
    some = settings(model_folder(tmp_path / "m", "XLNetLMHeadModel", "xlnet", **sizes), texts, longest=500)
    source, subject = find_model(some.model), prepare(some)
    assert source.task == "encoder" and source.most_tokens > 500 and subject.notes == ()
    with torch.no_grad():
        alone, together = (torch.cat([subject.model(**b).logits for b in subject.batches(subject.train, n)]) for n in (1, 9))
    torch.testing.assert_close(alone, together)


def test_label_that_is_only_evaluated_on(folders, tmp_path):
    data, test = written(tmp_path / "a.csv", [("a", "x"), ("b", "y")] * 3), written(tmp_path / "b.csv", [("c", "z")])
    with pytest.raises(ValueError, match="label 'z' is in the rows to evaluate on and in none to train on"):
        targets(settings(folders["encoder"], data, eval_data=str(test)))


def test_images_are_refused(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="takes images; write the loop yourself"):
        prepare(settings(tmp_path, "reviews"))


# tokens


def test_pairs():
    """Both texts, in segments of their own, within the limit."""
    rows = labelled_rows([Example("fine film", "1", "dull film"), Example("a " * 99, "0", "b")], [1, 0], tokenizer(), 16)
    first = tokenizer()("fine film", "dull film")
    assert rows[0] == {**{k: first[k] for k in ("input_ids", "attention_mask", "token_type_ids")}, "labels": 1}
    assert len(rows[1]["input_ids"]) == 16 and sum(first["token_type_ids"]) == 3


def test_whole_texts_are_learnt():
    """To their end, which is said; a batch's padding is not."""
    tokens = smollm2_tokenizer()
    rows = language_rows([Example("Snow melts.", None), Example("Bread is made from flour.", None)], tokens, 32, chat=False)
    assert [row["labels"] for row in rows] == [row["input_ids"] for row in rows]
    assert all(row["input_ids"][-1] == tokens.eos_token_id for row in rows)
    [batch] = batches_of(rows, collator_of("causal-lm", tokens), 2)
    assert torch.equal(batch["labels"] == MASKED, batch["attention_mask"] == 0)
    assert (batch["labels"] == MASKED).any()


def test_a_prompt_is_not_closed_before_its_response():
    """By tokenizers that put an end behind every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<s>", "</s>", "a", "b"])}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("<s>", 0), ("</s>", 1)]
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokens = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    [row] = language_rows([Example("a a", None, "b b")], tokens, 16, chat=False)
    assert tokens.convert_ids_to_tokens(row["input_ids"]) == ["<s>", "a", "a", "b", "b", "</s>"]
    assert row["labels"] == [MASKED] * 3 + [3, 3, 1]


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_are_not_learnt(chat):
    """What is learnt is the response and its end, behind the prompt."""
    tokens = smollm2_tokenizer()
    [row] = language_rows([Example("What is 2 and 3?", None, "It is 5.")], tokens, 64, chat)
    learnt = tokens.decode([i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != MASKED])
    before = tokens.decode([i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == MASKED])
    assert learnt == ("It is 5.<|im_end|>\n" if chat else "It is 5.<|im_end|>")
    assert before.endswith(
        "<|im_start|>user\nWhat is 2 and 3?<|im_end|>\n<|im_start|>assistant\n" if chat else "What is 2 and 3?\n"
    )
    assert [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label not in (i, MASKED)] == []


def test_nothing_left_to_learn():
    """Rows whose prompt fills the limit are left out; all of them is an error."""
    rows = [Example("word " * 40, None, "yes"), Example("why", None, "so")]
    assert len(language_rows(rows, smollm2_tokenizer(), 16, chat=False)) == 1
    with pytest.raises(ValueError, match="within 16 tokens no row has a token to learn: all are prompt, or too short"):
        language_rows(rows[:1], smollm2_tokenizer(), 16, chat=False)


def test_chat_needs_a_template(folders, texts):
    some = settings(folders["lm"], texts, prompt="text", response="label", chat=True)
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        prepare(some)


def test_tokenizer_without_padding(folders):
    """It pads with another token, which the mask covers."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folders["lm"])
    tokens.pad_token = None
    assert padded_tokenizer(tokens).pad_token_id is not None and tokens.padding_side == "right"


def test_notes(folders, tmp_path):
    """How many rows were left out, and how many may be cut."""
    long = written(tmp_path / "l.csv", [("word " * 40, "yes"), ("why", "so"), ("who", "he"), ("dull " * 3, "no " * 40)])
    found = prepare(settings(folders["lm"], long, prompt="text", response="label", longest=16))
    assert found.notes == (
        "1 of 4 rows have no token to learn within 16 tokens: left out",
        "1 of 3 rows reach 16 tokens and may be cut; longest is the limit",
    )


# models and their heads


@pytest.mark.parametrize("model", ["encoder", "lm"])
def test_new_heads(folders, tmp_path, model):
    """An encoder's is fitted on frozen features, on what it then predicts; a decoder's sees every token and stays random."""
    data = written(tmp_path / "w.csv", [("dull film", "bad"), ("fine film", "ok")] * 8)
    some = settings(folders[model], data, task="classification")
    found = prepare(some)
    assert found.task == "classification" and found.outputs == 2
    assert found.model.config.id2label == {0: "bad", 1: "ok"}
    [batch] = found.batches(found.train, 99)
    assert fit_new_head(found.model, 2, [batch]) == (model == "encoder")
    if model == "encoder":
        with torch.no_grad():
            assert torch.equal(found.model(**batch).logits.argmax(1), batch["labels"])


def test_a_new_head_for_numbers(folders, tmp_path):
    data = written(tmp_path / "r.csv", [("dull", -1.5), ("fine film", 2.5)] * 8)
    found = prepare(settings(folders["encoder"], data))
    [batch] = found.batches(found.train, 99)
    assert found.task == "regression" and fit_new_head(found.model, 1, [batch])
    with torch.no_grad():
        out = found.model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, 0]
    torch.testing.assert_close(out, batch["labels"].float(), atol=0.1, rtol=0)


def test_models_are_the_same_from_one_seed(folders, texts):
    """So that a resumed run begins where the first one did."""
    some = settings(folders["encoder"], texts, task="classification")
    source = find_model(some.model)
    found = find_targets(some, source, read_split(some, source))
    states = [load_model(some.model, source, found, seed).state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["classifier.weight"], states[2]["classifier.weight"])


def test_calibration_reads_all_rows(folders, texts):
    some = CalibrateSettings(model=str(folders["classifier"]), data=str(texts))
    split = read_rows(some, find_model(some.model))
    assert (len(split.train), split.test) == (20, [])
    assert replace(some, seed=1) != some and prepare(some).test == []
