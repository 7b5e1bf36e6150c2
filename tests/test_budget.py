"""Budgets: the selection is the brute force's, constraints hold together, and what cannot be is refused by name."""

import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import t5
from torch import nn

from cobra import budget as module
from cobra.budget import Allocation, Budget, allocate

LETTERS = ("a.q", "a.k", "b.q", "b.k", "c.q")
ROUNDED = [
    [0.75, 0.75, 0.5],
    [0.25, 0.625, 0.75],
    [0.625, 0.5, 0.375],
    [0.5, 0.75],
]  # some worth per cost is no binary fraction
eighths = st.integers(0, 8).map(lambda n: n / 8)  # sums of these are exact, so that equal worth is equal


@st.composite
def problems(draw, value):
    """Names, values, costs, and the constraints of a budget; not all of them can be met."""
    names = LETTERS[: draw(st.integers(1, len(LETTERS)))]
    values = [draw(st.lists(value, max_size=4)) for _ in names]
    costs = [draw(st.sampled_from((1, 2, 3, 5, 7, 10, 15, 21))) for _ in names]
    limit = st.integers(0, 3)
    constraints = {
        "minimum": draw(st.one_of(st.just(0), st.integers(0, 2), st.dictionaries(st.sampled_from(names), limit))),
        "maximum": draw(st.one_of(st.none(), limit, st.dictionaries(st.sampled_from(names), limit))),
        "multiple": draw(st.sampled_from((1, 1, 2, 3))),
        "tied": draw(st.sampled_from(((), (), (r"[qk]$",), (r"^[ab]",), (r"[qk]$", r"^[ab]"), (".*",)))),
        "objective": draw(st.sampled_from(("mass", "count"))),
    }
    amount = draw(st.integers(0, sum(cost * len(v) for cost, v in zip(costs, values, strict=True))))
    return names, values, costs, Budget(amount, "parameters", **constraints)


def tied_with(names, patterns) -> list[set[int]]:
    """The ties, by joining whatever shares a group until nothing changes."""
    ties = [{g} for g in range(len(names))]
    for pattern in patterns:
        stems = [re.sub(pattern, "", name, count=1) if re.search(pattern, name) else None for name in names]
        ties += [{g for g, other in enumerate(stems) if other == stem} for stem in stems if stem is not None]
    for _ in names:
        ties = [set().union(*(b for b in ties if a & b)) for a in ties]
    return sorted({frozenset(tie) for tie in ties}, key=min)


def limit_of(limit, name: str, default: int) -> int:
    return default if limit is None else limit if isinstance(limit, int) else limit.get(name, default)


def worth_of(ranks, values, costs, objective) -> float:
    """Of the best gates of each group; summed without rounding."""
    return math.fsum(
        value * (cost if objective == "mass" else 1)
        for rank, group, cost in zip(ranks, values, costs, strict=True)
        for value in sorted(group, reverse=True)[:rank]
    )


