"""Budgets: the selection is the brute force's, constraints hold together, and what cannot be is refused by name."""

import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import t5
from torch import nn

from cobra import budget as module
from cobra.budget import Allocation, Budget, allocate

LETTERS = ("a.q", "a.k", "b.q", "b.k", "c.q")
eighths = st.integers(0, 8).map(lambda n: n / 8)  # sums of these are exact, so that equal worth is equal


@st.composite
def problems(draw, max_gates: int = 4, kinds=(1, 2, 3, 5, 7)):
    """Names, values, costs, and the constraints of a budget; not all of them can be met."""
    names = LETTERS[: draw(st.integers(1, len(LETTERS)))]
    values = [draw(st.lists(eighths, min_size=0, max_size=max_gates)) for _ in names]
    costs = [draw(st.sampled_from(kinds)) for _ in names]
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
        options.append(
            [
                (
                    worth_of([r] * len(tie), [values[g] for g in tie], [costs[g] for g in tie], budget.objective),
                    r * sum(costs[g] for g in tie),
                    -lateness_of(tie, r, values, costs, budget),
                )
                for r in range(high + 1)
                if r >= low and r % budget.multiple == 0
            ]
        )
    totals = [tuple(map(sum, zip(*chosen, strict=True))) for chosen in itertools.product(*options)]
    if max((spent for _, spent, _ in totals), default=-1) < budget.amount:
        return None
    return max((total for total in totals if total[1] <= budget.amount), default=None)


def check_constraints(names, values, costs, budget, found: Allocation) -> None:
    ranks = found.ranks
    assert found.spent == sum(r * cost for r, cost in zip(ranks, costs, strict=True)) <= budget.amount == found.amount
    assert all(r % budget.multiple == 0 for r in ranks)
    assert all(limit_of(budget.minimum, n, 0) <= r for n, r in zip(names, ranks, strict=True))
    assert all(r <= limit_of(budget.maximum, n, 99) for n, r in zip(names, ranks, strict=True))
    for tie in tied_with(names, budget.tied):
        assert len({ranks[g] for g in tie}) == 1
    for kept, group in zip(found.kept, values, strict=True):
        assert list(kept) == sorted(sorted(range(len(group)), key=lambda k: -group[k])[: len(kept)])
    left = budget.amount - found.spent
    assert left == 0 or left < found.step


@settings(max_examples=300, deadline=None)
@given(problems())
def test_is_the_brute_force(problem):
    """Worth first, then what is spent, then evenness: exact, with every constraint together. What it refuses cannot be met."""
    names, values, costs, budget = problem
    best = brute_force(names, values, costs, budget)
    try:
        found = allocate(names, values, costs, budget)
    except ValueError as error:
        unmatched = any(not any(re.search(p, name) for name in names) for p in budget.tied)
        assert best is None or (unmatched and "matches none" in str(error))
        return
    check_constraints(names, values, costs, budget, found)
    ties = tied_with(names, budget.tied)
    worth = worth_of(found.ranks, values, costs, budget.objective)
    lateness = sum(lateness_of(tie, found.ranks[min(tie)], values, costs, budget) for tie in ties)
    assert (worth, found.spent, -lateness) == best
    assert found.optimal


@settings(max_examples=150, deadline=None)
@given(problems(max_gates=4, kinds=(6, 10, 15, 21)), st.lists(st.floats(0, 1), min_size=20, max_size=20))
def test_is_the_brute_force_on_any_values(problem, floats):
    """Values of full precision, four costs that share no divisor: the same worth but for rounding."""
    names, values, costs, budget = problem
    numbers = iter(floats)
    values = [[next(numbers) for _ in group] for group in values]
    best = brute_force(names, values, costs, budget)
    try:
        found = allocate(names, values, costs, budget)
    except ValueError:
        return
    worth = worth_of(found.ranks, values, costs, budget.objective)
    assert worth == pytest.approx(best[0], rel=1e-13)
    assert found.optimal


def one_list(values, amount: int) -> list[list[int]]:
    """The plain cut: every gate in one list, the best first, equal ones by index and then by group."""
    gates = sorted((-value, k, g) for g, group in enumerate(values) for k, value in enumerate(group))[:amount]
    return [sorted(k for _, k, owner in gates if owner == g) for g in range(len(values))]


