"""The default F and loss of every example: which labels are shifted, and which integers are numbers."""

from dataclasses import dataclass

import pytest
import torch
from models import gpt2, minilm, review_batch, token_batch
from torch import nn
from torch.nn import functional as F

from cobra import objective
from cobra.batch import Batch


def batch_of(values) -> Batch:
    return Batch.from_loader(values, torch.device("cpu"), 0)


@torch.no_grad()
def scalars(model: nn.Module, batch: Batch) -> torch.Tensor:
    """(2, B) default losses, which are the model's own, and targets."""
    outputs = batch.forward(model)
    losses = objective.default_loss(model, outputs, batch)
    objective.check_against_model(model, outputs, losses, batch)
    return torch.stack([losses, objective.default_target(model, outputs, batch)])


class Tagger(nn.Module):
    """One's own: a class for every token, the loss left to the caller."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.classifier = nn.Embedding(96, 6), nn.Linear(6, 96)

    def forward(self, input_ids, attention_mask=None, labels=None):
        return self.classifier(self.embedding(input_ids))


class Wrapper(nn.Module):
    """One's own around a model of transformers, with its config."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **batch):
        return self.model(**batch)


@dataclass
class Settings:
    hidden: int = 6


def small_bert(kind: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return getattr(transformers, kind)(transformers.BertConfig(vocab_size=96, num_labels=96, **sizes)).eval()


def tagger_with(config) -> nn.Module:
    model = Tagger()
    model.config = config
    return model


ALIGNED = {
    "no config": Tagger,
    "a dict": lambda: tagger_with({"hidden": 6}),
    "a dataclass": lambda: tagger_with(Settings()),
    "an encoder's config": lambda: tagger_with(small_bert("BertModel").config),
    "MaskedLM": lambda: small_bert("BertForMaskedLM"),
    "TokenClassification": lambda: small_bert("BertForTokenClassification"),
    "compiled MaskedLM": lambda: torch.compile(small_bert("BertForMaskedLM"), backend="eager"),
}


@pytest.mark.parametrize("build", ALIGNED.values(), ids=ALIGNED)
def test_labels_of_the_token_itself(build):
    """Each prediction is scored against the label at its own place, whatever the model calls its `config`."""
    model, batch = build(), batch_of(token_batch())
    with torch.no_grad():
        outputs = batch.forward(model)
    labels, logits = batch.labels, getattr(outputs, "logits", outputs)
    expected = [F.cross_entropy(z, y).item() for z, y in zip(logits, labels, strict=True)]
    assert objective.default_loss(model, outputs, batch).tolist() == pytest.approx(expected, rel=1e-5)
    assert objective.default_target(model, outputs, batch).tolist() == pytest.approx([-v for v in expected], rel=1e-5)
    first = batch_of(token_batch() | {"labels": labels.index_fill(1, torch.arange(1, 9), -100)})
    assert objective.labelled_examples(model, first).all()


SHIFTED = {"gpt2": gpt2, "wrapped": lambda: Wrapper(gpt2()), "compiled": lambda: torch.compile(gpt2(), backend="eager")}


@pytest.mark.parametrize("build", SHIFTED.values(), ids=SHIFTED)
def test_labels_of_the_next_token(build):
    """Causal language models of transformers shift labels in their own loss."""
    model, batch = build(), batch_of(token_batch())
    with torch.no_grad():
        outputs = batch.forward(model)
    expected = [F.cross_entropy(z[:-1], y[1:]).item() for z, y in zip(outputs.logits, batch.labels, strict=True)]
    losses = objective.default_loss(model, outputs, batch)
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    objective.check_against_model(model, outputs, losses, batch)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
@pytest.mark.parametrize("problem_type", ["regression", None])
def test_ratings_are_numbers(problem_type, shape):
    """A classifier of one output fits integers as it does floats; -100 is a number like others."""
    model, labels = minilm(labels=1), torch.tensor([3, 0, -100, 4]).reshape(shape)
    model.config.problem_type = problem_type
    found = []
    for kind in (torch.int64, torch.float32):
        batch = batch_of(review_batch() | {"labels": labels.to(kind)})
        assert objective.labelled_examples(model, batch).all()
        objective.check_classes(model, batch)
        found.append(scalars(model, batch))
    assert torch.equal(*found)


def test_ratings_of_several_outputs():
    model = minilm(labels=3)
    model.config.problem_type = "regression"
    batch = batch_of(review_batch() | {"labels": torch.arange(12).reshape(4, 3)})
    objective.check_classes(model, batch)
    with torch.no_grad():
        outputs = batch.forward(model)
    objective.check_against_model(model, outputs, objective.default_loss(model, outputs, batch), batch)


def test_classes_in_a_column():
    """Which transformers' classifiers take as they take a row."""
    model, labels = minilm(labels=3), torch.tensor([0, 2, -100, 1])
    found = []
    for shape in ((4,), (4, 1)):
        batch = batch_of(review_batch() | {"labels": labels.reshape(shape)})
        assert objective.labelled_examples(model, batch).tolist() == [True, True, False, True]
        found.append(scalars(model, batch))
    assert torch.equal(*found)


def test_classes_that_fit_no_logits():
    model, batch = nn.Linear(6, 3), batch_of((torch.randn(4, 6), torch.ones(4, 2, dtype=torch.long)))
    with pytest.raises(ValueError, match=r"labels \(4, 2\) for logits \(4, 3\): expected one class \(4,\)"):
        objective.default_loss(model, batch.forward(model), batch)


def test_integers_for_one_output_of_a_model_of_ones_own():
    """Nothing says that it is a regression: the message says how to."""
    model, batch = nn.Linear(6, 1), batch_of((torch.randn(4, 6), torch.tensor([3, 0, 1, 4])))
    with pytest.raises(ValueError, match=r"label 3 is out of range: the model has one output, .*; make the labels floating"):
        objective.default_loss(model, batch.forward(model), batch)