def lateness_of(tie, rank: int, values, costs, budget) -> int:
    """Σ cost × position over the steps of one tie: a single gate's index, and otherwise the number of the step."""
    group = min(tie)
    positions = range(rank // budget.multiple)
    if len(tie) == 1 and budget.multiple == 1:
        positions = sorted(range(len(values[group])), key=lambda k: -values[group][k])[:rank]
    return sum(positions) * sum(costs[g] for g in tie) * budget.multiple


def brute_force(names, values, costs, budget) -> tuple | None:
    """(worth, spent, -lateness) of the best of all rank vectors; None where there is none, or money for more than there is."""
    options = []
    for tie in tied_with(names, budget.tied):
        low = max(limit_of(budget.minimum, names[g], 0) for g in tie)
        high = min(min(len(values[g]), limit_of(budget.maximum, names[g], 99)) for g in tie)
        ranks = [r for r in range(high + 1) if r >= low and r % budget.multiple == 0]
        cost = [costs[g] for g in tie]
        worth = [worth_of([r] * len(tie), [values[g] for g in tie], cost, budget.objective) for r in ranks]
        options.append(
            [(w, r * sum(cost), -lateness_of(tie, r, values, costs, budget)) for w, r in zip(worth, ranks, strict=True)]
        )
    totals = [tuple(map(sum, zip(*chosen, strict=True))) for chosen in itertools.product(*options)]
    if max((spent for _, spent, _ in totals), default=-1) < budget.amount:
        return None
    return max((total for total in totals if total[1] <= budget.amount), default=None)


def check_constraints(names, values, costs, budget, found: Allocation) -> None:
    ranks = found.ranks
    assert found.spent == sum(r * cost for r, cost in zip(ranks, costs, strict=True)) <= budget.amount == found.amount
    for name, rank in zip(names, ranks, strict=True):
        assert limit_of(budget.minimum, name, 0) <= rank <= limit_of(budget.maximum, name, 99) and rank % budget.multiple == 0
    for tie in tied_with(names, budget.tied):
        assert len({ranks[g] for g in tie}) == 1
    for kept, group in zip(found.kept, values, strict=True):
        assert list(kept) == sorted(sorted(range(len(group)), key=lambda k: -group[k])[: len(kept)])
    assert found.spent == budget.amount or budget.amount - found.spent < found.step


@settings(max_examples=300, deadline=None)
@given(st.one_of(problems(eighths), problems(st.floats(0, 1))))
@example((LETTERS[:4], ROUNDED, [21, 1, 21, 7], Budget(51, "parameters", objective="count")))
@example((LETTERS[:4], [[0.125] * 3, [0.125] * 3, [0.125] * 2, [0.125] * 3], [3, 1, 2, 15], Budget(5, "parameters")))
def test_is_the_brute_force(problem):
    """Worth first, then what is spent, then evenness, with every constraint together. What is refused cannot be met."""
    names, values, costs, budget = problem
    best = brute_force(names, values, costs, budget)
    try:
        found = allocate(names, values, costs, budget)
    except ValueError as error:
        unmatched = any(not any(re.search(p, name) for name in names) for p in budget.tied)
        assert best is None or (unmatched and "matches none" in str(error))
        return
    check_constraints(names, values, costs, budget, found)
    worth = worth_of(found.ranks, values, costs, budget.objective)
    lateness = sum(lateness_of(tie, found.ranks[min(tie)], values, costs, budget) for tie in tied_with(names, budget.tied))
    assert found.optimal and worth == pytest.approx(best[0], rel=1e-14)
    if all(8 * value == int(8 * value) for group in values for value in group):
        assert (worth, found.spent, -lateness) == best


def one_list(values, amount: int) -> list[list[int]]:
    """The plain cut: every gate in one list, the best first, equal ones by index and then by group."""
    gates = sorted((-value, k, g) for g, group in enumerate(values) for k, value in enumerate(group))[:amount]
    return [sorted(k for _, k, owner in gates if owner == g) for g in range(len(values))]


@settings(deadline=None)
@given(st.lists(st.lists(eighths, min_size=1, max_size=6), min_size=1, max_size=6), st.data())
def test_ranks_alone_are_the_plain_cut(values, data):
    """Also with equal values. A larger budget keeps what a smaller one kept."""
    names, costs = [f"layer.{g}" for g in range(len(values))], [1] * len(values)
    amount = data.draw(st.integers(0, sum(map(len, values))))
    tensors = [torch.tensor(group) for group in values]
    found = allocate(names, tensors, costs, Budget(amount))
    assert [list(kept) for kept in found.kept] == one_list(values, amount)
    assert (found.spent, found.optimal, found) == (amount, True, allocate(names, values, costs, Budget(amount)))
    fewer = allocate(names, tensors, costs, Budget(amount // 2))
    assert all(set(a) <= set(b) for a, b in zip(fewer.kept, found.kept, strict=True))


@settings(deadline=None)
@given(problems(eighths), st.data())
def test_finer_values_decide_only_between_equal_ones(problem, data):
    """The worth and what is spent stay the best there are; finer values that are equal where the values are change nothing."""
    names, values, costs, budget = problem
    finer = [[data.draw(st.integers(-9, 9)) for _ in group] for group in values]
    try:
        plain = allocate(names, values, costs, budget)
    except ValueError:
        return
    found = allocate(names, values, costs, budget, finer)
    worth = [worth_of(each.ranks, values, costs, budget.objective) for each in (plain, found)]
    assert worth[0] == worth[1] and (found.spent, found.optimal) == (plain.spent, plain.optimal)
    for kept, group, fine in zip(found.kept, values, finer, strict=True):
        assert list(kept) == sorted(sorted(range(len(group)), key=lambda k: (-group[k], -fine[k]))[: len(kept)])
    assert allocate(names, values, costs, budget, values) == plain


@pytest.mark.parametrize(("objective", "tied"), [("mass", ()), ("count", ()), ("mass", ("qkv",))], ids=str)
def test_finer_values_order_equal_gates_of_all_groups(objective, tied):
    """In one cost and in several, alone and in ties, below zero too."""
    names, finer = ["a.q", "a.k", "b.q", "b.k"], [[-63.0] * 4, [-63.0] * 4, [-5.0, -7.0, -6.0, -6.0], [-5.0] * 4]
    budget = Budget(24, "parameters", objective=objective, tied=tied)
    ranks = allocate(names, [[1.0] * 4] * 4, [3, 3, 3, 3], budget, finer).ranks
    assert ranks == (0, 0, 4, 4)
    ranks = allocate(names, [[1.0] * 4] * 4, [2, 1, 2, 1], Budget(12, "parameters", tied=tied), finer).ranks
    assert ranks == (0, 0, 4, 4)
    one = allocate(["a", "b", "c"], [[1.0]] * 3, [2, 2, 3], Budget(5, "parameters"), [[40.0], [50.0], [60.0]])
    assert one.kept == ((), (0,), (0,))


def test_mass_ignores_what_a_gate_costs_and_count_does_not():
    """The same posterior: by mass the wide layer's better gates stay, by count the money goes further on the narrow one."""
    values, costs = [[0.9, 0.8], [0.7, 0.6]], [4, 1]
    assert allocate(["wide", "narrow"], values, costs, Budget(8, "parameters")).ranks == (2, 0)
    assert allocate(["wide", "narrow"], values, costs, Budget(6, "parameters", objective="count")).ranks == (1, 2)


@pytest.mark.parametrize("costs", [(1, 1, 1), (2, 5, 7), (8, 5, 18)])
def test_equal_values_give_even_ranks(costs):
    """Untrained gates favour no layer: ranks differ by what it takes to spend all, and no more."""
    amount = 4 * sum(costs) * 8 + 11
    found = allocate([f"l.{g}" for g in range(12)], [torch.ones(16)] * 12, list(costs) * 4, Budget(amount, "parameters"))
    assert found.spent == amount
    assert max(found.ranks) - min(found.ranks) <= 2


LLAMA_3_8B = {"self_attn.q": 8192, "self_attn.k": 5120, "self_attn.v": 5120, "self_attn.o": 8192} | {
    f"mlp.{name}": 18432 for name in ("gate", "up", "down")
}


@pytest.mark.parametrize("value", [1.0, 0.9, 0.1])
@pytest.mark.parametrize("objective", ["mass", "count"])
@pytest.mark.parametrize("tied", [("qkv",), ("qkv", "gate_up"), (r"\d+\.(?=self_attn)",)], ids=str)
def test_equal_values_give_even_ranks_to_ties_too(tied, objective, value):
    """However many groups a step buys, of whatever costs: by mass it is worth the one value, by count where costs are equal."""
    layers = [f"layers.{i}" for i in range(8)]
    names = [f"{layer}.{name}_proj" for layer in layers for name in LLAMA_3_8B]
    costs = [*LLAMA_3_8B.values()] * 8 if objective == "mass" else [18432] * len(names)
    budget = Budget(8 * sum(costs), "parameters", tied=tied, objective=objective)
    found = allocate(names, [[value] * 16] * len(names), costs, budget)
    assert set(found.ranks) == {8} and found.optimal


def random_model(groups: int, gates: int, costs, levels: int | None = None):
    generator = np.random.default_rng(0)
    values = generator.random((groups, gates)) if levels is None else generator.integers(0, levels, (groups, gates)) / levels
    return [f"layers.{g}" for g in range(groups)], list(values), [costs[g % len(costs)] for g in range(groups)]


def best_by_table(values, costs, amount: int) -> tuple[float, int]:
    """The best worth and what it spends, by a table over every amount, gate after gate: another method altogether."""
    best = np.full(amount + 1, -np.inf)
    best[0] = 0.0
    for group, cost in zip(values, costs, strict=True):
        for value in group:
            best[cost:] = np.maximum(best[cost:], best[:-cost] + value * cost)
    return float(best.max()), int(np.flatnonzero(best == best.max())[-1])


@pytest.mark.parametrize("levels", [None, 1, 4])
@pytest.mark.parametrize("costs", [(32, 59), (8, 5, 18), (61, 97, 131), (41, 43, 61, 67, 71, 97, 131)], ids=str)
def test_models_are_proven_best(costs, levels):
    """Hundreds of gates of up to seven costs, some of them equal or all of them 0: as the table says, and proven."""
    names, values, costs = random_model(28, 16, costs, levels=levels)
    for share in (0.06, 0.37, 0.9):
        amount = int(share * 16 * sum(costs))
        found = allocate(names, values, costs, Budget(amount, "parameters"))
        worth, spent = best_by_table(values, costs, amount)
        assert worth_of(found.ranks, values, costs, "mass") == pytest.approx(worth, rel=1e-12)
        assert found.optimal and (levels is None or found.spent == spent)


@pytest.mark.parametrize("search", [(1, 10**6), (2**62, 1)], ids=["reach", "work"])
def test_a_search_that_is_cut_short_claims_nothing(monkeypatch, search):
    """It still spends until nothing fits, is worth no more than what is proven best, and says that it is not proven."""
    names, values, costs = random_model(30, 20, (4097, 8191, 12289, 16411, 5003))
    costs[0] = 3  # fits whatever else does not
    budgets = [Budget(sum(costs) * rank, "parameters") for rank in range(1, 20)]
    proven = [allocate(names, values, costs, budget) for budget in budgets]
    monkeypatch.setattr(module, "SEARCHES", (search,))
    short = [allocate(names, values, costs, budget) for budget in budgets]
    worth = [[worth_of(found.ranks, values, costs, "mass") for found in several] for several in (proven, short)]
    assert all(a >= b for a, b in zip(*worth, strict=True)) and worth[0] != worth[1]
    assert all(a == b for a, b, found in zip(*worth, short, strict=True) if found.optimal)
    assert any(str(found).endswith("; the best found, not proven to be the best there is") for found in short)
    for budget, found in zip(budgets, short, strict=True):
        check_constraints(names, values, costs, budget, found)


def test_a_common_divisor_of_the_costs_narrows_the_search(monkeypatch):
    names, values, costs = random_model(60, 40, (8192, 5120, 18432), levels=2)
    monkeypatch.setattr(module, "SEARCHES", ((36, 10**6),))
    assert allocate(names, values, costs, Budget(sum(costs) * 9 + 1000, "parameters")).optimal


def test_the_same_again_and_from_every_kind_of_values():
    names, values, costs = random_model(9, 12, (6, 10, 15), levels=5)
    budget = Budget(600, "bytes", multiple=2, minimum=2)
    first = allocate(names, values, costs, budget)
    for convert in (np.array, torch.tensor, lambda v: v.tolist(), lambda v: torch.tensor(v, requires_grad=True)):
        assert allocate(names, [convert(v) for v in values], np.array(costs), budget) == first
    assert allocate(["a", "b"], [[0.5], [0.5 + 1e-12]], [1, 1], Budget(1)).kept == ((), (0,))
    half = [torch.tensor([0.25, 0.75], dtype=torch.bfloat16), torch.tensor([0.5], dtype=torch.float16)]
    assert allocate(["a", "b"], half, [1, 1], Budget(2)).kept == ((1,), (0,))


def test_nothing_to_keep():
    """No groups, groups without gates, an amount of 0."""
    assert allocate([], [], [], Budget(0)) == Allocation((), 0, 0, "ranks", 0, True)
    assert allocate(["a"], [[]], [3], Budget(0, "bytes")).kept == ((),)
    assert str(allocate(["a"], [[1.0]], [3], Budget(0, "bytes", multiple=4))) == "0 of 0 bytes"


# ties and limits by name


def names_of(kind: str) -> list[str]:
    """Every linear layer of a small model of transformers."""
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 8}
    model = t5() if kind == "T5" else getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes))
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def several(*patterns: str) -> list[str]:
    """Every name that comes of "a.{x,y}.b": a.x.b, a.y.b."""
    parts = [re.split(r"[{}]", pattern, maxsplit=2) for pattern in patterns]
    return [name for p in parts for name in (several(*(p[0] + x + p[2] for x in p[1].split(","))) if len(p) == 3 else p)]