groups_of_values = st.lists(st.lists(eighths, min_size=1, max_size=6), min_size=1, max_size=6)


@settings(deadline=None)
@given(groups_of_values, st.data())
def test_ranks_alone_are_the_plain_cut(values, data):
    """Also with ties. A larger budget keeps what a smaller one kept."""
    names, costs = [f"layer.{g}" for g in range(len(values))], [1] * len(values)
    amount = data.draw(st.integers(0, sum(map(len, values))))
    tensors = [torch.tensor(group) for group in values]
    found = allocate(names, tensors, costs, Budget(amount))
    assert [list(kept) for kept in found.kept] == one_list(values, amount)
    assert (found.spent, found.optimal, found) == (amount, True, allocate(names, values, costs, Budget(amount)))
    fewer = allocate(names, tensors, costs, Budget(amount // 2))
    assert all(set(a) <= set(b) for a, b in zip(fewer.kept, found.kept, strict=True))


def test_a_cut_finer_than_fp32_is_seen():
    assert allocate(["a", "b"], [[0.5], [0.5 + 1e-12]], [1, 1], Budget(1)).kept == ((), (0,))


def test_mass_ignores_what_a_gate_costs_and_count_does_not():
    """The same posterior: by mass the wide layer's better gates stay, by count the money goes further on the narrow one."""
    values, costs = [[0.9, 0.8], [0.7, 0.6]], [4, 1]
    assert allocate(["wide", "narrow"], values, costs, Budget(8, "parameters")).ranks == (2, 0)
    assert allocate(["wide", "narrow"], values, costs, Budget(6, "parameters", objective="count")).ranks == (1, 2)


@pytest.mark.parametrize("costs", [(1, 1, 1), (2, 5, 7), (8, 5, 18)])
def test_equal_values_give_even_ranks(costs):
    """Untrained gates favour no layer: ranks differ by what it takes to spend all, and no more."""
    groups = 12
    costs = [costs[g % 3] for g in range(groups)]
    amount = sum(costs) * 8 + 11
    found = allocate([f"l.{g}" for g in range(groups)], [torch.ones(16)] * groups, costs, Budget(amount, "parameters"))
    assert found.spent == amount
    assert max(found.ranks) - min(found.ranks) <= 2


def random_model(groups: int, gates: int, costs, seed: int = 0, levels: int | None = None):
    generator = np.random.default_rng(seed)
    values = generator.random((groups, gates)) if levels is None else generator.integers(0, levels, (groups, gates)) / levels
    return [f"layers.{g}" for g in range(groups)], list(values), [costs[g % len(costs)] for g in range(groups)]


def best_by_table(values, costs, amount: int) -> float:
    """The best worth by dynamic programming over what is spent, one gate after the other: another method altogether."""
    best = np.full(amount + 1, -np.inf)
    best[0] = 0.0
    for group, cost in zip(values, costs, strict=True):
        for value in group:
            if cost <= amount:
                best[cost:] = np.maximum(best[cost:], best[:-cost] + value * cost)
    return float(best.max())


@pytest.mark.parametrize("levels", [None, 1, 3])
@pytest.mark.parametrize(
    "costs", [(32, 59), (8, 5, 18), (61, 97, 131), (61, 97, 131, 149), (41, 43, 61, 67, 71, 97, 131)], ids=str
)
def test_models_are_proven_best(costs, levels):
    """Hundreds of gates and costs up to seven, some of them equal or 0: as a table over every amount says, and proven."""
    names, values, costs = random_model(28, 16, costs, levels=levels)
    for share in (0.06, 0.37, 0.9):
        amount = int(share * 16 * sum(costs))
        found = allocate(names, values, costs, Budget(amount, "parameters"))
        worth = sum(float(group[list(kept)].sum()) * c for group, kept, c in zip(values, found.kept, costs, strict=True))
        assert worth == pytest.approx(best_by_table(values, costs, amount), rel=1e-12)
        assert found.optimal


def test_a_search_that_is_cut_short_claims_nothing(monkeypatch):
    """It still spends until nothing fits, keeps within the budget, and says that it is not proven."""
    monkeypatch.setattr(module, "SEARCHES", ((1, 1),))
    names, values, costs = random_model(30, 20, (4097, 8191, 12289, 16411, 5003))
    amount = sum(costs) * 7
    found = allocate(names, values, costs, Budget(amount, "parameters"))
    assert not found.optimal and str(found).endswith("; the best found, not proven to be the best there is")
    check_constraints(names, [group.tolist() for group in values], costs, Budget(amount, "parameters"), found)
    monkeypatch.undo()
    proven = allocate(names, values, costs, Budget(amount, "parameters"))
    worth = [sum(float(v[list(k)].sum()) * c for v, k, c in zip(values, a.kept, costs, strict=True)) for a in (found, proven)]
    assert proven.optimal and worth[0] < worth[1]


def test_the_same_again_and_from_every_kind_of_values():
    names, values, costs = random_model(9, 12, (6, 10, 15), levels=5)
    budget = Budget(600, "bytes", multiple=2, minimum=2)
    first = allocate(names, values, costs, budget)
    kinds = [
        [v.tolist() for v in values],
        [torch.tensor(v) for v in values],
        [torch.tensor(v, requires_grad=True) for v in values],
    ]
    for kind in [values, *kinds]:
        assert allocate(names, kind, np.array(costs), budget) == first


def test_half_precision_is_read_as_it_is():
    values = [torch.tensor([0.25, 0.75], dtype=torch.bfloat16), torch.tensor([0.5], dtype=torch.float16)]
    assert allocate(["a", "b"], values, [1, 1], Budget(2)).kept == ((1,), (0,))


def test_nothing_to_keep():
    """No groups, groups without gates, an amount of 0."""
    assert allocate([], [], [], Budget(0)) == Allocation((), 0, 0, "ranks", 0, True)
    assert allocate(["a"], [[]], [3], Budget(0, "bytes")).kept == ((),)
    assert allocate(["a"], [[1.0]], [3], Budget(0, "bytes", multiple=4)).kept == ((),)
    assert str(allocate(["a"], [[1.0]], [3], Budget(0, "bytes"))) == "0 of 0 bytes"


# ties and limits by name


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=8))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(
        LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=8)
    )


def neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 8}
    return GPTNeoXModel(GPTNeoXConfig(**sizes))


def experts() -> list[str]:
    """Names as in Qwen-MoE checkpoints: numbered experts, one that is shared, and the router."""
    of = [*(f"experts.{e}" for e in range(11)), "shared_expert"]
    inside = [f"{expert}.{p}_proj" for expert in of for p in ("gate", "up", "down")]
    return [f"model.layers.{l}.mlp.{name}" for l in range(2) for name in ("gate", *inside)]


def ties_of(names: list[str], *patterns: str) -> list[list[str]]:
    """The ties of several groups, told from ranks: what has to be bought together with the one gate that is worth anything."""
    ties = []
    for g, name in enumerate(names):
        values = [[float(g == other)] for other in range(len(names))]
        for amount in range(1, len(names) + 1):
            ranks = allocate(names, values, [1] * len(names), Budget(amount, tied=patterns)).ranks
            if ranks[g]:
                break
        together = list(itertools.compress(names, ranks))
        if len(together) > 1 and together not in ties:
            assert name == together[0]
            ties.append(together)
    return ties


def several(pattern: str) -> list[str]:
    """ "a.{x,y}.b" -> ["a.x.b", "a.y.b"]"""
    if "{" not in pattern:
        return [pattern]
    before, inside, after = re.split(r"[{}]", pattern, maxsplit=2)
    return [name for part in inside.split(",") for name in several(before + part + after)]


