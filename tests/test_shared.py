"""Layers that get one input: found by what they are called with, and the same numbers as each alone."""

import copy

import pytest
import torch
from models import minilm, review_batch, stir
from torch import nn
from torch.utils.checkpoint import checkpoint

import cobra


class Attention(nn.Module):
    """q, k and v of one input, a second input for the last of three, and a layer on its own."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))
        self.crossed = self.apart = self.checkpointed = False

    def body(self, x):
        q, k = self.q(x), self.k(x)
        v = self.v(x + 1) if self.crossed else self.v(x)
        k = self.k(x * 2) if self.apart else k
        return self.out(torch.tanh(q * k + v))

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)


def attach(model=None, **settings):
    torch.manual_seed(0)
    model = Attention() if model is None else model
    config = {"rank_budget": 8, "r_max": 4, "total_steps": 10, "share_inputs": True}
    adapter = cobra.attach(model, cobra.CobraConfig(**config | settings))
    stir(adapter)
    return model, adapter


def take_step(model, adapter, x):
    """Loss and gradients; parameters stay."""
    model.zero_grad()
    loss = model(x).square().sum() + adapter.kl_loss()
    loss.backward()
    return [loss.detach()] + [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]


def sharers(adapter) -> set[tuple[str, ...]]:
    names = {id(layer): group.name for group in adapter.groups for layer in group.all_layers}
    return {tuple(names[id(layer)] for layer in group) for group in adapter.shared_inputs.groups.values()}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("gate", ["concrete", "hard_concrete", "straight_through", "open"])
def test_shared_and_alone_are_the_same_step(gate, checkpointed):
    x = torch.randn(5, 6, requires_grad=True)
    (model, adapter), (alone, other) = attach(gate=gate), attach(gate=gate)
    model.checkpointed = alone.checkpointed = checkpointed
    for _ in range(3):
        torch.testing.assert_close(take_step(model, adapter, x), take_step(alone, other, x))
        adapter.step(), other.step()
        other.shared_inputs.forget()
    assert sharers(adapter) == {("q", "k", "v")} and not sharers(other)
    torch.testing.assert_close(model.eval()(x), alone.eval()(x))


def test_a_model_shares_what_it_calls_in_a_row():
    model = minilm()
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=72, r_max=4, total_steps=10, share_inputs=True))
    stir(adapter)
    model(**review_batch()).loss.backward()
    before = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    adapter.shared_inputs.settle()
    found = sharers(adapter)
    assert len(found) == 6 and all([name.rsplit(".")[-1] for name in row] == ["query", "key", "value"] for row in found)
    model.zero_grad()
    model(**review_batch()).loss.backward()
    after = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    after, before = (torch.cat([g.flatten() for g in each.values()]) for each in (after, before))
    assert (after - before).norm() <= 1e-3 * before.norm()


def test_another_input_is_computed_alone_and_ends_the_sharing():
    x = torch.randn(5, 6)
    (model, adapter), (alone, other) = attach(), attach()
    take_step(model, adapter, x), adapter.step(), other.step()
    model.crossed = alone.crossed = True
    torch.testing.assert_close(take_step(model, adapter, x), take_step(alone, other, x))
    assert sharers(adapter) == {("q", "k", "v")}  # until the step: a recomputation takes the same path
    take_step(model, adapter, x), adapter.step(), other.step()
    assert not sharers(adapter)
    torch.testing.assert_close(take_step(model, adapter, x), take_step(alone, other, x))


@pytest.mark.parametrize("change", ["x", "weights", "step", "no_grad", "cut"])
def test_what_changed_since_is_not_reused(change):
    """Between the calls of q and k: the input, the parameters, whether there is a graph, and what counts."""
    model, adapter = attach()
    x = torch.randn(5, 6)
    take_step(model, adapter, x), adapter.step()
    model.q(x)
    with torch.no_grad():
        if change == "x":
            x.mul_(2)
        if change == "weights":
            model.k.lora_B.mul_(3)
        if change == "step":
            adapter.move_to_step(7)
    plan = adapter.extract(4)
    if change == "no_grad":
        with torch.no_grad():
            assert not model.k(x).requires_grad
    elif change == "cut":
        with adapter.hard_gates(plan):
            found = model.k(x)
            torch.testing.assert_close(found, model.k(x + 0))
    else:
        found, _ = model.k(x), adapter.shared_inputs.forget()
        torch.testing.assert_close(found, model.k(x))


@pytest.mark.parametrize("training", [True, False])
def test_inference_mode(training):
    """Its tensors have no version to tell a change by: what is computed there is computed alone, seen before or not."""
    model, adapter = attach()
    x = torch.randn(5, 6)
    for _ in range(2):
        expected = model.train(training)(x)
        with torch.inference_mode():
            torch.testing.assert_close(model(x + 0), expected)
        take_step(model.train(), adapter, x), adapter.step()
    assert sharers(adapter) == {("q", "k", "v")}


def test_a_layer_called_elsewhere_too_shares_nothing():
    model, adapter = attach()
    model.apart = True
    take_step(model, adapter, torch.randn(5, 6)), adapter.step()
    assert adapter.shared_inputs.settled and not sharers(adapter)


def test_dropout_and_half_of_a_group_in_evaluation_are_computed_alone():
    model, adapter = attach(dropout=0.5)
    take_step(model, adapter, torch.randn(5, 6)), adapter.step()
    model(torch.randn(5, 6))
    assert adapter.shared_inputs._computed is None
    model, adapter = attach()
    take_step(model, adapter, torch.randn(5, 6)), adapter.step()
    model.k.eval()
    model(torch.randn(5, 6))
    assert adapter.shared_inputs._computed is None


def test_cuts_copies_and_merges():
    """A cut is seen anew, a copy of a model in use is a model, and after a merge nothing is left of it."""
    model, adapter = attach()
    x = torch.randn(5, 6)
    take_step(model, adapter, x), adapter.step()
    model.q(x)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin.eval()(x), model.eval()(x))
    model.train()
    adapter.apply(adapter.extract(5))
    assert not sharers(adapter)
    for _ in range(2):
        take_step(model, adapter, x), adapter.step()
    before = model.eval()(x)
    adapter.merge()
    torch.testing.assert_close(model(x), before)


def test_evaluation_sees_nothing():
    """It would go on seeing for as long as a model is served."""
    model, adapter = attach()
    model.eval()(torch.randn(5, 6))
    assert not adapter.shared_inputs._seen and adapter.shared_inputs._x is None