def ties_of(names: list[str], *patterns: str) -> set[frozenset[str]]:
    """The ties of several groups, told from ranks: what has to be bought together with the one gate that is worth anything."""
    ties = set()
    for g in range(len(names)):
        values = [[float(g == other)] for other in range(len(names))]
        budgets = (Budget(amount, tied=patterns) for amount in range(1, len(names) + 1))
        ranks = next(r for budget in budgets if (r := allocate(names, values, [1] * len(names), budget).ranks)[g])
        ties.add(frozenset(itertools.compress(names, ranks)))
    return {tie for tie in ties if len(tie) > 1}


MOE = several("layers.{0,1}.mlp.{experts.0,experts.3,experts.10,shared_expert}.{gate,up,down}_proj", "layers.0.mlp.gate")
MIXTRAL = several("layers.0.block_sparse_moe.experts.{0,1,2}.{w1,w2,w3}")
SELF = "{encoder,decoder}.block.{0,1}.layer.0.SelfAttention.<q,k,v>"
CROSS = "decoder.block.{0,1}.layer.1.EncDecAttention.<q,k,v>"
CASES = {  # a model's or other names, patterns, and the ties that come of them, each with its members between < and >
    "bert": ("Bert", ("qkv",), ["encoder.layer.{0,1}.attention.self.<query,key,value>"]),
    "llama": ("Llama", ("qkv", "gate_up"), ["layers.{0,1}.self_attn.<q,k,v>_proj", "layers.{0,1}.mlp.<gate,up>_proj"]),
    "over layers": ("Llama", (r"layers\.\d+\.(?=mlp)",), ["layers.<0,1>.mlp.{gate,up,down}_proj"]),
    "t5": ("T5", ("qkv",), [SELF, CROSS]),
    "gated t5": (several("block.{0,1}.{wi_0,wi_1,wo}"), ("gate_up",), ["block.{0,1}.<wi_0,wi_1>"]),
    "distilbert": (several("attention.{q,k,v,out}_lin"), ("qkv",), ["attention.<q,k,v>_lin"]),
    "longformer": (several("self.{query,key,value}{,_global}"), ("qkv",), ["self.<query,key,value>{,_global}"]),
    "diffusers": (several("attn{1,2}.{to_q,to_k,to_v,to_out.0}"), ("qkv",), ["attn{1,2}.<to_q,to_k,to_v>"]),
    "fused beside": ([*several("{cross.q,cross.k,qkv,gate_up}_proj"), "c_attn"], ("qkv",), ["cross.<q,k>_proj"]),
    "qwen-moe": (MOE, ("experts",), ["layers.{0,1}.mlp.experts.<0,3,10>.{gate,up,down}_proj"]),
    "mixtral": (MIXTRAL, ("gate_up", "experts"), [f"layers.0.block_sparse_moe.experts.<0,1,2>.{w}" for w in ("<w1,w3>", "w2")]),
    "switch": (several("{1,3}.experts.expert_{0,1}.{wi,wo}"), ("experts",), ["{1,3}.experts.expert_<0,1>.{wi,wo}"]),
}


