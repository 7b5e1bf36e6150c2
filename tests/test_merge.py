"""Merging and unmerging, and the report of what the weights gained."""

import copy

import pytest
import torch
from models import attached, image_batch, layers_of, logits_of, state_of, stir

BATCH = image_batch()


def test_merge_and_unmerge_are_checked():
    _, adapter = attached()
    with pytest.raises(ValueError, match="not merged"):
        adapter.unmerge()
    plan = adapter.extract()
    adapter.merge()
    for call in (adapter.merge, lambda: adapter.apply(plan)):
        with pytest.raises(ValueError, match="merged"):
            call()


def test_merge_of_a_diverged_adapter_changes_nothing():
    """The layers merged before the bad one are put back, bit for bit."""
    model, adapter = attached()
    stir(adapter)
    with torch.no_grad():
        layers_of(adapter)[5].lora_B[0, 0] = float("nan")
    before, weights = state_of(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"vit\.layers\.0\.mlp\.fc2: the merged weight is not finite"):
        adapter.merge()
    assert state_of(model) == before
    assert all(torch.equal(value.nan_to_num(), weights[name].nan_to_num()) for name, value in model.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_mode_follows_through_a_merge(training):
    """model.eval() while merged holds after unmerge: evaluation must never see noise, nor training go without."""
    model, adapter = attached()
    stir(adapter)
    model.train(not training)
    adapter.merge()
    model.train(training)
    adapter.unmerge()
    assert all(layer.training is training for layer in layers_of(adapter))


def test_unmerge_in_mid_search():
    """Merging to look and going on is as if nothing had been merged."""
    model, adapter = attached()
    stir(adapter)
    noisy = logits_of(model, BATCH)
    adapter.merge()
    merged = logits_of(model, BATCH)
    adapter.unmerge()
    assert torch.equal(logits_of(model, BATCH), noisy)
    torch.testing.assert_close(merged, logits_of(model.eval(), BATCH), rtol=1e-5, atol=1e-5)


def test_merge_report():
    """What each layer gained, beside what it had, and what its dtype could not hold."""
    _, adapter = attached()
    stir(adapter)
    updates = [(2 * layer.lora_B * layer.lora_gate.sigmoid() @ layer.lora_A).norm().item() for layer in layers_of(adapter)]
    weights = [layer.weight.norm().item() for layer in layers_of(adapter)]
    report = adapter.merge()
    assert [site.name for site in report.sites] == [group.name for group in adapter.groups]
    assert [site.delta_norm for site in report.sites] == pytest.approx(updates)
    assert [site.weight_norm for site in report.sites] == pytest.approx(weights)
    assert 0 < report.worst_rounding_loss < 1e-6
    assert len(report.table().splitlines()) == 13
    assert repr(report).startswith("MergeReport(12 layers, at most ")
