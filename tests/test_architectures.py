"""The whole life of an adapter on five architectures: encoder, decoder, Conv1D decoder, encoder-decoder and vision."""

from functools import cache

import pytest
import torch
from models import ARCHITECTURES, PROSE, logits_of, prose_batch, smollm2_full, train

import cobra

LIVES = [
    ("minilm", "site"),
    ("smollm2", "site"),
    pytest.param("smollm2", "block", marks=pytest.mark.slow),
    ("gpt2", "site"),
    ("gpt2", "block"),
    ("t5", "site"),
    ("t5", "block"),
    ("vit", "site"),
    ("vit", "block"),
]

SINGULAR = [("t5", "site"), ("vit", "site")]  # how the ranks of these are cut; those of the others by their gates

pytestmark = pytest.mark.filterwarnings("ignore:the path integral misses")  # two points are enough for a prior


@cache
def calibrated(name: str, granularity: str) -> cobra.LayerScores:
    build, make_batch = ARCHITECTURES[name]
    return cobra.calibrate(build(), [make_batch()], steps=2, granularity=granularity, progress=False)


def attached(name: str, granularity: str):
    """Model, batch and adapter with about half as many ranks as groups, so that some groups lose all of theirs."""
    build, make_batch = ARCHITECTURES[name]
    model, scores = build(), calibrated(name, granularity)
    basis = "singular" if (name, granularity) in SINGULAR else "gates"
    settings = {"r_max": 4, "total_steps": 4, "granularity": granularity, "gate_lr_scale": 50.0, "basis": basis}
    config = cobra.CobraConfig(rank_budget=len(scores.sites) // 2 + 1, **settings)
    return model, make_batch(), cobra.attach(model, config, scores)


def assert_same_function(logits, expected):
    """Equal up to fp32 rounding at the scale of the largest logit."""
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().clamp(min=1).item())


def test_smollm2_is_read_right():
    """A wrong order of the rows of q and k still prints plausible text; only the loss tells (it would be 4.1)."""
    assert smollm2_full()(**prose_batch((PROSE,))).loss.item() == pytest.approx(3.304, abs=0.02)


@pytest.mark.parametrize(("name", "granularity"), LIVES)
def test_step_zero_is_the_base_model(name, granularity):
    """The prior is where training starts: no change of the loss, no KL, no pull on the gates."""
    build, make_batch = ARCHITECTURES[name]
    base = build()(**make_batch()).loss
    model, batch, adapter = attached(name, granularity)
    assert all(layer.training for group in adapter.groups for layer in group.all_layers)  # the gates are noisy
    assert torch.equal(model(**batch).loss, base)
    kl = adapter.kl_loss()
    assert kl.item() == 0
    kl.backward()
    assert all(torch.count_nonzero(group.gate.grad) == 0 for group in adapter.groups)


@pytest.mark.parametrize(("name", "granularity"), LIVES)
def test_whole_life(name, granularity, tmp_path):
    """Calibrate, attach, train, cut, save, load in peft, merge, unmerge, detach: one function all along."""
    from peft import PeftModel

    model, batch, adapter = attached(name, granularity)
    build, _ = ARCHITECTURES[name]
    base = build()
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=5e-3))
    train(model, adapter, optimizer, [batch] * 4)

    plan = adapter.extract()
    assert plan.total == adapter.config.rank_budget
    assert 0 in plan.ranks.values()
    model.eval()
    with adapter.hard_gates(plan):
        hard = logits_of(model, batch)
    adapter.apply(plan, optimizer)
    adapted = logits_of(model, batch)
    torch.testing.assert_close(adapted, hard, rtol=0, atol=1e-6)
    assert (adapted - logits_of(base, batch)).abs().max() > 0.05  # it did learn

    for layout in ("compact", "padded"):
        adapter.save_pretrained(tmp_path / layout, layout)
        loaded = PeftModel.from_pretrained(build(), tmp_path / layout).eval()
        assert_same_function(logits_of(loaded, batch), adapted)

    report = adapter.merge()
    assert {site.name: site.rank for site in report.sites} == {name: rank for name, rank in plan.ranks.items() if rank}
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in base.named_modules()]
    assert list(model.state_dict()) == list(base.state_dict())
    assert_same_function(logits_of(model, batch), adapted)

    adapter.unmerge()
    assert torch.equal(logits_of(model, batch), adapted)
    adapter.detach()
    kept = {key: value for key, value in base.state_dict().items() if not key.startswith(tuple(adapter.heads))}
    found = model.state_dict()
    assert kept and all(torch.equal(found[key], value) for key, value in kept.items())