T5_LAYERS = [
    *(f"encoder.block.{l}.layer.0.SelfAttention" for l in range(2)),
    *(f"decoder.block.{l}.layer.{a}" for l in range(2) for a in ("0.SelfAttention", "1.EncDecAttention")),
]
EXPERTS = ",".join(map(str, range(11)))
CASES = {
    "bert": (
        lambda: [f"bert.{name}" for name in linear_names(bert())],
        ("qkv",),
        [f"bert.encoder.layer.{l}.attention.self.{{query,key,value}}" for l in range(2)],
    ),
    "llama": (
        lambda: linear_names(llama()),
        ("qkv", "gate_up"),
        [f"layers.{l}.{name}" for l in range(2) for name in ("self_attn.{q,k,v}_proj", "mlp.{gate,up}_proj")],
    ),
    "llama-rows": (
        lambda: linear_names(llama()),
        (r"layers\.\d+\.(?=mlp)",),
        [f"layers.{{0,1}}.mlp.{name}_proj" for name in ("gate", "up", "down")],
    ),
    "t5": (lambda: linear_names(t5()), ("qkv",), [f"{layer}.{{q,k,v}}" for layer in T5_LAYERS]),
    "gated-t5": (
        lambda: several("block.{0,1}.layer.1.DenseReluDense.{wi_0,wi_1,wo}"),
        ("gate_up",),
        [f"block.{l}.layer.1.DenseReluDense.{{wi_0,wi_1}}" for l in range(2)],
    ),
    "distilbert": (lambda: several("layer.0.attention.{q,k,v,out}_lin"), ("qkv",), ["layer.0.attention.{q,k,v}_lin"]),
    "longformer": (
        lambda: several("attention.self.{query,key,value}{,_global}"),
        ("qkv",),
        ["attention.self.{query,key,value}", "attention.self.{query,key,value}_global"],
    ),
    "diffusers": (lambda: several("attn{1,2}.{to_q,to_k,to_v,to_out.0}"), ("qkv",), several("attn{1,2}.to_Q")),
    "a fused layer beside": (
        lambda: [*linear_names(neox()), "cross.q_proj", "cross.k_proj", "qkv_proj", "c_attn", "gate_up_proj"],
        ("qkv",),
        ["cross.{q,k}_proj"],
    ),
    "qwen-moe": (
        experts,
        ("experts",),
        [f"model.layers.{l}.mlp.experts.{{{EXPERTS}}}.{p}_proj" for l in range(2) for p in ("gate", "up", "down")],
    ),
    "mixtral": (
        lambda: several("layers.0.block_sparse_moe.experts.{0,1,2}.{w1,w2,w3}"),
        ("gate_up", "experts"),
        ["layers.0.block_sparse_moe.experts.{0,1,2}.{w1,w3}", "layers.0.block_sparse_moe.experts.{0,1,2}.w2"],
    ),
    "switch": (
        lambda: several("block.{1,3}.layer.1.mlp.experts.expert_{0,1}.{wi,wo}"),
        ("experts",),
        [f"block.{l}.layer.1.mlp.experts.expert_{{0,1}}.{w}" for l in (1, 3) for w in ("wi", "wo")],
    ),
}


@pytest.mark.parametrize(("names", "patterns", "ties"), CASES.values(), ids=CASES)
def test_ties_by_name(names, patterns, ties):
    """Over the projections of one attention, over experts; not over layers, nor what the pattern leaves different."""
    ties = [tie.replace("to_Q", "{to_q,to_k,to_v}") for tie in ties]
    assert sorted(map(sorted, ties_of(names(), *patterns))) == sorted(sorted(several(tie)) for tie in ties)


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

NAMES = ["layers.0.q_proj", "layers.0.k_proj", "layers.0.mlp"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"amount": 13}, "budget=13: expected 0 to 12 ranks, the capacity of 3 groups; raise r_max or lower the budget"),
        ({"amount": 11, "maximum": 3}, "budget=11: expected 0 to 9 ranks, the capacity"),
        ({"amount": 10, "multiple": 3}, "budget=10: expected 0 to 9 ranks, the capacity"),
        (
            {"amount": 5, "minimum": 2},
            "budget=5: expected 6 to 12 ranks, the minima of 3 groups; lower the minimum or raise the budget",
        ),
        (
            {"minimum": {"mlp": 5}},
            "minimum=5 of layers.0.mlp: it can have 4 ranks (4 gates, maximum 4, multiple 1); lower the min",
        ),
        ({"minimum": 3, "maximum": {"mlp": 2}}, "minimum=3 of layers.0.mlp: it can have 2 ranks (4 gates, maximum 2"),
        (
            {"minimum": 1, "maximum": 3, "multiple": 4},
            "minimum=1 of layers.0.q_proj: it can have 0 ranks (4 gates, maximum 3, multiple 4)",
        ),
        (
            {"tied": ("qkv",), "minimum": {"q_proj": 3}, "maximum": {"k_proj": 2}},
            "minimum=3 of layers.0.q_proj: layers.0.k_proj, tied to it, can have 2 ranks",
        ),
        ({"minimum": {"qproj": 1}}, "minimum names 'qproj', which no group has (did you mean 'q_proj'"),
        ({"maximum": {"proj": 1}}, "maximum names 'proj', which no group has"),
        ({"tied": ("kqv",)}, "tied='kqv' matches none of the 3 groups (did you mean 'qkv'"),
        ({"tied": ("experts",)}, "tied='experts' matches none of the 3 groups; fused projections are one group already"),
    ],
    ids=str,
)
def test_budgets_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        allocate(NAMES, [[0.5] * 4] * 3, [1] * 3, Budget(**{"amount": 4} | settings))


