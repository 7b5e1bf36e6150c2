"""Γ from one batched backward against the plain way: a backward for each example, and the norm of the weight's gradient."""

import copy
from functools import partial

import pytest
import torch
from models import Mlp, minilm, mlp_batch, review_batch
from torch import nn

from cobra.batch import Batch
from cobra.entry import find_entry
from cobra.gradient import GradientNorms, gradient_norms
from cobra.objective import default_loss
from cobra.sites import find_sites
from cobra.watch import frozen


class Masked(nn.Module):
    """Padded sequences of token ids, pooled over the tokens that the mask keeps."""

    def __init__(self):
        super().__init__()
        self.embedding, self.up, self.classifier = nn.Embedding(20, 6), nn.Linear(6, 9), nn.Linear(9, 3)

    def forward(self, input_ids, attention_mask, labels):
        h = torch.tanh(self.up(self.embedding(input_ids))) * attention_mask[..., None]
        return self.classifier(h.sum(1) / attention_mask.sum(1, keepdim=True))


class MixedShapes(nn.Module):
    """One weight that sees sequences, their means, and all tokens of the batch in one long list."""

    def __init__(self):
        super().__init__()
        self.mix, self.classifier = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = x + torch.tanh(self.mix(x))
        x = x + torch.tanh(self.mix(x.flatten(0, 1))).view_as(x)
        x = x.mean(1)
        return self.classifier(x + torch.tanh(self.mix(x)))


class Tied(nn.Module):
    """Two modules with one weight and their own biases."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.classifier = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.classifier(self.second(torch.tanh(self.first(x))).tanh())


class Branches(nn.Module):
    """A weight used twice, once for nothing: the other use is its whole gradient."""

    def __init__(self):
        super().__init__()
        self.mix, self.classifier = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        self.mix(x.flip(0))
        return self.classifier(torch.tanh(self.mix(input=x)))


class WithConv1D(nn.Module):
    """transformers' Conv1D, whose weight is (K, N)."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.up, self.classifier = Conv1D(9, 6), nn.Linear(9, 3)

    def forward(self, x):
        return self.classifier(torch.tanh(self.up(x)).mean(1))


