"""The factor study of drawn rows: which settings are the reference, and what changes are worth."""

import pytest
from accuracy_rows import row

from bench.accuracy.factors import effects, row_lengths
from bench.accuracy.forms import COBRA, LONG_COBRA


def study(seeds=3, tasks=("hyper", "topics")) -> list[dict]:
    changes = [((), {}, 0.8), ((("beta", 0.1),), {}, 0.82), ((), {"estimator": "direct"}, 0.75)]
    return [
        row("cobra", task, 2, seed, "factor", level, settings=settings, **changed)
        for settings, changed, level in changes for task in tasks for seed in range(seeds)
    ]  # fmt: skip


def test_reference_first_then_the_best():
    found = effects(study())
    assert [e.changed for e in found] == ["", "beta: default → 0.1", "estimator: paper → direct"]
    assert [e.mean.mean for e in found] == pytest.approx([0.8, 0.02, -0.05], abs=1e-9)
    assert all(e.runs == 6 and set(e.gains) == {"hyper", "topics"} for e in found)


def test_two_factors_are_both_named():
    rows = [*study(), row("cobra", "hyper", 2, 0, "factor", 0.7, lr=0.01, settings=(("beta", 1.0),))]
    assert effects(rows)[-1].changed == "beta: default → 1; lr: 0.003 → 0.01"


def test_another_method_is_named_without_settings():
    """Here the reference has settings, and a plain LoRA has none."""
    rows = [row("cobra", "hyper", 2, 0, "factor", level, settings=(("beta", beta), ("gamma", 1.0))) for beta, level in
            ((0.1, 0.8), (0.2, 0.7), (0.3, 0.6))]  # fmt: skip
    rows += [row("cobra", "hyper", 2, 1, "factor", 0.8, settings=(("beta", 0.1), ("gamma", 1.0)))]
    rows += [row("lora", "hyper", 2, 0, "factor", 0.75)]
    assert [e.changed for e in effects(rows)] == ["", "method: cobra → lora", "beta: 0.1 → 0.2", "beta: 0.1 → 0.3"]


def test_shared_runs_only():
    rows = [r for r in study() if not (r["config"]["settings"] and (r["task"] == "topics" or r["seed"] == 2))]
    (found,) = [e for e in effects(rows) if "beta" in e.changed]
    assert (found.runs, set(found.gains), found.mean) == (2, {"hyper"}, None)


def test_losses_that_fall_are_gains():
    rows = study(tasks=("hyper", "foods"))
    accuracy, loss = [e for e in effects(rows) if "beta" in e.changed]
    assert loss.gains["foods"].mean == loss.mean.mean == pytest.approx(1 - 0.82 / 0.8, rel=1e-4)
    assert accuracy.gains["hyper"].mean == accuracy.mean.mean == pytest.approx(0.02)


def test_rise_of_the_training_loss():
    """Level of the reference, then the mean over pairs of runs; the drawn rows all have 0.5."""
    rows = [{**r, "train_loss": 0.5 + 0.1 * r["seed"]} if r["config"]["settings"] else r for r in study()]
    assert [e.training for e in effects(rows)] == pytest.approx([0.5, 0.2, 0.0])


def test_changes_together_do_not_move_the_reference():
    """Here most settings have another gate and another start, and the form itself is the reference all the same."""
    gate, start = {"gate": "open"}, {"init": "uniform"}
    parts = [{}, gate, gate | start, gate | start | {"cut": 0.1}, gate | start | {"r_max_multiple": 1}]
    rows = [row("cobra", "hyper", 2, 0, "ablation", 0.8, settings=tuple((LONG_COBRA | part).items())) for part in parts]
    found = effects(rows, "ablation")
    assert {e.form for e in found} == {"cobra+long"} and found[0].changed == ""
    assert "gate: concrete → open" in [e.changed for e in found]


def test_of_equal_ones_the_reference_has_the_fewest_settings():
    """As in a study of LoRA's alpha, where a rate of its own goes with each."""
    parts = (((("scaling", 4.0),), 0.001), ((), 0.002), ((("scaling", 1.0),), 0.004))
    rows = [row("lora", "hyper", 2, 0, "ablation", 0.8, lr=lr, settings=settings) for settings, lr in parts]
    found = [e.changed for e in effects(rows, "ablation")]
    assert found == ["", "lr: 0.002 → 0.001; scaling: default → 4", "lr: 0.002 → 0.004; scaling: default → 1"]


