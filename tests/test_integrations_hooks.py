"""StepHooks on the optimizers that a loop may have: closures, and what accelerate has prepared."""

import copy
import warnings

import pytest
import torch
from models import Mlp, attached, layers_of, mlp_batch, same, stir
from torch.nn import functional as F

from cobra.integrations.hooks import StepHooks

SETTINGS = {"rank_budget": 4, "r_max": 3, "total_steps": 9, "beta": 5.0, "gate_lr_scale": 20.0}


def searching(wrap=lambda optimizer: optimizer):
    """A model in search, its loss on a batch, its optimizer and the hooks on it."""
    torch.manual_seed(0)
    model, adapter = attached(Mlp, **SETTINGS)
    stir(adapter)
    x, labels = mlp_batch(8)
    optimizer = wrap(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    return model, adapter, lambda: F.cross_entropy(model(x), labels), optimizer, StepHooks(adapter, optimizer)


def with_closure(optimizer, loss, factor: float = 1.0):
    def closure():
        optimizer.zero_grad()
        value = loss() * factor
        value.backward()
        return value

    return closure


@pytest.mark.parametrize("named", [False, True])
def test_a_closure_trains_as_a_loop_does(named):
    """Its zero_grad comes before the KL, which counts once a step, as do the gates' rate and the noise of the next step."""
    _, plain, loss, optimizer, _ = searching()
    for _ in range(3):
        with_closure(optimizer, loss)()
        optimizer.step()
    _, closed, loss, optimizer, hooks = searching()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            closure = with_closure(optimizer, loss)
            value = optimizer.step(closure=closure) if named else optimizer.step(closure)
            assert value.isfinite()
    assert (hooks.seen, hooks.taken, hooks.kl_added, hooks.bad, closed.current_step) == (3, 3, 3, 0, 3)
    assert same(list(closed.state_dict().values()), list(plain.state_dict().values()))


class Twice(torch.optim.AdamW):
    """A class that calls its parent's step: torch has hooks around both."""

    @torch.optim.Optimizer.profile_hook_step
    def step(self, closure=None):
        return super().step(closure)


def test_a_closure_of_a_step_within_a_step():
    model, adapter, loss, _, hooks = searching()
    hooks.remove()
    optimizer = Twice([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    hooks = StepHooks(adapter, optimizer)
    for _ in range(2):
        optimizer.step(with_closure(optimizer, loss))
    assert (hooks.seen, hooks.taken, hooks.kl_added, adapter.current_step) == (2, 2, 2, 2)


def test_a_closure_whose_gradients_are_not_finite():
    """That step changes nothing, the ones around it are taken."""
    _, adapter, loss, optimizer, hooks = searching()
    optimizer.step(with_closure(optimizer, loss))
    before = copy.deepcopy(list(adapter.state_dict().values()))
    with pytest.warns(UserWarning, match="are not finite: step skipped"):
        optimizer.step(with_closure(optimizer, loss, factor=float("nan")))
    assert same(list(adapter.state_dict().values()), before) and (hooks.bad, hooks.taken) == (1, 1)
    optimizer.step(with_closure(optimizer, loss))
    assert (hooks.bad, hooks.taken, adapter.current_step) == (1, 2, 2)
    assert all(layer.lora_B.isfinite().all() for layer in layers_of(adapter))


def test_an_optimizer_that_accelerate_prepared():
    """Within accumulation, steps are those that were taken."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, adapter, loss, optimizer, hooks = searching(accelerator.prepare_optimizer)
    for _ in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(loss())
            optimizer.step()
            optimizer.zero_grad()
    assert (hooks.taken, hooks.kl_added, adapter.current_step) == (2, 2, 2)