def masked_batch():
    lengths = torch.tensor([7, 2, 5, 1])
    mask = (torch.arange(7) < lengths[:, None]).long()
    return {"input_ids": torch.randint(20, (4, 7)), "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 0])}


CASES = {
    "vectors": (Mlp, mlp_batch),
    "one-token": (Mlp, partial(mlp_batch, tokens=1)),
    "few-tokens": (partial(Mlp, 23), partial(mlp_batch, tokens=3)),  # Gram form
    "many-tokens": (Mlp, partial(mlp_batch, tokens=31)),  # direct form
    "one-example": (Mlp, partial(mlp_batch, examples=1, tokens=3)),
    "masked": (Masked, masked_batch),
    "mixed-shapes": (MixedShapes, partial(mlp_batch, tokens=4)),
    "tied": (Tied, mlp_batch),
    "unused-use": (Branches, mlp_batch),
    "conv1d": (WithConv1D, partial(mlp_batch, tokens=4)),
}


def as_batch(values, dtype=torch.float64) -> Batch:
    batch = Batch.from_loader(values, torch.device("cpu"), 0)
    return batch.map(lambda t: t.to(dtype) if t.is_floating_point() else t)


def norms_of(model, sites, batch) -> GradientNorms:
    with frozen(model):
        return gradient_norms(model, sites, find_entry(model, batch), batch, partial(default_loss, model))


def looped_norms(model, sites, batch) -> torch.Tensor:
    """(B, S), one example and one backward at a time; the padding of the batch stays."""
    squared = torch.zeros(batch.size, len(sites), dtype=torch.float64)
    for i in range(batch.size):
        example = batch.rows(i, i + 1)
        loss = default_loss(model, example.forward(model), example).sum()
        grads = torch.autograd.grad(loss, [site.module.weight for site in sites])
        squared[i] = torch.stack([g.square().sum() for g in grads])
    return squared


@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("case", CASES)
def test_equals_single_backwards(case, trainable):
    """One batched backward has every example's norm to fp64 rounding, whether or not the weights take gradients."""
    build, make_batch = CASES[case]
    model, batch = build().double(), as_batch(make_batch())
    sites = find_sites(model, ".*")
    expected = looped_norms(model, sites, batch)
    model.requires_grad_(trainable)
    found = norms_of(model, sites, batch)
    assert expected.min() > 0
    torch.testing.assert_close(found.squared.sqrt(), expected.sqrt(), rtol=1e-10, atol=0)
    assert found.called == found.reached == frozenset(range(len(sites)))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_single_backwards_on_minilm(dtype):
    """All 38 linears of a real encoder in a padded batch; fp32 may differ by what its own backward rounds away."""
    model = minilm().double()
    sites, batch = find_sites(model, ".*"), as_batch(review_batch())
    expected = looped_norms(model, sites, batch).sqrt()
    model.to(dtype)
    found = norms_of(model, sites, as_batch(review_batch(), dtype)).squared.sqrt()
    assert len(sites) == 38
    torch.testing.assert_close(found, expected, rtol=1e-10 if dtype == torch.float64 else 1e-4, atol=0)


def test_norms_do_not_depend_on_the_batch():
    """An example has one norm, whoever its neighbours are."""
    model, batch = Masked().double(), as_batch(masked_batch())
    sites = find_sites(model, ".*")
    alone = torch.cat([norms_of(model, sites, batch.rows(i, i + 1)).squared for i in range(4)])
    torch.testing.assert_close(norms_of(model, sites, batch).squared, alone, rtol=1e-10, atol=0)


def test_masked_label_has_no_norm():
    """An example whose label is -100 wants nothing."""
    model, batch = Masked().double(), as_batch(masked_batch())
    batch.labels[1] = -100
    squared = norms_of(model, find_sites(model, ".*"), batch).squared
    assert not squared[1].any() and squared[[0, 2, 3]].min() > 0


def test_inplace_write_over_an_input_is_refused():
    """x is read when the gradient arrives; a model that has overwritten it by then is told which layer's input it was."""

    class Overwriting(Mlp):
        def forward(self, x):
            h = torch.tanh(self.up(x))
            update = torch.tanh(self.mid(h))
            return self.classifier(h.add_(update))

    model, batch = Overwriting().double(), as_batch(mlp_batch())
    with pytest.raises(RuntimeError, match="writes in place over the input of mid"):
        norms_of(model, find_sites(model), batch)


@pytest.mark.parametrize("tokens", [None, 4], ids=["vectors", "sequences"])
def test_inplace_modules(tokens):
    """The same with a module that declares it: the input is copied, and the norms are those of the plain model."""
    torch.manual_seed(1)
    pool = nn.Identity() if tokens is None else nn.AvgPool2d((tokens, 1))
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), pool, nn.Flatten(), nn.Linear(8, 3)).double()
    inplace = copy.deepcopy(plain)
    inplace[1].inplace = inplace[3].inplace = True
    batch = as_batch(mlp_batch(tokens=tokens))
    sites = find_sites(plain)
    found = norms_of(inplace, find_sites(inplace), batch).squared
    torch.testing.assert_close(found, looped_norms(plain, sites, batch), rtol=1e-10, atol=0)


def test_shared_input_has_a_gradient():
    """A linear also applied to what all examples share (DeBERTa's relative positions): that use counts as well."""

    class Positioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.classifier = nn.Linear(6, 6), nn.Linear(6, 3)
            self.positions = nn.Parameter(torch.randn(1, 4, 6))

        def forward(self, x):
            return self.classifier((self.mix(x) * self.mix(self.positions)).tanh().mean(1))

    model, batch = Positioned().double(), as_batch(mlp_batch(tokens=4))
    sites = find_sites(model, ".*")
    torch.testing.assert_close(norms_of(model, sites, batch).squared, looped_norms(model, sites, batch), rtol=1e-10, atol=0)