def test_of_two_rates_the_first_is_the_references():
    """Half of the settings are at one rate, half at the other: the study began with the form at its own."""
    start = {"init": "uniform"}
    tried = [({}, 0.004), (start, 0.004), ({}, 0.002), (start, 0.002), ({"cut": 0.1}, 0.002)]
    rows = [row("cobra", "hyper", 2, 0, "ablation", 0.8, lr=lr, settings=tuple((LONG_COBRA | p).items())) for p, lr in tried]
    found = effects(rows, "ablation")
    assert found[0].changed == "" and "lr: 0.004 → 0.002" in [e.changed for e in found]


def test_settings_are_beside_the_form_that_they_are_nearest_to():
    """Both where they are as near to both; a form that nothing is nearest to is a change of the other."""
    gate, start = {"gate": "open"}, {"init": "uniform"}

    def found(*tried):
        rows = [row("cobra", "hyper", 2, 0, "ablation", 0.8, settings=tuple(settings.items())) for settings in tried]
        return {form: {e.changed for e in effects(rows, "ablation") if e.form == form} for form in ("cobra", "cobra+long")}

    third, usual = "row_scale: 0.333333 →", "row_scale: default →"
    both = LONG_COBRA | start | {"row_scale": 3.0}
    assert found(LONG_COBRA, LONG_COBRA | gate, COBRA, COBRA | gate, both) == {
        "cobra": {"", "gate: concrete → open", f"{third} default", f"init: gradient → uniform; {third} 3"},
        "cobra+long": {"", "gate: concrete → open", f"{usual} 0.333333", f"init: gradient → uniform; {usual} 3"},
    }
    assert found(LONG_COBRA, LONG_COBRA | gate, COBRA)["cobra"] == set()


def test_rows_of_another_length_are_beside_the_same_settings():
    """Not beside the form, from which they differ in their start too; without a partner they are left out."""
    uniform, long = {"init": "uniform"}, {"row_scale": 3.0}
    tried = [({}, 0.8), (uniform, 0.6), (uniform | long, 0.7), (long, 0.85), ({"cut": 0.1} | long, 0.9)]
    rows = [
        row("cobra", "hyper", 2, seed, "ablation", level, settings=tuple((LONG_COBRA | part).items()))
        for part, level in tried
        for seed in range(2)
    ]
    found = {parts: effect for parts, effect in row_lengths(rows)}
    assert found.keys() == {"", "init: gradient → uniform"}
    assert [effect.mean.mean for effect in found.values()] == pytest.approx([0.1, 0.05], abs=0.01)
    assert all(effect.changed == "row_scale: default → 3" and effect.runs == 2 for effect in found.values())


def test_each_method_of_an_ablation_has_a_reference_of_its_own():
    rows = [{**r, "phase": "ablation"} for r in study()]
    rows += [row("singular", "hyper", 2, seed, "ablation", 0.9) for seed in range(2)]
    assert [e.changed for e in effects(rows, "ablation")][-2:] == ["estimator: paper → direct", ""]


def test_diverged_settings_are_counted():
    rows = [*study(), row("cobra", "hyper", 2, 0, "factor", lr=0.1, diverged=True)]
    (found,) = [e for e in effects(rows) if "lr" in e.changed]
    assert (found.runs, found.diverged, found.gains, found.mean) == (0, 1, {}, None)


def test_ranks_have_references_of_their_own():
    rows = study() + [row("cobra", "hyper", 8, seed, "factor", 0.9) for seed in range(2)]
    assert [(e.place.rank, e.changed) for e in effects(rows)][-1] == (8, "")


def test_conditions_have_references_of_their_own():
    rows = study() + [row("cobra", "hyper", 2, seed, "factor", 0.9, steps=50) for seed in range(2)]
    assert [(e.place.condition, e.changed) for e in effects(rows) if not e.changed] == [("", ""), ("steps 50", "")]


def test_kinds_have_references_of_their_own():
    found = effects(study(tasks=("hyper", "foods")))
    assert [(e.kind, e.changed) for e in found if not e.changed] == [("classification", ""), ("regression", "")]


def test_phases_are_studies_of_their_own():
    assert effects([row()]) == effects(study(), "ablation") == []
