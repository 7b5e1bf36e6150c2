"""The diagnosis against hand-made scores whose answer is known, and against calibrations of a small model."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from models import image_batch, vit

import cobra
from cobra import LayerScores, storage
from cobra.diagnosis import KIND, by_block, diagnose
from cobra.report import measures
from cobra.report.diagnosis import depth_profile, layer_rows
from cobra.resampling import disjoint_parts, weighted_factors
from cobra.scores import Completeness

pytestmark = pytest.mark.filterwarnings("ignore:the path integral misses")

SETTINGS = {
    "estimator": "paper",
    "quadrature": "midpoint",
    "steps": 4,
    "baseline": "zero",
    "granularity": "site",
    "examples": 0,
}


def made(attributions, norms) -> LayerScores:
    """Scores of these (n, G) examples."""
    attributions, norms = torch.as_tensor(attributions).float(), torch.as_tensor(norms).float()
    n, G = attributions.shape
    names = tuple(f"layers.{i}.mlp" for i in range(G))
    return LayerScores(
        names,
        tuple((name,) for name in names),
        (((4, 4),),) * G,
        attributions.abs().mean(0),
        norms.square().mean(0).sqrt(),
        attributions,
        Completeness(0.01, 0.5, 1.0),
        {},
        {**SETTINGS, "examples": n},
        "f",
        norms,
    )


def noisy(n: int, G: int = 40, seed: int = 0) -> LayerScores:
    """The layers' sizes are the same for every seed, their factors strongly correlated."""
    sizes = torch.randn(2, G, generator=torch.Generator().manual_seed(7))
    sizes[1] = 0.95 * sizes[0] + 0.3 * sizes[1]
    generator = torch.Generator().manual_seed(seed)
    return made(*(size.mul(0.6).exp() * torch.randn(n, G, generator=generator) for size in sizes))


def found(scores: LayerScores, draws=(), paths=(), **options):
    return diagnose(scores, draws, paths, model="made", data="numbers", **{"resamples": 200} | options)


def calibrate(steps: int = 4, batch=None, **options) -> LayerScores:
    return cobra.calibrate(vit(), [batch or image_batch(6)], steps=steps, progress=False, **options)


@pytest.fixture(scope="module")
def scores() -> LayerScores:
    return calibrate()


def test_agreement(scores):
    """The same numbers as numpy's, inside their intervals; intervals over layers are the wider ones."""
    result = found(scores)
    expected = np.corrcoef(scores.conductance.double(), scores.gradient.double())[0, 1]
    assert result.pearson.value == pytest.approx(expected)
    ranks = [values.argsort().argsort().double() for values in (scores.conductance, scores.gradient)]
    assert result.spearman.value == pytest.approx(np.corrcoef(*ranks)[0, 1])
    for agreement in (result.pearson, result.spearman):
        (low, high), (least, most) = agreement.over_examples, agreement.over_layers
        assert low < high and least < agreement.value < most and most - least > high - low


def test_interval_narrows_with_examples():
    """Sixteen times the examples, about a quarter of the width."""
    widths = [np.ptp(found(noisy(n)).pearson.over_examples) for n in (16, 256)]
    assert widths[0] / 8 < widths[1] < widths[0] / 2


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_interval_covers(name):
    """The correlation of very many examples lies in most of the intervals of few, though noise takes theirs towards 0."""
    truth = getattr(found(noisy(10000, seed=99), resamples=2), name).value
    agreements = [getattr(found(noisy(24, seed=seed)), name) for seed in range(20)]
    assert np.mean([a.value for a in agreements]) < truth
    assert sum(a.over_examples[0] <= truth <= a.over_examples[1] for a in agreements) >= 14
    assert all(-1 <= low < high <= 1 for low, high in (a.over_examples for a in agreements))


def test_same_seed_same_bounds(scores):
    assert found(scores) == found(scores)
    assert found(scores).pearson.over_examples != found(scores, seed=1).pearson.over_examples