@pytest.mark.parametrize(("names", "patterns", "ties"), CASES.values(), ids=CASES)
def test_ties_by_name(names, patterns, ties):
    """Over the projections of one attention, over experts; not over layers, nor what the pattern leaves different."""
    names = names_of(names) if isinstance(names, str) else names
    expected = {frozenset(several(tie.replace("<", "{").replace(">", "}"))) for tie in several(*ties)}
    assert ties_of(names, *patterns) == expected


def test_fused_projections_are_one_group():
    names = names_of("GPTNeoX")
    assert "layers.0.attention.query_key_value" in names
    with pytest.raises(ValueError, match="tied='qkv' matches none of the 8 groups; fused projections are one group already"):
        allocate(names, [[0.5]] * len(names), [1] * len(names), Budget(2, tied=("qkv",)))


def test_a_tie_takes_what_is_best_for_all():
    """The j-th best gates of all members together, as far as the smallest member goes, wherever they lie in each."""
    values = [[0.1, 0.9, 0.5], [0.2, 0.8], [0.6, 0.0, 0.6]]
    by_amount = {3: ((1,), (1,), ()), 9: ((1,), (1,), (0, 2)), 12: ((1, 2), (0, 1), (0, 2)), 15: ((1, 2), (0, 1), (0, 1, 2))}
    for amount, kept in by_amount.items():
        budget = Budget(amount, "parameters", tied=("qkv",))
        assert allocate(["a.q", "a.k", "b.q"], values, [1, 2, 3], budget).kept == kept


