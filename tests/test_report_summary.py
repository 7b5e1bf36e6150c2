"""The first screen: what was decided, on what evidence, at what cost, as the files have it."""

import pytest
from models import Mlp, mlp_batch
from reports import keep_only, made_run, whole_run

import cobra
from cobra.report.run import Run, append_gates
from cobra.report.summary import cards, cautions, lead, subject

BUDGET = {"amount": 6, "unit": "ranks"}


def facts(run) -> dict[str, tuple[str, str]]:
    return {fact.label: (fact.value, fact.note) for card in cards(run) for fact in card.facts}


def test_cards(tmp_path):
    """Every number of a whole run."""
    run = Run.load(whole_run(tmp_path))
    assert [card.title for card in cards(run)] == ["Decided", "On what evidence", "At what cost", "Evaluation"]
    assert facts(run) == {
        "ranks kept": ("6", "of 12 gates"),
        "layers with ranks": ("3", "of 3"),
        "full layers": ("0", "every gate kept"),
        "largest rank": ("2", ""),
        "calibration examples": ("2", "3 points of the path"),
        "path integral misses": ("1.00 %", "of the output's change"),
        "correlation": ("-0.65", "of gradient and contribution"),
        "undecided gates": ("12", "of 12: 0.1 to 0.9"),
        "parameters": ("60", "as LoRA of rank 2 on all layers"),
        "training steps": ("8", "ranks cut at 6"),
        "seconds": ("62", ""),
        "layers merged": ("3", "of 3, with no overhead"),
        "accuracy": ("0.750", "0.500 before training"),
        "calibration error": ("0.050", ""),  # 0.4 · 0.05 + 0.6 · 0.05
    }


def test_cards_of_what_is_there(tmp_path):
    run = Run.load(keep_only(whole_run(tmp_path), "eval.json"))
    assert [card.title for card in cards(run)] == ["Evaluation"]
    assert lead(run) == ["This run has no rank plan yet."]


@pytest.mark.parametrize(
    ("kept", "provenance", "text"),
    [
        (2, {"budget": BUDGET, "spent": 4}, "4 ranks went to 2 of 2 layers, 4 of a budget of 6 ranks."),
        (3, {"budget": BUDGET, "spent": 6}, "6 ranks went to 2 of 2 layers, the whole budget of 6 ranks."),
        (3, {"budget": BUDGET}, "6 ranks went to 2 of 2 layers, under a budget of 6 ranks."),
        (0, {}, "0 ranks went to 0 of 2 layers; the other 2 are as in the base model."),
        (
            4,
            {},
            "8 ranks went to 2 of 2 layers. 2 layers keep every gate: under a larger r_max and budget more ranks might go "
            "there.",
        ),
    ],
    ids=["less", "whole", "unknown", "none", "all full"],
)
def test_what_was_decided(tmp_path, kept, provenance, text):
    assert lead(Run.load(made_run(tmp_path, ["up", "mid"], kept=kept, **provenance)))[0] == text


def test_how_certain(tmp_path):
    """Whether training moved the gates, and where the cut runs."""
    plan = cobra.RankPlan.load(made_run(tmp_path, ["up"]) / "plan.json")
    append_gates(tmp_path, 0, plan)
    append_gates(tmp_path, 5, plan)
    text = lead(Run.load(tmp_path))[1]
    assert text.startswith("From step 0 to 5 training moved a gate's probability by 0.0000 on average and 0.0000 at most: ")
    assert text.endswith("The weakest gate that was kept stands at 0.700, the strongest that was dropped at 0.500.")
    with open(tmp_path / "gates.jsonl", "a") as f:
        f.write('{"step": 9, "gates": {"up": [0.5, 0.7, 0.5, 0.3]}}\n')
    assert "by 0.1000 on average and 0.4000 at most. The weakest" in lead(Run.load(tmp_path))[1]


def test_singular_directions(tmp_path):
    run = Run.load(made_run(tmp_path, ["up", "mid"], energy=(8.0, 1.0, 0.75, 0.25), source="singular"))
    assert lead(run)[1] == (
        "The ranks are singular directions of the updates; those that were kept carry 90.0% of the updates' energy."
    )
    assert "undecided gates" not in facts(run)


def test_scores_alone(tmp_path):
    """No training, so no certainty, and no gates to call undecided."""
    scores = cobra.calibrate(Mlp(), [mlp_batch()], steps=20, progress=False)
    scores.save(tmp_path / "scores.safetensors")
    cobra.plan_ranks(scores, 5).save(tmp_path / "plan.json")
    run = Run.load(tmp_path)
    assert "how certain they are is not known" in lead(run)[1] and "undecided gates" not in facts(run)


def test_empty_plan(tmp_path):
    cobra.RankPlan((), "one", "f").save(tmp_path / "plan.json")
    assert lead(Run.load(tmp_path)) == ["This run has no rank plan yet."] and cards(Run.load(tmp_path)) == []


def test_cautions(tmp_path):
    assert cautions(Run.load(made_run(tmp_path, ["up", "mid"]))) == []
    found = cautions(Run.load(made_run(tmp_path, ["up", "mid"], residual=1.03)))
    assert found == [
        "The path integral misses 103 % of the output's change, and 5 % should be the most: contributions, and ranks that "
        "rest on them, are rough. More points of the path or another baseline may do better."
    ]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"seed": 0, "settings": {"model": "minilm", "data": "reviews"}, "data": {"reviews": "f00"}},
            "minilm on reviews, seed 0",
        ),
        ({"model": "folder", "data": {"file": "f00"}}, "folder"),
        ({"settings": "none", "seed": "x"}, ""),
    ],
    ids=["train", "by hand", "other"],
)
def test_subject(settings, text):
    assert subject(Run("run", settings=settings)) == text