def test_zones():
    """Layer 0 has gradient without contribution, layer 3 the reverse; equal examples leave no doubt about them."""
    result = found(made([[1, 2, 2, -7]] * 5, [[6, 2, 2, 2]] * 5))
    assert [layer.zone for layer in result.layers] == ["red", "", "", "under"]
    assert [layer.certainty for layer in result.layers] == [1.0] * 4
    assert [layer.name for layer in result.zone("red")] == ["layers.0.mlp"]
    red = result.layers[0]
    assert (red.gradient, red.contribution) == pytest.approx((0.5, 1 / 12)) and red.gradient_interval == pytest.approx(
        (0.5, 0.5)
    )
    assert (result.contribution_range, result.gradient_range) == pytest.approx((7, 3))
    lines = result.table().splitlines()
    assert "red zone: gradient ≥ 2 × contribution: 1 of 4" in lines
    assert "  layers.0.mlp: gradient 50.0%, contribution 8.3%, in 100% of resamples" in lines


def test_certainty_of_a_zone_at_its_edge():
    """One of four examples makes the layer red: about a third of the resamples miss it."""
    norms = torch.ones(4, 4)
    norms[0, 0] = 6
    result = found(made(torch.ones(4, 4), norms), resamples=2000)
    assert result.layers[0].zone == "red" and 0.6 < result.layers[0].certainty < 0.75


def test_reported_zones_are_the_scatters(scores):
    """One rule in the table and in the drawing."""
    zones = measures.factors(scores)
    names = {"red": zones.red, "under": zones.under}
    for zone, chosen in names.items():
        assert {layer.name for layer in found(scores).zone(zone)} == {scores.sites[i] for i in chosen}


def test_weighted_examples_are_calibrations(scores):
    """Weights of 1 on an example are a calibration on it alone, equal weights the whole one."""
    x, y = image_batch(6)["pixel_values"], image_batch(6)["labels"]
    one = calibrate(batch={"pixel_values": x[2:3], "labels": y[2:3]})
    contribution, gradient = weighted_factors(scores, np.stack((np.eye(6)[2], np.full(6, 1 / 6))))
    np.testing.assert_allclose(contribution, np.stack((one.conductance, scores.conductance)), rtol=1e-3, atol=1e-8)
    np.testing.assert_allclose(gradient, np.stack((one.gradient, scores.gradient)), rtol=1e-3)


def test_disjoint_parts():
    """Two halves are the whole."""
    scores = noisy(8)
    (x, _), (other, _) = disjoint_parts(scores, 4, np.random.default_rng(0))
    assert not np.allclose(x, other)
    np.testing.assert_allclose((x + other) / 2, scores.conductance, rtol=1e-6)


@pytest.mark.parametrize("norms", [True, False])
def test_by_block(scores, norms):
    """As a calibration by block finds it."""
    expected = calibrate(granularity="block")
    blocks = by_block(scores if norms else dataclasses.replace(scores, gradient_norms=None))
    assert (blocks.sites, blocks.members, blocks.shapes) == (expected.sites, expected.members, expected.shapes)
    assert blocks.settings == expected.settings
    for name in ("conductance", "gradient", "attributions"):
        torch.testing.assert_close(getattr(blocks, name), getattr(expected, name))
    if norms:
        torch.testing.assert_close(blocks.gradient_norms, expected.gradient_norms)


def test_stability(scores):
    """Parts of the examples, other examples, other path points; the gradient knows nothing of the path."""
    others = [calibrate(batch={**image_batch(6), "labels": torch.full((6,), i)}) for i in (1, 2)]
    rows = found(scores, others, [calibrate(steps=8), calibrate(steps=2)]).stability
    assert [(row.what, row.setting, row.pairs) for row in rows] == [
        ("size", 3, 50),
        ("seeds", 6, 3),
        ("points", 2, 1),
        ("points", 8, 1),
    ]
    assert all(-1 <= least <= mean <= 1 for row in rows for mean, least in (row.contribution, row.gradient, row.prior))
    assert rows[2].gradient == rows[3].gradient == pytest.approx((1, 1))
    assert 0.5 < rows[2].contribution[0] < 1
    again = found(scores, [scores]).stability[-1]
    assert again.contribution == again.gradient == again.prior == pytest.approx((1, 1))