@pytest.mark.parametrize(
    ("values", "costs", "message"),
    [
        (
            [[0.5], [float("nan"), 0.5], [0.5]],
            [1, 1, 1],
            "1 gate values are not finite and >= 0, the first nan of layers.0.k_proj",
        ),
        ([[0.5], [], [float("inf")]], [1, 1, 1], "the first inf of layers.0.mlp"),
        ([[0.5], [], torch.tensor([0.5, -0.5])], [1, 1, 1], "the first -0.5 of layers.0.mlp"),
        ([[0.5], torch.ones(2, 2), [0.5]], [1, 1, 1], "values of layers.0.k_proj have shape (2, 2): expected one dimension"),
        ([[0.5], [0.5]], [1, 1, 1], "3 names, 2 groups of values, 3 costs: expected as many of each"),
        ([[0.5]] * 3, [1, 1], "3 names, 3 groups of values, 2 costs"),
        ([[0.5]] * 3, [1, 0, 1], "cost of layers.0.k_proj 0: expected an integer >= 1"),
        ([[0.5]] * 3, [1, 1, 1.5], "cost of layers.0.mlp 1.5: expected an integer >= 1"),
        ([[0.5]] * 3, [True, 1, 1], "cost of layers.0.q_proj True"),
        ([[0.5]] * 3, [1, 1, 2**62], "all gates together cost 4,611,686,018,427,387,906: expected less than 2**62"),
    ],
    ids=str,
)
def test_bad_values_and_costs(values, costs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        allocate(NAMES, values, costs, Budget(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"amount": -1}, "amount=-1: expected an integer >= 0"),
        ({"amount": 1.5}, "amount=1.5"),
        ({"amount": True}, "amount=True"),
        ({"unit": "params"}, "unit='params' is not one of 'ranks', 'parameters', 'bytes', 'flops'"),
        ({"objective": "sum"}, "objective='sum' is not one of 'mass', 'count'"),
        ({"multiple": 0}, "multiple=0: expected an integer >= 1"),
        ({"minimum": -1}, "minimum=-1: expected an integer >= 0, or a mapping"),
        ({"minimum": None}, "minimum=None: expected"),
        ({"maximum": {"q": 1.5}}, "maximum={'q': 1.5}: expected"),
        ({"tied": "qkv"}, "tied='qkv': expected a tuple of regular expressions or of 'qkv', 'gate_up', 'experts'"),
        ({"tied": ("(q",)}, "tied='(q' is not a regular expression: "),
    ],
    ids=str,
)
def test_budget_names_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Budget(**{"amount": 1} | settings)


def test_budget_as_json():
    """What is written is what is read; fields with a default may be left out of a file written by hand."""
    budget = Budget(331_776, "parameters", {"q": 2}, 16, 8, ("qkv", r"experts\.\d+"), "count")
    assert Budget.from_dict(json.loads(json.dumps(budget.to_dict()))) == budget
    assert Budget.from_dict({"amount": 3, "tied": ["qkv"]}) == Budget(3, tied=("qkv",))
    assert Budget.of(3) == Budget(3) and Budget.of(budget) is budget


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"amount": 3, "units": "ranks"}, "a budget has no field 'units' (did you mean 'unit'"),
        ({"amont": 3}, "a budget has no field 'amont' (did you mean 'amount'"),
        ({"unit": "ranks"}, "a budget needs the field 'amount'"),
        ({"amount": "3"}, "amount='3': expected an integer >= 0"),
    ],
    ids=str,
)
def test_bad_json_names_the_field(value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Budget.from_dict(value)


def test_a_mapping_is_copied():
    """A budget is a value: what is done to the mapping afterwards does not reach it."""
    limits = {"q_proj": 1}
    budget = Budget(4, minimum=limits)
    limits["q_proj"] = 9
    assert budget.minimum == {"q_proj": 1}
