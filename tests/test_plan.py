"""The plan as a value, as a file, in the words of other trainers, and made from scores alone."""

import json
import re
import reprlib
import warnings

import pytest
import torch
from models import Mlp, gpt2, minilm, review_batch, smollm2, vit

import cobra
from cobra import Budget
from cobra.plan import RankPlan, SitePlan, plan_ranks, rank_cost

PLAN = RankPlan(
    (
        SitePlan("block.0", ("block.0.q", "block.0.k"), 40, (0, 2), (0.75, 0.5, 0.625)),
        SitePlan("block.1", ("block.1.q",), 20, (), (0.25, 0.125)),
    ),
    "mean",
    "0123456789abcdef",
)

FIRST = PLAN.to_dict()["sites"][0]
SECOND = PLAN.to_dict()["sites"][1]


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
    assert all(p == pytest.approx(0.9) for site in plan.sites for p in site.posterior)


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
    "no sites": (written(sites=None), "sites=None: expected a list of objects"),
    "sites that are names": (written(sites=["q"]), r"sites=\['q'\]: expected a list of objects"),
    "a bare site": (written(sites=[{"name": "q"}]), "not a complete rank plan: KeyError\\('members'\\)"),
    "no such gate": (written(sites=[FIRST | {"kept": [0, 3]}]), r"block.0 keeps ranks \(0, 3\) of 3 gates"),
    "a gate twice": (written(sites=[FIRST | {"kept": [1, 1]}]), r"block.0 keeps ranks \(1, 1\) of 3 gates"),
    "unknown fold": (written(fold="max"), "fold='max' is not one of 'one', 'mean'"),
    "nested too deep": ("[" * 100_000, "truncated or foreign file: maximum recursion depth"),
    "a number too long": ("9" * 5_000, "truncated or foreign file: Exceeds the limit"),
}
WRONG_FIELDS = [
    ({"name": None}, "sites[1].name=None: expected a string"),
    ({"members": "q"}, "sites[1].members='q': expected a list of strings"),
    ({"members": [["q"]]}, "sites[1].members=[['q']]: expected a list of strings"),
    ({"members": {"q": 1}}, "sites[1].members={'q': 1}: expected a list of strings"),
    ({"cost": "a"}, "sites[1].cost='a': expected an integer >= 1"),
    ({"cost": 1.5}, "sites[1].cost=1.5: expected an integer >= 1"),
    ({"cost": True}, "sites[1].cost=True: expected an integer >= 1"),
    ({"kept": None}, "sites[1].kept=None: expected a list of integers >= 0"),
    ({"kept": [0.0]}, "sites[1].kept=[0.0]: expected a list of integers >= 0"),
    ({"kept": [False]}, "sites[1].kept=[False]: expected a list of integers >= 0"),
    ({"posterior": ["0.5"]}, "sites[1].posterior=['0.5']: expected a list of numbers from 0 to 1"),
    ({"posterior": [float("nan"), 0.5]}, "sites[1].posterior=[nan, 0.5]: expected a list of numbers from 0 to 1"),
    ({"posterior": [0.5, 2]}, "sites[1].posterior=[0.5, 2]: expected a list of numbers from 0 to 1"),
    ({"energy": [True, 0]}, "sites[1].energy=[True, 0]: expected a list of finite numbers >= 0"),
    ({"energy": [10**400, 0]}, f"sites[1].energy={reprlib.repr([10**400, 0])}: expected a list of finite numbers >= 0"),
    ({"fingerprint": None}, "fingerprint=None: expected a string"),
    ({"provenance": [["source", "gates"]]}, "provenance=[['source', 'gates']]: expected an object"),
    ({"provenance": {"source": []}}, "provenance.source=[]: expected a string"),
    ({"provenance": {"allocation": 3}}, "provenance.allocation=3: expected a string"),
    ({"provenance": {"spent": "3"}}, "provenance.spent='3': expected an integer >= 0"),
    ({"provenance": {"optimal": 1}}, "provenance.optimal=1: expected true or false"),
    ({"provenance": {"budget": 3}}, "provenance.budget=3: expected an object"),
    ({"provenance": {"budget": {"amount": None}}}, "provenance.budget.amount=None: expected an integer >= 0"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused(tmp_path, content, message):
    """A plan decides what is thrown away, so nothing in it is taken on trust. The message names the file."""
    path = tmp_path / "plan.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(cobra.FormatError, match=rf"plan\.json.*{message}"):
        RankPlan.load(path)


@pytest.mark.parametrize(("changes", "message"), WRONG_FIELDS, ids=[message for _, message in WRONG_FIELDS])
def test_fields_of_another_type_are_refused(tmp_path, changes, message):
    """By the reader, which names the file and the field, and not by whatever uses the value first."""
    path = tmp_path / "plan.json"
    of_a_site = changes.keys() <= SECOND.keys()
    path.write_text(written(sites=[FIRST, SECOND | changes]) if of_a_site else written(**changes))
    with pytest.raises(cobra.FormatError, match=re.escape(f"plan.json: {message}") + "$"):
        RankPlan.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        RankPlan.load(tmp_path / "none.json")


CONFIG = cobra.CobraConfig(rank_budget=4, r_max=2, gate="mean", basis="gates")


@pytest.mark.parametrize(
    ("build", "changes", "message"),
    [
        (gpt2, {}, "the plan is of another model: fingerprint"),
        (
            vit,
            {"r_max": 3},
            r"it has 2 gates for \S+q_proj, this one 3; use one r_max for both",
        ),
        (vit, {"granularity": "block"}, "12 groups of gates, this one has 2, or other names; use one granularity"),
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
    with pytest.raises(ValueError, match="cut already"):
        adapter.extract()


def test_rank_cost():
    shapes = [(4, 6), (6, 20)]
    assert [rank_cost(unit, shapes, 2) for unit in ("ranks", "parameters", "bytes", "flops")] == [1, 36, 72, 72]


@pytest.mark.parametrize("unit", ["parameters", "bytes", "flops"])
def test_budget_in_other_units(unit):
    """What the plan says it spends is what the cut adapter has."""
    amount = {"parameters": 2000, "bytes": 8000, "flops": 4000}[unit]
    adapter = cobra.attach(vit(), cobra.CobraConfig(rank_budget=Budget(amount, unit), r_max=4, gate="mean"))
    plan = adapter.extract()
    left = amount - plan.provenance["spent"]
    assert 0 <= left < max(rank_cost(unit, group.shapes) for group in adapter.groups)
    adapter.apply(plan)
    per_parameter = {"parameters": 1, "bytes": 4, "flops": 2}[unit]
    assert plan.provenance["spent"] == per_parameter * adapter.trainable_parameters() == per_parameter * plan.parameters


def test_flops_of_a_shared_weight():
    """Two modules with one weight cost its parameters once, and multiply by it twice."""

    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)
            self.two.weight = self.one.weight

    adapter = cobra.attach(Tied(), cobra.CobraConfig(rank_budget=1, r_max=4, gate="mean"))
    assert adapter.extract(Budget(20, "parameters")).total == 2
    assert adapter.extract(Budget(40, "flops")).total == 1


def test_constraints_reach_the_cut():
    """Query, key and value equal, in multiples of 2, and none without a rank."""
    config = cobra.CobraConfig(rank_budget=Budget(40, minimum=2, multiple=2, tied=("qkv",)), r_max=8, gate="mean")
    adapter = cobra.attach(vit(), config)
    with torch.no_grad():
        for i, group in enumerate(adapter.groups):
            group.gate.add_(torch.linspace(1, -1, 8) * (1 + i % 3))
    plan = adapter.extract()
    assert plan.total == 40 and all(rank >= 2 and rank % 2 == 0 for rank in plan.ranks.values())
    by_block = {}
    for name, rank in plan.ranks.items():
        if name.split(".")[-1] in ("q_proj", "k_proj", "v_proj"):
            by_block.setdefault(name.rsplit(".", 1)[0], set()).add(rank)
    assert len(by_block) == 2 and all(len(ranks) == 1 for ranks in by_block.values())
    adapter.apply(plan)
    assert adapter.plan == plan


@pytest.mark.parametrize("gate", ["mean", "open"])
def test_gates_that_are_all_but_certain_go_by_their_logits(gate):
    """Above 37 every probability is 1 in fp64; what prior and training said of these gates still decides."""
    adapter = cobra.attach(Mlp(), cobra.CobraConfig(rank_budget=4, r_max=4, gate=gate, basis="gates"))
    certain = (torch.tensor([63.1] * 4), torch.tensor([71.6, 80.0, 63.1, 64.0]), torch.full((4,), -63.0))
    for group, logits in zip(adapter.groups, certain, strict=False):
        group.prior = tuple(logits.tolist())
        if group.gate is not None:
            group.gate.data.copy_(logits)
    assert list(adapter.extract(3).ranks.values()) == [0, 3]
    assert adapter.extract(3).sites[1].kept == (0, 1, 3)
    assert adapter.extract(1).sites[1].kept == (1,)


def test_plan_remembers_its_budget(tmp_path):
    plan = cobra.attach(vit(), CONFIG).extract(Budget(1500, "parameters", multiple=2))
    assert Budget.from_dict(plan.provenance["budget"]) == Budget(1500, "parameters", multiple=2)
    assert plan.provenance["source"] == "gates" and plan.provenance["optimal"]
    assert plan.table().splitlines()[-1] == plan.provenance["allocation"]
    plan.save(tmp_path / "plan.json")
    assert RankPlan.load(tmp_path / "plan.json") == plan


def test_dataframe():
    frame = PLAN.to_dataframe()
    assert frame["layer"].tolist() == ["block.0.q", "block.0.k", "block.1.q"]
    assert frame["rank"].tolist() == [2, 2, 0] and frame["gates"].tolist() == [3, 3, 2]
    assert frame["least_kept"].tolist()[:2] == [0.625, 0.625] and frame["least_kept"].isna().tolist() == [False, False, True]


@pytest.fixture(scope="module")
def scores():
    return cobra.calibrate(minilm(), [review_batch()], steps=8, progress=False)


@pytest.mark.filterwarnings("ignore:the path integral misses")
def test_plan_from_scores_is_proportional(scores):
    """Every layer gets its share of the prior, rounded to whole ranks."""
    plan = plan_ranks(scores, 288, r_max=384)
    shares = 288 * scores.prior.double()
    ranks = torch.tensor([site.rank for site in plan.sites], dtype=torch.double)
    assert plan.total == 288 and plan.provenance["source"] == "scores"
    assert ((ranks - shares).abs() < 1.0 + 0.02 * shares).all()
    assert [site.members for site in plan.sites] == list(scores.members)
    assert plan.fingerprint == scores.fingerprint
    assert {row["least_kept"] for row in plan.rows()} == {None} and plan.table().splitlines()[1].split()[2:4] == ["-", "-"]


@pytest.mark.filterwarnings("ignore:the path integral misses")
def test_a_group_with_most_of_the_prior_is_told_of(scores):
    """The pooler, which every output of this head passes through: who it is, what it gets, and what does something about it."""
    said = r"bert\.pooler\.dense has \d\d% of the prior and gets \d+ of 74 ranks: .* maximum={'bert\.pooler\.dense': 2}.*'sum'"
    with pytest.warns(UserWarning, match=said):
        plan = plan_ranks(scores, 74)
    assert scores.prior.max() > 0.5 and plan.ranks["bert.pooler.dense"] > 37
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        limited = plan_ranks(scores, Budget(74, maximum={"bert.pooler.dense": 2}))
        spread = plan_ranks(scores, 74, fusion="sum")
    assert limited.total == 74 and limited.ranks["bert.pooler.dense"] == 2
    assert all(limited.ranks[name] >= rank for name, rank in plan.ranks.items() if name != "bert.pooler.dense")
    assert spread.ranks["bert.pooler.dense"] < 37


@pytest.mark.filterwarnings("ignore:the path integral misses")
def test_plan_first_then_lora(scores):
    """A plan from scores is applied like any other: plain LoRA at its ranks."""
    model = minilm()
    plan = plan_ranks(scores, Budget(100_000, "parameters"), r_max=16)
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=1, r_max=16, gate="open"), scores)
    adapter.apply(plan)
    assert adapter.trainable_parameters() == plan.parameters <= 100_000
    assert 100_000 - plan.parameters < 768 * 2
    assert {name: group.rank for group in adapter.groups for name in [group.name]} == {n: r for n, r in plan.ranks.items() if r}


@pytest.mark.filterwarnings("ignore:the path integral misses")
def test_a_budget_above_what_scores_can_hold(scores):
    with pytest.raises(ValueError, match="capacity"):
        plan_ranks(scores, 100_000, r_max=8)


def some_plan(model) -> RankPlan:
    """Ranks 0 to 3, by layer."""
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=0, r_max=3, gate="mean"))
    plan = adapter.extract()
    adapter.detach()
    sites = [
        SitePlan(s.name, s.members, s.cost, tuple(range(i % 4)), s.posterior) if i % 4 <= len(s.posterior) else s
        for i, s in enumerate(plan.sites)
    ]
    return RankPlan(tuple(sites), plan.fold, plan.fingerprint)


