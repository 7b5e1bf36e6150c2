"""The model and its batches: what padding, order and segments do, and the head that every method starts from."""

from dataclasses import replace

import pytest
import torch
from accuracy_models import TINY, encoded, minilm, reviews, tokenizer
from torch.nn import functional as F

from bench.accuracy.encoder import Encoded, fit_head, load_model, predict
from bench.accuracy.tasks import Example

PAIRS = [Example("A man sleeps.", 0, "Nobody is awake in the house."), Example("It rains.", 1, "It is wet.")]


def moved():
    """A model whose head says something."""
    model = minilm()
    with torch.no_grad():
        model.classifier.weight.normal_(generator=torch.Generator().manual_seed(0))
    return model


def test_predictions_are_in_the_order_of_the_examples_and_free_of_padding():
    """More examples than a batch holds, of all lengths: each as if it were alone."""
    model, data = moved(), encoded(70)
    lengths = [len(ids) for ids in data.columns["input_ids"]]
    assert len(set(lengths)) > 2 and max(lengths) == TINY["max_length"] and lengths != sorted(lengths)
    found = predict(model, data)
    assert found.shape == (70, 2) and not model.training
    for i in (0, 1, 35, lengths.index(min(lengths)), 69):
        alone = torch.tensor([data.columns["input_ids"][i]])
        logits = model(input_ids=alone, attention_mask=torch.ones_like(alone)).logits
        torch.testing.assert_close(found[i], logits[0], rtol=1e-3, atol=1e-4)


def test_batches_are_padded_to_their_longest():
    data = encoded()
    rows = [*sorted(range(len(data)), key=lambda i: len(data.columns["input_ids"][i]))[:2], 0]
    batch = data.batch(rows)
    lengths = [len(data.columns["input_ids"][i]) for i in rows]
    assert batch["attention_mask"].sum(1).tolist() == lengths and batch["input_ids"].shape == (3, max(lengths))
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer().pad_token_id).all()
    assert batch["labels"].tolist() == [data.labels[i] for i in rows]


def test_pairs_have_segments():
    """The second text is told from the first, and both count."""
    data = Encoded.of(PAIRS, tokenizer(), "classification", 64)
    batch = data.batch([1, 0])
    ids, segments, mask = batch["input_ids"], batch["token_type_ids"], batch["attention_mask"]
    for row, example in enumerate(reversed(PAIRS)):
        for side, text in enumerate((example.text, example.text2)):
            tokens = ids[row][(segments[row] == side) & (mask[row] == 1)]
            read = tokenizer().decode(tokens, skip_special_tokens=True)
            assert read.replace(" ", "") == text.lower().replace(" ", "")
    assert (segments[mask == 0] == 0).all()
    model = moved()
    batch.pop("labels")
    outputs = model(**batch).logits
    assert not torch.allclose(outputs, model(**{**batch, "token_type_ids": torch.zeros_like(segments)}).logits, atol=1e-3)
    torch.testing.assert_close(predict(model, data)[[1, 0]], outputs, rtol=1e-3, atol=1e-4)
    assert "token_type_ids" not in encoded().columns


def test_regressions_predict_one_number_each():
    examples = [Example(text, score) for text, score in (("good", 0.5), ("bad", -0.5), ("a little good", 0.25))]
    data = Encoded.of(examples, tokenizer(), "regression", 16)
    assert data.labels.dtype == torch.float32 and predict(moved(), data).shape == (3,)


def test_training_batches_are_whole_epochs_drawn_by_the_seed():
    data = replace(encoded(22), labels=torch.arange(22))  # names the examples
    drawn = [batch["labels"].tolist() for batch in data.shuffled(4, 12, seed=0)]
    assert [len(rows) for rows in drawn] == [4] * 12
    for epoch in (drawn[:5], drawn[5:10]):  # 5 batches of 4, and 2 examples left out
        assert len({i for rows in epoch for i in rows}) == 20
    assert drawn[:5] != drawn[5:10]
    assert drawn == [batch["labels"].tolist() for batch in data.shuffled(4, 12, seed=0)]
    assert drawn != [batch["labels"].tolist() for batch in data.shuffled(4, 12, seed=1)]


def test_too_few_examples_for_a_batch_are_refused():
    with pytest.raises(ValueError, match="batch_size=25: there are 24 training examples"):
        list(encoded().shuffled(25, 1, seed=0))


@pytest.mark.parametrize(("classes", "dropout"), [(2, 0.0), (6, 0.1)])
def test_models_have_a_zero_head_of_the_tasks_size(classes, dropout):
    model, _ = load_model(replace(reviews(), classes=classes), dropout)
    assert model.classifier.weight.shape == (classes, 384) and model.config.num_labels == classes
    assert not model.classifier.weight.any() and not model.classifier.bias.any()
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {dropout}


def test_the_head_fits_frozen_features():
    """Below the loss of a zero head, at the minimum, the same every time; the encoder stays."""
    data, heads = encoded(), []
    for decay in (3e-3, 3e-3, 3e-1):
        model = minilm()
        before = {name: p.clone() for name, p in model.named_parameters() if "classifier" not in name}
        fit_head(model, data, decay)
        heads.append(model.classifier.weight.detach().clone())
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
        assert all(p.grad is None for p in model.classifier.parameters())
    assert torch.equal(heads[0], heads[1]) and heads[2].norm() < heads[0].norm()
    model.classifier.weight.data.copy_(heads[0])
    assert F.cross_entropy(predict(model, data), data.labels) < 0.6  # log 2 without