def test_limits_by_name():
    """The longest ending that fits holds; the others are free. An ending is whole parts of a name."""
    names = several("layers.{0,1}.{attn.q_proj,attn.kq_proj}")
    values = [[0.9] * 4, [0.8] * 4, [0.1] * 4, [0.2] * 4]
    found = allocate(names, values, [1] * 4, Budget(8, minimum={"q_proj": 1, "layers.1.attn.q_proj": 3}))
    assert found.ranks == (4, 1, 3, 0)
    found = allocate(names, values, [1] * 4, Budget(8, maximum={"q_proj": 0, "0.attn.q_proj": 2}))
    assert found.ranks == (2, 4, 0, 2)


def test_what_is_left_is_explained():
    names, values = several("l.{0,1,2,3}"), [[0.5] * 25] * 4
    assert str(allocate(names, values, [1] * 4, Budget(50))) == "50 of 50 ranks"
    coarse = allocate(names, values, [1] * 4, Budget(60, multiple=8))
    assert str(coarse) == "56 of 60 ranks: 4 left, fewer than the cheapest step of 8"
    assert coarse.ranks == (16, 16, 16, 8)
    wide = allocate(names, values, [1536] * 4, Budget(100_000, "parameters"))
    assert str(wide) == "99,840 of 100,000 parameters: 160 left, fewer than the cheapest step of 1,536"