@pytest.mark.parametrize("build", [vit, gpt2, smollm2])
def test_peft_trains_the_ranks_of_a_plan(build):
    """The real peft gives every layer the plan's rank and the scale asked for, and rank 0 none."""
    from peft import get_peft_model

    model = build()
    plan = some_plan(model)
    wrapped = get_peft_model(model, plan.to_peft_config(scaling=1.5, fan_in_fan_out=build is gpt2))
    found = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in wrapped.named_modules()
        if hasattr(module, "lora_A")
    }
    assert found == {name: (rank, 1.5) for name, rank in plan.ranks.items() if rank}


def test_peft_leaves_rank_zero_alone():
    """Where the name of a layer is the end of another one's, which a list of names would train too."""
    from peft import get_peft_model

    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ModuleList([torch.nn.Linear(6, 6), torch.nn.Linear(6, 4)]))
    ranks = {"0": 2, "1.0": 0, "1.1": 1}
    sites = [SitePlan(name, (name,), 12, tuple(range(rank)), (0.5,) * 4) for name, rank in ranks.items()]
    wrapped = get_peft_model(model, RankPlan(tuple(sites), "one", "").to_peft_config()).base_model.model
    found = {name: module.r["default"] for name, module in wrapped.named_modules() if hasattr(module, "lora_A")}
    assert found == {name: rank for name, rank in ranks.items() if rank}


def test_peft_config_is_the_plans():
    with pytest.raises(ValueError, match="rank_pattern follows from the plan"):
        some_plan(vit()).to_peft_config(rank_pattern={})
    with pytest.raises(ValueError, match="keeps no rank"):
        cobra.attach(vit(), CONFIG).extract(0).to_peft_config()


def test_axolotl_keys():
    plan = some_plan(vit())
    keys = plan.to_axolotl(scaling=2.0)
    ranks = {name: rank for name, rank in plan.ranks.items() if rank}
    assert keys["adapter"] == "lora" and keys["lora_r"] == 3 and keys["lora_alpha"] == 6
    assert keys["lora_target_modules"] == list(ranks)
    assert keys["lora_rank_pattern"] == {name: rank for name, rank in ranks.items() if rank < 3}
    assert keys["lora_alpha_pattern"] == {name: 2 * rank for name, rank in ranks.items() if rank < 3}
