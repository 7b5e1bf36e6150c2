"""The methods, each as: what is trained, what every step adds, and what remains at the end.

peft     lora, rslora, dora, loraplus, adalora, eva
COBRA    cobra (cut by gates; whatever the recipe's settings say), cobra+quick (with a quarter of the calibration), cobra+long
         and cobra+long+quick (with longer rows of lora_A), cobra+singular (with those, cut in the singular basis), paper (the
         published form), singular (a cut in the singular basis without gates), plan (ranks from the scores alone, then plain
         LoRA), uniform and random (the same training without scores)
full     every weight of the same linear layers: no peer at an equal budget, but a sign of what rank could bring
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import peft
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import cobra
from bench.accuracy.forms import FITTED, FORMS, UNSAID
from bench.accuracy.recipe import Recipe
from bench.accuracy.variants import Growth, draw_per_example, fit_rows, scale_rows
from cobra.config import PRESETS
from cobra.plan import RankPlan
from cobra.sites import Site, find_sites

SCALING = 2.0
HEAD = "classifier"
PEFT = ("lora", "rslora", "dora", "loraplus", "adalora", "eva")
COBRA = (*FORMS, "paper", "singular", "plan", "uniform", "random")
FULL = "full"
METHODS = (*PEFT, *COBRA, FULL)
CUT = 0.4  # of the steps, after which the gates are cut where a recipe does not say


def _nothing(step: int) -> None:
    pass


@dataclass
class Attached:
    """A model ready to train.

    penalty: added to the loss of every step
    after_step: called after every optimizer step with the number of steps done
    ranks: of every linear layer at the end; parameters: of the matrices that remain
    """

    model: nn.Module
    optimizer: Optimizer
    ranks: Callable[[], dict[str, int]]
    parameters: Callable[[], int]
    penalty: Callable[[], Tensor | float] = lambda: 0.0
    after_step: Callable[[int], None] = _nothing


def attach(recipe: Recipe, model: nn.Module, scores: cobra.LayerScores | None, batches: Callable[[], Sequence]) -> Attached:
    """Puts the recipe's method on the model.

    scores: of the calibration, where the method needs them; batches: training batches, for methods that initialise from data
    """
    if recipe.method in PEFT:
        return _peft(recipe, model, batches)
    if recipe.method in COBRA:
        return _cobra(recipe, model, scores, batches)
    if recipe.method == FULL:
        return _full(recipe, model)
    raise ValueError(f"method={recipe.method!r} is not one of {', '.join(METHODS)}")


def needs_scores(recipe: Recipe) -> bool:
    return recipe.method in COBRA and recipe.options.get("scores", recipe.method not in ("singular", "uniform", "random"))


def directions_needed(recipe: Recipe) -> int:
    """Gradient directions that the calibration must keep of every layer."""
    options = recipe.options
    uses = options.get("init") == "gradient" or options.get("prior_level") == "rank"
    return _gates(recipe) if uses else 0


def _gates(recipe: Recipe) -> int:
    return max(1, round(recipe.options.get("r_max_multiple", 2) * recipe.average_rank))


def budget_parameters(sites: Sequence[Site], average_rank: float) -> int:
    """Parameters of a LoRA of this rank on every site."""
    return round(average_rank * sum(site.in_features + site.out_features for site in sites))


def _peft(recipe: Recipe, model: nn.Module, batches: Callable[[], Sequence]) -> Attached:
    sites, options = find_sites(model), recipe.options
    everywhere = sum(site.in_features + site.out_features for site in sites)
    if "layers" in options:
        sites = [site for site in sites if site.name.endswith(tuple(options["layers"].split(",")))]
    shapes = {site.name: site.in_features + site.out_features for site in sites}
    exact = recipe.average_rank * everywhere / sum(shapes.values())
    rank = round(exact)
    if rank < 1 or abs(exact - rank) > 1e-6:
        given = f"average_rank={recipe.average_rank:g}"
        raise ValueError(f"{given}: {recipe.method} has one whole rank for every layer of its own, not {exact:g}")
    heads = [HEAD] if hasattr(model, HEAD) else None
    scaling = options.get("scaling", SCALING)
    common = {"target_modules": list(shapes), "modules_to_save": heads, "lora_alpha": scaling * rank}
    if recipe.method == "adalora":
        return _adalora(recipe, model, shapes, common, scaling)
    extra = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}}.get(recipe.method, {})
    if recipe.method == "eva":
        extra = {"init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=2.0)}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=rank, **common, **extra))
    if recipe.method == "eva":
        peft.initialize_lora_eva_weights(wrapped, [{k: v for k, v in b.items() if k != "labels"} for b in batches()])
    optimizer = _peft_optimizer(wrapped, recipe.lr, options.get("lr_ratio", 16.0) if recipe.method == "loraplus" else 1.0)

    def ranks() -> dict[str, int]:
        found = wrapped.get_base_model().named_modules()
        return {name: module.r["default"] for name, module in found if name in shapes and hasattr(module, "r")}

    def parameters() -> int:
        return sum(p.numel() for name, p in wrapped.named_parameters() if "lora_" in name)

    return Attached(wrapped, optimizer, ranks, parameters)


def _full(recipe: Recipe, model: nn.Module) -> Attached:
    sites = find_sites(model)
    weights = [model.get_submodule(site.name).weight for site in sites]
    model.requires_grad_(False)
    heads = list(getattr(model, HEAD).parameters()) if hasattr(model, HEAD) else []
    for parameter in (*weights, *heads):
        parameter.requires_grad_()
    optimizer = AdamW([*weights, *heads], recipe.lr, weight_decay=0.0, fused=True)
    ranks = {site.name: min(site.in_features, site.out_features) for site in sites}
    return Attached(model, optimizer, lambda: ranks, lambda: sum(weight.numel() for weight in weights))


def _peft_optimizer(model: nn.Module, lr: float, ratio: float = 1.0) -> Optimizer:
    """AdamW without decay; lora_B at ratio × lr (LoRA+, Hayou et al. 2024)."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if "lora_B" not in n], "lr": lr},
        {"params": [p for n, p in trained if "lora_B" in n], "lr": lr * ratio},
    ]
    return AdamW(groups, lr, weight_decay=0.0, fused=True)


