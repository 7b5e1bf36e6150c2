"""Optimizer state and settings in a checkpoint: what is no plain tensor or number comes back, or is named before a write."""

import sys

import pytest
import torch
from models import layers_of, vit
from test_checkpoint import SEARCH, Run, assert_same_bits, copied

from cobra import checkpoint
from cobra.optimizer_state import from_parts


def test_settings_that_no_file_can_keep(tmp_path):
    """What no file can keep of an optimizer is named, with the optimizer, before anything is written."""
    run = Run.start(vit)
    run.optimizer.param_groups[0]["lr"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"optimizer torch\.AdamW field 'lr' holds a Tensor, .* use plain numbers \(lr=1e-3\)"):
        run.save(tmp_path / "run.cobra")
    run.optimizer.param_groups[0]["lr"] = 1e-2
    run.advance(0, 1)
    state = run.optimizer.state[layers_of(run.adapter)[0].lora_A]
    state["projector"] = object()
    with pytest.raises(
        ValueError, match=r"state 'projector' of torch\.AdamW holds a object, .*; save without the optimizer, or"
    ):
        run.save(tmp_path / "run.cobra")
    state["projector"] = [torch.ones(2), object()]
    with pytest.raises(ValueError, match=r"state 'projector' of torch\.AdamW holds a object"):
        run.save(tmp_path / "run.cobra")
    assert not any(tmp_path.iterdir())


def test_rates_that_are_tensors(tmp_path):
    """torchao's optimizers make them of numbers; schedulers then hold tensors too."""
    runs = Run.start(vit), Run.start(vit)
    for run in runs:
        for group in run.optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"])
        run.scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1 / (1 + step))
    runs[0].advance(0, 2)
    runs[0].save(tmp_path / "run.cobra")
    runs[1].load(tmp_path / "run.cobra")
    assert_same_bits(runs[1].scheduler.state_dict(), runs[0].scheduler.state_dict())
    assert all(isinstance(group["lr"], torch.Tensor) for group in runs[1].optimizer.param_groups)
    random = torch.get_rng_state()
    for run in runs:
        torch.set_rng_state(random)
        run.advance(2, SEARCH + 2)
    assert_same_bits(copied(runs[1].adapter), copied(runs[0].adapter))


@pytest.mark.parametrize("name", ["counter", "number", "dtype", "shape", "pairs"])
def test_names_that_mark_other_things_in_the_file(name, tmp_path):
    """A lone number of any name, a lone field of a dictionary, and keys that are no strings come back as they were."""
    run, fresh = Run.start(vit), Run.start(vit)
    run.advance(0, 1)
    layers = layers_of(run.adapter)[:2]
    states = {name: 3}, {"plain": {name: [3]}, "tensors": {0: torch.ones(2), (1, "a"): {name: torch.zeros(1)}, "0": {5: 2}}}
    for each in (run, fresh):
        each.optimizer = torch.optim.SGD(each.adapter.parameter_groups(lr=1e-2))
    for layer, state in zip(layers, states, strict=True):
        run.optimizer.state[layer.lora_B] = dict(state)
    checkpoint.save(run.adapter, tmp_path / "run.cobra", run.optimizer, None)
    checkpoint.load(fresh.adapter, tmp_path / "run.cobra", fresh.optimizer, None)
    for layer, state in zip(layers_of(fresh.adapter), states, strict=False):
        assert_same_bits(fresh.optimizer.state[layer.lora_B], state)


def test_dictionaries_of_older_files():
    """They were written as objects, whose keys are strings."""
    parts = {"dict": {"state1": {"tensor": "form.0"}, "scale": {"value": {"number": [0.5, "torch.float32"]}}}}
    meta = {"param_groups": [], "scalars": {"0": {"step": 2}}, "forms": {"0": {"quantised": parts}}}
    found = from_parts("run.cobra", {"form.0": torch.ones(2)}, meta)["state"]
    assert_same_bits(found, {0: {"step": 2, "quantised": {"state1": torch.ones(2), "scale": torch.tensor(0.5)}}})


def test_state_in_other_forms_than_tensors(tmp_path, monkeypatch):
    """torchao's quantised moments, and bitsandbytes' dictionaries of them; nothing that a file names is imported for it."""
    from torchao.optim import subclass_4bit, subclass_8bit

    run, fresh = Run.start(vit), Run.start(vit)
    run.advance(0, 2)
    first, second = (run.optimizer.state[layers_of(run.adapter)[i].lora_B] for i in (0, 1))
    first["exp_avg"] = subclass_8bit.OptimState8bit.zeros(first["exp_avg"].shape, block_size=32).copy_(first["exp_avg"])
    first["exp_avg_sq"] = subclass_4bit.OptimState4bit.zeros(first["exp_avg"].shape, block_size=32).copy_(first["exp_avg_sq"])
    second["quantised"] = {"state1": torch.arange(9, dtype=torch.uint8), "scales": [torch.tensor([0.1]), None]}
    run.save(tmp_path / "run.cobra")
    fresh.load(tmp_path / "run.cobra")
    found, other = (fresh.optimizer.state[layers_of(fresh.adapter)[i].lora_B] for i in (0, 1))
    for moment in ("exp_avg", "exp_avg_sq"):
        assert type(found[moment]) is type(first[moment]) and found[moment].shape == first[moment].shape
        assert torch.equal(found[moment].dequantize(), first[moment].dequantize()) and first[moment].codes.any()
        assert_same_bits(found[moment].__tensor_flatten__(), first[moment].__tensor_flatten__())
    assert_same_bits(other, second)
    monkeypatch.delitem(sys.modules, subclass_8bit.__name__)
    with pytest.raises(
        ValueError, match=r"holds optimizer state as torchao\.optim\.subclass_8bit\.OptimState8bit: make the optimizer"
    ):
        fresh.load(tmp_path / "run.cobra")