# what is refused

NAMES = several("layers.0.{q_proj,k_proj,mlp}")
BAD_BUDGETS = [
    ({"amount": 13}, "budget=13: expected 0 to 12 ranks, the capacity of 3 groups; raise r_max or lower the budget"),
    ({"amount": 11, "maximum": 3}, "budget=11: expected 0 to 9 ranks, the capacity"),
    ({"amount": 10, "multiple": 3}, "budget=10: expected 0 to 9 ranks, the capacity"),
    ({"amount": 5, "minimum": 2}, "expected 6 to 12 ranks, the minima of 3 groups; lower the minimum or raise the budget"),
    ({"minimum": {"mlp": 5}}, "minimum=5 of layers.0.mlp: it can have 4 ranks (4 gates, maximum 4, multiple 1); lower"),
    ({"minimum": 3, "maximum": {"mlp": 2}}, "minimum=3 of layers.0.mlp: it can have 2 ranks (4 gates, maximum 2"),
    ({"minimum": 1, "maximum": 3, "multiple": 4}, "q_proj: it can have 0 ranks (4 gates, maximum 3, multiple 4)"),
    ({"tied": ("qkv",), "minimum": {"q_proj": 3}, "maximum": {"k_proj": 2}}, "layers.0.k_proj, tied to it, can have 2 ranks"),
    ({"minimum": {"qproj": 1}}, "minimum names 'qproj', which no group has (did you mean 'q_proj'"),
    ({"maximum": {"proj": 1}}, "maximum names 'proj', which no group has"),
    ({"tied": ("kqv",)}, "tied='kqv' matches none of the 3 groups (did you mean 'qkv'"),
    ({"amount": -1}, "amount=-1: expected an integer >= 0"),
    ({"amount": True}, "amount=True"),
    ({"amount": "3"}, "amount='3': expected an integer >= 0"),
    ({"amont": 3}, "a budget has no field 'amont' (did you mean 'amount'"),
    ({"units": "ranks"}, "a budget has no field 'units' (did you mean 'unit'"),
    ({"unit": "params"}, "unit='params' is not one of 'ranks', 'parameters', 'bytes', 'flops'"),
    ({"objective": "sum"}, "objective='sum' is not one of 'mass', 'count'"),
    ({"multiple": 0}, "multiple=0: expected an integer >= 1"),
    ({"minimum": -1}, "minimum=-1: expected an integer >= 0, or a mapping"),
    ({"minimum": None}, "minimum=None: expected"),
    ({"maximum": {"q": 1.5}}, "maximum={'q': 1.5}: expected"),
    ({"tied": "qkv"}, "tied='qkv': expected a tuple of regular expressions or of 'qkv', 'gate_up', 'experts'"),
    ({"tied": ("(q",)}, "tied='(q' is not a regular expression: "),
]