def _adalora(recipe: Recipe, model: nn.Module, shapes: dict[str, int], common: dict, scaling: float) -> Attached:
    """peft's AdaLoRA with its own schedule: initial rank 1.5 × the target, pruned between 10 % and 60 % of the steps.

    Its budget is in ranks; at the last pruning it is lowered until the parameters fit, so that all methods have equal ones.
    """
    rank, steps = int(recipe.average_rank), recipe.steps
    first, last = max(1, round(0.1 * steps)), round(0.4 * steps)
    config = peft.AdaLoraConfig(
        init_r=max(rank + 1, round(1.5 * rank)),
        target_r=rank,
        tinit=first,
        tfinal=last,
        deltaT=max(1, steps // 100),
        total_step=steps,
        orth_reg_weight=recipe.options.get("orth_reg_weight", 0.5),
        **{**common, "lora_alpha": scaling * max(rank + 1, round(1.5 * rank))},
    )
    wrapped = peft.get_peft_model(model, config)
    tuner, allowed = wrapped.base_model, round(recipe.average_rank * sum(shapes.values()))
    optimizer = _peft_optimizer(wrapped, recipe.lr)

    def kept() -> dict[str, int]:
        modules = {n: m for n, m in tuner.model.named_modules() if n in shapes}
        return {name: int((module.lora_E["default"] != 0).sum()) for name, module in modules.items()}

    def cost() -> int:
        return sum(rank * shapes[name] for name, rank in kept().items())

    def after_step(step: int) -> None:
        # counted from 0, as peft's schedule does; gradients must still be there
        allocator = tuner.rankallocator
        if step - 1 == steps - last:
            allocator.update_ipt(tuner.model)
            allocator.mask_to_budget(tuner.model, allocator.target_bgt)
            while cost() > allowed:
                allocator.target_bgt -= 1
                allocator.mask_to_budget(tuner.model, allocator.target_bgt)
            allocator.update_ipt = lambda model: None  # this step's scores are in; once is enough
        tuner.update_and_allocate(step - 1)

    return Attached(wrapped, optimizer, kept, cost, after_step=after_step)


def _cobra(recipe: Recipe, model: nn.Module, scores: cobra.LayerScores | None, batches: Callable[[], Sequence]) -> Attached:
    options = recipe.options
    sites = [s for s in find_sites(model) if scores is None or s.name not in scores.unused]
    amount = budget_parameters(sites, recipe.average_rank)
    worth, least = options.pop("objective", "mass"), options.pop("minimum", 0)
    budget = cobra.Budget(amount, "parameters", minimum=least, objective=worth)
    if recipe.method in ("uniform", "random", "plan"):
        return _fixed(recipe, model, scores, budget)
    if recipe.method == "paper":
        options = {**PRESETS["paper"], "cut": 1.0, **options}
    cut, drawn, rounds = round(options.pop("cut", CUT) * recipe.steps), options.pop("drawn", "step"), options.pop("rounds", 0)
    row_scale = options.pop("row_scale", 1.0)
    adapter = cobra.attach(model, _config(recipe, options, budget, r_max=_gates(recipe), total_steps=cut), scores)
    if row_scale == FITTED:
        fit_rows(adapter, batches())
    else:
        scale_rows(adapter, row_scale)
    if drawn == "example":
        draw_per_example(adapter, recipe.seed)
    growth = Growth(adapter, amount, rounds, cut) if rounds else None
    optimizer = AdamW(adapter.parameter_groups(recipe.lr), fused=True)

    def after_step(step: int) -> None:
        if growth is not None:
            growth.after_step(step)
        optimizer.zero_grad()
        if step == cut:
            plan = adapter.extract()
            adapter.apply(plan if growth is None else _with_ranks(plan, growth.ranks), optimizer)
        adapter.step()

    def ranks() -> dict[str, int]:
        return (adapter.plan or adapter.extract()).ranks

    return Attached(model, optimizer, ranks, adapter.trainable_parameters, adapter.kl_loss, after_step)


def _config(recipe: Recipe, options: dict, budget: cobra.Budget, **given: object) -> cobra.CobraConfig:
    """Of a recipe's settings, but for those that are the harness's own."""
    ours = ("minimum", "r_max_multiple", "scores", "scaling")
    fields = {name: value for name, value in options.items() if name not in ours}
    if "scaling" in options:
        fields["alpha"] = options["scaling"] * max(1.0, recipe.average_rank)
    return cobra.CobraConfig(rank_budget=budget, **{**given, "seed": recipe.seed, **UNSAID, **fields})


def _fixed(recipe: Recipe, model: nn.Module, scores: cobra.LayerScores | None, budget: cobra.Budget) -> Attached:
    """Ranks decided before training, then COBRA's plain LoRA."""
    options = recipe.options
    fusion = options.pop("fusion", "product")
    largest = int(recipe.average_rank) if recipe.method == "uniform" else _gates(recipe)
    adapter = cobra.attach(model, _config(recipe, {"gate": "open", **options}, budget, r_max=largest), scores)
    plan = adapter.extract()
    if recipe.method == "plan":
        plan = _with_ranks(plan, cobra.plan_ranks(scores, budget, r_max=largest, fusion=fusion).ranks)
    elif recipe.method == "random":
        plan = _with_ranks(plan, _random_ranks(plan, budget.amount, largest, recipe.seed))
    adapter.apply(plan)
    optimizer = AdamW(adapter.parameter_groups(recipe.lr), fused=True)
    return Attached(model, optimizer, lambda: plan.ranks, adapter.trainable_parameters, after_step=lambda step: adapter.step())


def _with_ranks(plan: RankPlan, ranks: dict[str, int]) -> RankPlan:
    return replace(plan, sites=tuple(replace(s, kept=tuple(range(ranks[s.members[0]]))) for s in plan.sites))


def _random_ranks(plan: RankPlan, amount: int, largest: int, seed: int) -> dict[str, int]:
    """Ranks dealt one by one to random layers until none fits; again where more than 1 % is then left."""
    drawn, cost = random.Random(seed), {site.name: site.cost for site in plan.sites}
    while True:
        ranks, left = dict.fromkeys(cost, 0), amount
        while open_sites := [n for n in ranks if ranks[n] < largest and cost[n] <= left]:
            name = drawn.choice(open_sites)
            ranks[name], left = ranks[name] + 1, left - cost[name]
        if left <= 0.01 * amount:
            return ranks
