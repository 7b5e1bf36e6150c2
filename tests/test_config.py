"""The settings: their choices and ranges, and the temperature they lead to."""

import re

import pytest
from models import attached, layers_of

import cobra
from cobra.config import CHOICES


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_budget": -1}, "rank_budget=-1: expected an integer >= 0"),
        ({"rank_budget": 1.5}, "rank_budget=1.5: expected an integer"),
        ({"rank_budget": True}, "rank_budget=True: expected an integer"),
        ({"r_max": 0}, "r_max=0: expected an integer from 1 to 1024"),
        ({"r_max": 1025}, "r_max=1025"),
        ({"seed": -1}, "seed=-1"),
        ({"dropout": 1.0}, "dropout=1.0: expected at least 0 and below 1"),
        ({"alpha": 0.0}, "alpha=0.0: expected a number greater than 0"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"gate_lr_scale": -1.0}, "gate_lr_scale=-1.0"),
        ({"init_scale": 0.0}, "init_scale=0.0: expected a number greater than 0, or None"),
        ({"lora_B_lr_scale": 0.0}, "lora_B_lr_scale=0.0: expected greater than 0"),
        ({"open_probability": 1.0}, "open_probability=1.0: expected between 0 and 1"),
        ({"temperature": (0.1, 1.0)}, "first >= last > 0"),
        ({"temperature": (1.0, 0.0)}, "first >= last > 0"),
        ({"total_steps": 0}, "total_steps=0: expected an integer greater than 0"),
        (
            {"backend": "triton", "dropout": 0.1},
            "backend='triton' has one input for layer and branch, and dropout=0.1 makes two",
        ),
        ({"alpha": float("inf")}, "alpha=inf: expected a number greater than 0"),
        ({"beta": "0.1"}, "beta='0.1': expected a finite number"),
        ({"temperature": 0.5}, "temperature=0.5: expected (first, last), as (1.0, 0.1)"),
        ({"gate": "hard_concrete", "fold": "mean"}, "a kept gate's mean can be 0; use fold='one'"),
        ({"target_modules": re.compile("query")}, "expected names, or a string (a compiled expression's .pattern)"),
        ({"target_modules": (1, 2)}, "target_modules=(1, 2): expected names"),
        ({"modules_to_save": None}, "modules_to_save=None: expected names"),
        ({"modules_to_save": len}, "modules_to_save takes no function"),
        ({"kl": "concrete", "gate": "mean"}, "kl='concrete' is estimated from a draw of the gates, and gate='mean' has none"),
        ({"total_steps": None}, "gate='concrete' anneals its temperature: pass total_steps"),
        *(({name: "no"}, f"{name}='no' is not one of {choices[0]!r}, ") for name, choices in CHOICES.items()),
    ],
    ids=str,
)
def test_config_names_what_is_wrong(settings, message):
    """A setting out of range is refused where it is written, with the range."""
    with pytest.raises(ValueError, match=re.escape(message)):
        cobra.CobraConfig(**{"rank_budget": 4, "total_steps": 10} | settings)


def test_names_in_any_collection():
    """A set, as in peft's configs, and a generator are tuples that JSON takes."""
    for given in ({"value", "query"}, frozenset(("query", "value")), ["query", "value"], (n for n in ("query", "value"))):
        config = cobra.CobraConfig(4, gate="mean", target_modules=given, modules_to_save={"pooler"})
        assert (config.target_modules, config.modules_to_save) == (("query", "value"), ("pooler",))
    assert cobra.CobraConfig(4, gate="mean", target_modules="all-linear").target_modules == "all-linear"


@pytest.mark.parametrize(
    ("settings", "average_rank", "cut", "basis"),
    [
        ({}, 2.0, True, "gates"),
        ({}, 0.5, True, "singular"),
        ({"gate": "open"}, 2.0, True, "singular"),
        ({"gate": "open"}, 2.0, False, "gates"),
        ({"gate": "open", "basis": "gates"}, 2.0, True, "gates"),
    ],
    ids=str,
)
def test_what_a_cut_ranks(settings, average_rank, cut, basis):
    """Open gates tell no ranks apart: where some have to go, singular directions do."""
    config = cobra.CobraConfig(4, **{"gate": "mean", **settings})
    assert config.resolved(average_rank, cut=cut).basis == basis


def test_temperature_runs_from_the_first_to_the_last():
    """The layers follow the config's schedule, also when all steps are over."""
    _, adapter = attached(temperature=(2.0, 0.5), total_steps=4)
    seen = []
    for _ in range(6):
        seen.append(layers_of(adapter)[0].gate_temperature.item())
        adapter.step()
    assert seen == pytest.approx([2.0, 2**0.5, 1.0, 2**-0.5, 0.5, 0.5])
    assert seen[0] == 2.0 and seen[4] == seen[5] == 0.5
    linear = cobra.CobraConfig(rank_budget=1, total_steps=4, temperature=(2.0, 0.5), anneal="linear")
    assert [linear.temperature_at(step) for step in (0, 1, 2, 4, 9)] == [2.0, 1.625, 1.25, 0.5, 0.5]


def test_the_published_form_is_a_preset():
    """Eqs. 3 and 4 as printed: gamma 5 on pi itself, gates that start at the prior, beta 0.01."""
    paper = cobra.CobraConfig.preset("paper", 12, total_steps=10, r_max=4)
    assert (paper.gamma, paper.prior_scale, paper.open_probability) == (5.0, "literal", 0.5)
    assert (paper.gate, paper.beta, paper.rank_budget, paper.total_steps, paper.r_max) == ("concrete", 0.01, 12, 10, 4)
    assert cobra.CobraConfig.preset("paper", 12, gate="mean").gate == "mean"
    with pytest.raises(ValueError, match="preset='papr' is not one of 'paper', 'singular'"):
        cobra.CobraConfig.preset("papr", 12)


def test_a_cut_in_the_singular_basis_needs_neither_scores_nor_steps():
    """Unlike all forms whose gates or first rows come from the calibration."""
    singular = cobra.CobraConfig.preset("singular", 12, r_max=8)
    assert (singular.gate, singular.basis, singular.init, singular.total_steps) == ("open", "singular", "uniform", None)
    assert not singular.reads_scores
    for change in ({"gate": "mean"}, {"basis": "gates"}, {"init": "gradient"}):
        assert cobra.CobraConfig.preset("singular", 12, **change).reads_scores
