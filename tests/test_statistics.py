"""Running statistics of the base model: they move in training, go with a checkpoint, and are missed in an adapter's folder."""

import warnings

import pytest
import torch
from torch import nn

import cobra


def started() -> tuple[nn.Module, cobra.Adapter, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=4, r_max=4, total_steps=9))
    return model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))


def trained(model: nn.Module, adapter: cobra.Adapter, optimizer: torch.optim.Optimizer) -> None:
    model(torch.linspace(-3, 5, 30).reshape(5, 6)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    adapter.step()


def test_a_checkpoint_holds_them(tmp_path):
    """A resumed run evaluates as the one that was saved."""
    (model, adapter, optimizer), (other, resumed, again) = started(), started()
    trained(model, adapter, optimizer)
    adapter.save_checkpoint(tmp_path / "run.safetensors", optimizer)
    resumed.load_checkpoint(tmp_path / "run.safetensors", again)
    x = torch.ones(2, 6)
    assert torch.equal(other.eval()(x), model.eval()(x))
    assert other[1].num_batches_tracked == 1


def test_what_a_folder_does_not_hold_is_told(tmp_path):
    """The two modules that moved; not where they stood still."""
    model, adapter, optimizer = started()
    model[1].eval(), model[3].eval()
    trained(model, adapter, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.save_pretrained(tmp_path / "still")
    model.train()
    trained(model, adapter, optimizer)
    with pytest.warns(UserWarning, match="running statistics of 1 and 1 more moved in training .* in eval") as caught:
        adapter.save_pretrained(tmp_path / "moved")
    assert caught[0].filename == __file__
