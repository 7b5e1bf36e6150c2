"""The exact cut, and the plan as a value and as a file."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Mlp, gpt2, vit

import cobra
from cobra.plan import RankPlan, SitePlan, top_ranks

PLAN = RankPlan(
    (
        SitePlan("block.0", ("block.0.q", "block.0.k"), 40, (0, 2), (0.75, 0.5, 0.625)),
        SitePlan("block.1", ("block.1.q",), 20, (), (0.25, 0.125)),
    ),
    "mean",
    "0123456789abcdef",
)

FIRST = PLAN.to_dict()["sites"][0]

groups_of_scores = st.lists(st.lists(st.integers(-2, 2).map(float), min_size=1, max_size=6), min_size=1, max_size=6)


def brute_force(scores: list[list[float]], budget: int) -> list[list[int]]:
    """Sorts every gate: the best first, equal ones by index and then by group."""
    gates = sorted((-value, k, g) for g, values in enumerate(scores) for k, value in enumerate(values))[:budget]
    return [sorted(k for _, k, owner in gates if owner == g) for g in range(len(scores))]


@settings(deadline=None)
@given(groups_of_scores, st.data())
def test_top_ranks_is_the_brute_force(scores, data):
    budget = data.draw(st.integers(0, sum(map(len, scores))))
    kept = top_ranks([torch.tensor(values) for values in scores], budget)
    assert kept == brute_force(scores, budget)
    assert sum(map(len, kept)) == budget


def test_extremes():
    """Nothing, everything, and no groups at all are plans too."""
    scores = [torch.randn(3), torch.randn(5)]
    assert top_ranks(scores, 0) == [[], []]
    assert top_ranks(scores, 8) == [[0, 1, 2], [0, 1, 2, 3, 4]]
    assert top_ranks([], 0) == []


def test_equal_scores_give_even_ranks():
    """Untrained gates must not favour the layers that come first."""
    assert [len(kept) for kept in top_ranks([torch.zeros(4)] * 5, 10)] == [2] * 5
    assert [len(kept) for kept in top_ranks([torch.zeros(4)] * 5, 12)] == [3, 3, 2, 2, 2]


def test_ties_are_spread_round_the_groups():
    """Ties at the threshold are shared out; what is clearly better or worse is not touched by them."""
    scores = [torch.tensor([9.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])]
    assert top_ranks(scores, 4) == [[0, 1], [0], [0]]


def test_a_cut_finer_than_fp32_is_seen():
    """Scores are compared in fp64: two gates that differ in the last place are not a tie."""
    low = torch.tensor([0.5], dtype=torch.float64)
    assert top_ranks([low, low + 1e-12], 1) == [[], [0]]


@pytest.mark.parametrize("budget", [-1, 6])
def test_budget_out_of_range(budget):
    with pytest.raises(ValueError, match=rf"budget={budget}: expected 0 to 5, the capacity of 2 groups"):
        top_ranks([torch.zeros(2), torch.zeros(3)], budget)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_diverged_gates_are_named(bad):
    with pytest.raises(ValueError, match="1 gate scores are not finite: the training diverged"):
        top_ranks([torch.tensor([0.0, bad])], 1)


def test_numbers_of_a_plan():
    """A shared gate counts once in the budget, but costs parameters in every layer."""
    assert PLAN.ranks == {"block.0.q": 2, "block.0.k": 2, "block.1.q": 0}
    assert PLAN.total == 2
    assert PLAN.parameters == 80
    assert repr(PLAN) == "RankPlan(2 ranks over 2 groups, 0 to 2 each, 80 parameters)"


def test_table_shows_how_close_the_cut_was():
    lines = [line.split() for line in PLAN.table().splitlines()]
    assert lines[1:] == [
        ["block.0", "2", "0.625", "0.500", "80"],
        ["block.1", "0", "-", "0.250", "0"],
        ["total", "2", "80"],
    ]


def test_extracted_plan_describes_the_adapter():
    model = vit()
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=5, r_max=3, gate="mean", granularity="block"))
    plan = adapter.extract()
    assert [site.members for site in plan.sites] == [tuple(s.name for s in group.sites) for group in adapter.groups]
    assert plan.parameters == sum(rank * sum(model.get_submodule(name).weight.shape) for name, rank in plan.ranks.items())
    assert all(p == 0.5 for site in plan.sites for p in site.posterior)


def test_file_round_trip(tmp_path):
    PLAN.save(tmp_path / "new" / "plan.json")
    assert RankPlan.load(tmp_path / "new" / "plan.json") == PLAN


def written(**changes) -> str:
    return json.dumps({"kind": "rank plan", "version": 1, **PLAN.to_dict(), **changes})


BAD_FILES = {
    "cut off": (written()[:-20], "truncated or foreign"),
    "no text": ("\x00\xff", "truncated or foreign"),
    "a list": ("[]", "a file of another program"),
    "another kind": (written(kind="layer scores"), "expected a COBRA rank plan, found layer scores"),
    "another version": (written(version=2), "version 2"),
    "no sites": (written(sites=None), "not a complete rank plan"),
    "a bare site": (written(sites=[{"name": "q"}]), "not a complete rank plan: KeyError\\('members'\\)"),
    "no such gate": (written(sites=[FIRST | {"kept": [0, 3]}]), r"block.0 keeps ranks \(0, 3\) of 3 gates"),
    "a gate twice": (written(sites=[FIRST | {"kept": [1, 1]}]), r"block.0 keeps ranks \(1, 1\) of 3 gates"),
    "unknown fold": (written(fold="max"), "fold='max' is not one of 'one', 'mean'"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused(tmp_path, content, message):
    """A plan decides what is thrown away, so nothing in it is taken on trust. The message names the file."""
    path = tmp_path / "plan.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(cobra.FormatError, match=rf"plan\.json.*{message}"):
        RankPlan.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        RankPlan.load(tmp_path / "none.json")


CONFIG = cobra.CobraConfig(rank_budget=4, r_max=2, gate="mean")


@pytest.mark.parametrize(
    ("build", "changes", "message"),
    [
        (gpt2, {}, "the plan is of another model: fingerprint"),
        (vit, {"r_max": 3}, "the plan is of another adapter"),
        (vit, {"granularity": "block"}, "the plan is of another adapter"),
        (vit, {"target_modules": ("q_proj",)}, "the plan is of another model"),
    ],
)
def test_plan_of_another_adapter_is_refused(build, changes, message):
    plan = cobra.attach(vit(), CONFIG).extract()
    adapter = cobra.attach(build(), cobra.CobraConfig(**{"rank_budget": 4, "r_max": 2, "gate": "mean"} | changes))
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        adapter.apply(plan)
    with pytest.raises(ValueError, match=message), adapter.hard_gates(plan):
        pass
    assert before.keys() == adapter.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in adapter.state_dict().items())


def test_the_same_weights_trained_on_are_another_model():
    """Names and shapes alone do not make a plan fit."""
    plan = cobra.attach(Mlp(), CONFIG).extract()
    with pytest.raises(ValueError, match="another model"):
        cobra.attach(Mlp(), CONFIG).apply(plan)


def test_a_plan_is_applied_once():
    adapter = cobra.attach(vit(), CONFIG)
    plan = adapter.extract()
    adapter.apply(plan)
    with pytest.raises(ValueError, match="applied already"):
        adapter.apply(plan)