def test_scores_without_gradient_norms(scores):
    """A file of an earlier release: what it cannot say is unknown, not invented."""
    result = found(dataclasses.replace(scores, gradient_norms=None))
    assert result.pearson.value == found(scores).pearson.value and np.isfinite(result.pearson.over_layers).all()
    assert np.isnan(result.pearson.over_examples).all() and result.stability == ()
    assert any("calibrate again" in note for note in result.notes)
    assert result.to_dict()["layers"][0]["certainty"] is None
    assert "of resamples" not in result.table() and depth_profile(result) is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {**SETTINGS, "examples": 6, "steps": 5}}, "steps=5, not 4"),
        ({"settings": {**SETTINGS, "examples": 6, "estimator": "direct"}}, "estimator='direct', not 'paper'"),
        ({"fingerprint": "g"}, "another model"),
        ({"conductance": torch.full((12,), float("nan"))}, None),
    ],
)
def test_calibrations_that_do_not_belong_together(change, message):
    scores = noisy(6)
    if message is None:
        with pytest.raises(ValueError, match="not finite"):
            found(dataclasses.replace(scores, **change))
        return
    with pytest.raises(ValueError, match=message):
        found(scores, [dataclasses.replace(scores, **change)])


def test_few_layers_and_one_example():
    """No interval is made of nothing."""
    result = found(made([[1, 2, 3]], [[3, 2, 2]]))
    assert result.pearson.value == pytest.approx(-np.sqrt(3) / 2)
    assert np.isnan(result.pearson.over_layers).all() and np.isnan(result.pearson.over_examples).all()
    assert result.notes == (
        "no intervals over examples: there is one",
        "no intervals over layers: they need 4 layers, there are 3",
    )


def test_one_layer_and_dead_layers():
    single = found(made(torch.ones(3, 1), torch.ones(3, 1)))
    assert single.to_dict()["pearson"]["value"] is None and "–" in single.table()
    dead = found(made([[0, 1, 2, 3]] * 3, [[1, 1, 2, 3]] * 3))
    assert dead.contribution_range == float("inf") and dead.to_dict()["contribution_range"] is None
    assert "∞" in dead.table()


def test_save(scores, tmp_path):
    """JSON that every reader takes, with all of it."""
    result = found(dataclasses.replace(scores, gradient_norms=None), notes=["weights are random"])
    result.save(tmp_path / "new" / "d.json")
    read = storage.read_json(tmp_path / "new" / "d.json", KIND)
    assert {k: v for k, v in read.items() if k not in ("kind", "version")} == json.loads(
        json.dumps(result.to_dict(), allow_nan=False)
    )
    assert read["notes"][0] == "weights are random" and len(read["layers"]) == len(scores.sites)


def test_figure_and_rows(scores, tmp_path):
    """The same bytes for the same diagnosis; a row a layer with every digit."""
    result = found(scores)
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        depth_profile(result, tmp_path / f"a.{kind}")
        depth_profile(result, tmp_path / f"b.{kind}")
        assert (tmp_path / f"a.{kind}").read_bytes().startswith(start)
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    drawing = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert f"Pearson {result.pearson.value:.2f} [" in drawing and "mlp.fc1" in drawing
    rows = list(csv.DictReader(io.StringIO(layer_rows(result).csv().decode())))
    assert [float(row["contribution share"]) for row in rows] == [layer.contribution for layer in result.layers]
    assert sum(float(row["gradient share"]) for row in rows) == pytest.approx(1)
    assert all(float(r["gradient 95 % from"]) <= float(r["gradient share"]) <= float(r["gradient 95 % to"]) for r in rows)
