"""What gates and lora_A start from, by the scores: the prior of every group or rank, and rows along the gradient."""

import math

import pytest
import torch
from models import Mlp, attached, image_batch, layers_of, mlp_batch, vit

import cobra
from cobra.prior import fuse

pytestmark = pytest.mark.filterwarnings("ignore:the path integral misses")


def scored(model, batches, directions=4) -> cobra.LayerScores:
    return cobra.calibrate(model, batches, steps=3, progress=False, directions=directions)


def test_gates_beyond_the_gradients_rank_count_as_the_weakest_of_the_others():
    """Two examples of one vector each give every layer two directions: gates 3 and 4 are alike, and not far below."""
    model = Mlp()
    scores = scored(model, [mlp_batch(2)])
    config = cobra.CobraConfig(rank_budget=4, r_max=4, gate="mean", init="gradient", prior_level="rank")
    adapter = cobra.attach(model, config, scores)
    priors = [prior for group in adapter.groups for prior in group.prior]
    for group in adapter.groups:
        assert group.prior[2] == group.prior[3] == min(priors)
    drawn = [layer.lora_A.detach() for layer in layers_of(adapter)]
    assert all(torch.linalg.matrix_rank(lora_A) == 4 for lora_A in drawn)


LENGTHS = [
    ({"basis": "gates"}, 1 / 3),
    ({"basis": "singular"}, 1.0),
    ({"basis": "gates", "init_scale": 1.0}, 1.0),
    ({"basis": "singular", "init_scale": 0.5}, 0.5),
]


@pytest.mark.parametrize("given, scale", LENGTHS, ids=str)
def test_adapters_start_along_the_directions(given, scale):
    """lora_A spans the gradient's leading input directions: at a third of the length that drawn rows have, or at it where
    the cut gives rows that length."""
    model = vit()
    scores = scored(model, [image_batch()])
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=12, r_max=4, gate="open", init="gradient", **given), scores)
    for group, layer in zip(adapter.groups, layers_of(adapter), strict=True):
        rows = scores.directions[group.sites[0].name]
        torch.testing.assert_close(
            layer.lora_A.detach() * 3**0.5 / scale, torch.nn.functional.normalize(rows, dim=1), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("directions", [0, 2, 4])
def test_by_default_rows_start_along_the_directions_that_the_scores_keep(directions):
    """The others are as `init="uniform"` draws them."""
    drawn = {}
    for init in ("auto", "uniform"):
        model = vit()
        scores = scored(model, [image_batch()], directions=directions)
        config = cobra.CobraConfig(rank_budget=12, r_max=4, gate="open", init=init, basis="gates")
        adapter = cobra.attach(model, config, scores)
        drawn[init] = {group.name: group.layers[0][0].lora_A.detach() for group in adapter.groups}
    assert cobra.CobraConfig(rank_budget=12, total_steps=1).init == "auto"
    for name, rows in drawn["auto"].items():
        assert torch.equal(rows[directions:], drawn["uniform"][name][directions:])
        if directions:
            along = torch.nn.functional.normalize(scores.directions[name], dim=1)
            torch.testing.assert_close(rows[:directions] * 3**1.5, along, atol=1e-5, rtol=0)


def test_every_rank_has_its_own_prior():
    model = vit()
    scores = scored(model, [image_batch()])
    config = cobra.CobraConfig(
        rank_budget=12, r_max=4, gate="mean", prior_level="rank", prior_scale="log", gamma=1.0, open_probability=0.8
    )
    adapter = cobra.attach(model, config, scores)
    strengths = torch.stack([scores.directions[group.sites[0].name].norm(dim=1) for group in adapter.groups])
    pi = fuse(scores.conductance[:, None].expand_as(strengths).flatten(), strengths.flatten())
    expected = pi.log() - pi.log().mean() + math.log(4)
    found = torch.tensor([p for group in adapter.groups for p in group.prior], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert adapter.kl_loss().item() == 0
    order = [k for group in adapter.extract().sites for k in group.kept]
    assert all(site.kept == tuple(range(site.rank)) for site in adapter.extract().sites) and order


@pytest.mark.parametrize("settings", [{"init": "gradient"}, {"prior_level": "rank"}], ids=str)
def test_too_few_directions_are_named(settings):
    model = vit()
    scores = scored(model, [image_batch()], directions=2)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"keep 2 gradient directions and the config needs 4; calibrate\(..., directions=4\)"):
        cobra.attach(model, cobra.CobraConfig(rank_budget=12, r_max=4, gate="mean", **settings), scores)
    assert dict(model.named_modules()) == before
    with pytest.raises(ValueError, match="directions=-1"):
        scored(model, [image_batch()], directions=-1)


def test_priors_of_ranks_without_scores_are_refused():
    with pytest.raises(ValueError, match="prior_level='rank' reads a calibration: pass scores"):
        attached(prior_level="rank")


def test_gradient_init_without_scores_is_refused():
    with pytest.raises(ValueError, match="init='gradient' starts from a calibration"):
        attached(init="gradient")
