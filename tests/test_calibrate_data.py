"""What a calibration says of batches that are none, of labels without a class, and of values that are no numbers."""

import pytest
import torch
from calibrations import Tokens, assert_equal, calibrate, token_batch
from models import Mlp, gpt2, image_batch, minilm, mlp_batch, review_batch, t5, tokenizer, vit
from models import token_batch as text_batch
from torch.utils.data import DataLoader

pytestmark = pytest.mark.filterwarnings("ignore:the path integral misses")
X, Y = torch.zeros(2, 6), torch.tensor([0, 1])


@pytest.fixture(scope="module")
def model():
    return minilm()


def nan_input():
    x, y = mlp_batch()
    x[2, 0] = float("nan")
    return x, y


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], ValueError, "the calibration loader is empty: it yielded no batch"),
        ([(X[:0], Y[:0])], ValueError, "the calibration loader is empty"),
        ([(X, Y - 100 - Y)] * 3, ValueError, r"all labels of the 3 calibration batches are masked \(-100\)"),
        ([mlp_batch(), nan_input()], ValueError, "the loss of example 2 in calibration batch 1 is nan: check its inputs"),
        ([(X, None)], ValueError, "the batch has no tensor 'labels'; add them, or pass target= and loss="),
        ([X], TypeError, r"batch 0 is Tensor; expected a mapping of tensors or an \(inputs, labels\) pair"),
        ([(X, Y), "text"], TypeError, "batch 1 is str; expected a mapping"),
        ([(X, Y, Y)], TypeError, "batch 0 is tuple; expected a mapping"),
        ([{"texts": ["fine", "dull"]}], ValueError, "batch 0 holds no tensors with a batch dimension; wrap .* collate_fn"),
        ([(X[0], 1)], ValueError, "batch 0 looks like one example without a batch dimension; wrap the dataset in a DataLoader"),
        ([(X, Y + 4)], ValueError, "label 4 is out of range: the model has 3 classes .*; correct the labels, which count from"),
        ([{"a": X, "b": X, "labels": Y}], ValueError, r"cannot tell the model's input among \['a', 'b', 'labels'\]"),
        ([(X.long(), Y)], ValueError, "input 0 is torch.int64 and Mlp has no input embeddings .* define get_input_embeddings"),
    ],
    ids=[
        "empty",
        "empty-batches",
        "all-masked",
        "nan",
        "no-labels",
        "tensor",
        "string",
        "triple",
        "texts",
        "row",
        "label",
        "two-inputs",
        "integers",
    ],
)
def test_bad_loader(loader, error, message):
    """The message says which batch, which example, what was found and what was expected."""
    with pytest.raises(error, match=message):
        calibrate(Mlp(), loader)


def rows_of(batch) -> list:
    """A batch as the rows of a dataset."""
    if isinstance(batch, tuple):
        return list(zip(*batch, strict=True))
    return [{key: tensor[i] for key, tensor in batch.items()} for i in range(len(batch["labels"]))]


@pytest.mark.parametrize(
    ("build", "make_batch"),
    [(minilm, review_batch), (gpt2, text_batch), (t5, text_batch), (vit, image_batch), (Mlp, mlp_batch)],
    ids=["minilm", "gpt2", "t5", "vit", "mlp"],
)
def test_rows_in_the_place_of_batches(build, make_batch):
    """A dataset is not a loader: the model would break somewhere inside. In a DataLoader its rows are a batch."""
    model, batch = build(), make_batch()
    rows = rows_of(batch)
    with pytest.raises(ValueError, match="batch 0 looks like one example without a batch dimension; wrap the dataset in a "):
        calibrate(model, rows)
    assert_equal(calibrate(model, DataLoader(rows, batch_size=len(rows))), calibrate(model, [batch]))


def test_rows_without_a_label_in_the_place_of_batches(model):
    """What is scored may be the caller's own; ids of one text are still no batch."""
    rows = [{key: tensor for key, tensor in row.items() if key != "labels"} for row in rows_of(review_batch())]
    own = {"target": lambda outputs, batch: outputs.logits[:, 0], "loss": lambda outputs, batch: outputs.logits.square().sum(1)}
    with pytest.raises(ValueError, match="batch 0 looks like one example without a batch dimension"):
        calibrate(model, rows, **own)


def test_rows_of_lists_in_the_place_of_batches(model):
    """As tokenizers make them; the collate_fn that the message names pads them to the batch."""
    from transformers import DataCollatorWithPadding

    batch = review_batch()
    rows = [
        {key: tensor[mask.bool()].tolist() if tensor.ndim else tensor.item() for key, tensor in row.items()}
        for row, mask in zip(rows_of(batch), batch["attention_mask"], strict=True)
    ]
    with pytest.raises(ValueError, match=r"batch 0 holds no tensors with a batch dimension; .* DataCollatorWithPadding"):
        calibrate(model, rows)
    loader = DataLoader(rows, batch_size=4, collate_fn=DataCollatorWithPadding(tokenizer()))
    assert_equal(calibrate(model, loader), calibrate(model, [review_batch()]))


def test_examples_of_one_token_are_no_row():
    """A model of one's own may take ids (B,); only those of transformers never do."""
    ids, labels = token_batch([True] * 5)
    assert calibrate(Tokens(), [(ids[:, 1], labels[:, 1])]).settings["examples"] == 5


@pytest.mark.parametrize("label", [5, -1])
@pytest.mark.parametrize(("build", "make_batch"), [(minilm, review_batch), (vit, image_batch)], ids=["minilm", "vit"])
def test_label_without_a_class(build, make_batch, label):
    """Named before the model's own loss breaks over it; one beyond max_examples is not looked at, and -100 is masked."""
    model = build()
    loader = [make_batch() | {"labels": torch.tensor([1, 0, -100, label])}]
    with pytest.raises(ValueError, match=rf"label {label} is out of range: the model has {model.num_labels} classes .and -100"):
        calibrate(model, loader)
    assert calibrate(model, loader, max_examples=2).settings["examples"] == 2


def test_integer_labels_of_a_regression():
    """With one output transformers fits numbers, which are no classes."""
    batch = review_batch() | {"labels": torch.tensor([5, 0, -3, 1])}
    scores = calibrate(
        minilm(labels=1),
        [batch],
        target=lambda outputs, batch: outputs.logits[:, 0],
        loss=lambda outputs, batch: (outputs.logits[:, 0] - batch["labels"]).square(),
    )
    assert scores.settings["examples"] == 4