@pytest.mark.parametrize(("changes", "message"), BAD_BUDGETS, ids=str)
def test_budget_names_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        allocate(NAMES, [[0.5] * 4] * 3, [1] * 3, Budget.from_dict({"amount": 4} | changes))


BAD_VALUES = [
    ([[0.5], [float("nan"), 0.5], [0.5]], [1, 1, 1], "1 gate values are not finite and >= 0, the first nan of layers.0.k_proj"),
    ([[0.5], [], [float("inf")]], [1, 1, 1], "the first inf of layers.0.mlp"),
    ([[0.5], [], torch.tensor([0.5, -0.5])], [1, 1, 1], "the first -0.5 of layers.0.mlp"),
    ([[0.5], torch.ones(2, 2), [0.5]], [1, 1, 1], "values of layers.0.k_proj have shape (2, 2): expected one dimension"),
    ([[0.5], [0.5]], [1, 1, 1], "3 names, 2 groups of values, 3 costs: expected as many of each"),
    ([[0.5]] * 3, [1, 0, 1], "cost of layers.0.k_proj 0: expected an integer >= 1"),
    ([[0.5]] * 3, [1, 1, 1.5], "cost of layers.0.mlp 1.5: expected an integer >= 1"),
    ([[0.5]] * 3, [True, 1, 1], "cost of layers.0.q_proj True"),
    ([[0.5]] * 3, [1, 1, 2**62], "all gates together cost 4,611,686,018,427,387,906: expected less than 2**62"),
]


@pytest.mark.parametrize(("values", "costs", "message"), BAD_VALUES, ids=[message for *_, message in BAD_VALUES])
def test_bad_values_and_costs(values, costs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        allocate(NAMES, values, costs, Budget(1))


def test_budget_as_json():
    """What is written is what is read; fields with a default may be left out of a file written by hand."""
    limits = {"q": 2}
    budget = Budget(331_776, "parameters", limits, 16, 8, ("qkv", r"experts\.\d+"), "count")
    limits["q"] = 9  # a budget is a value
    assert budget.minimum == {"q": 2}
    assert Budget.from_dict(json.loads(json.dumps(budget.to_dict()))) == budget
    assert Budget.from_dict({"amount": 3, "tied": ["qkv"]}) == Budget(3, tied=("qkv",))
    assert Budget.of(3) == Budget(3) and Budget.of(budget) is budget
    with pytest.raises(ValueError, match="a budget needs the field 'amount'"):
        Budget.from_dict({"unit": "ranks"})
