"""Gradient directions: what a calibration keeps of every layer's mean gradient, and what an adapter makes of it."""

import pytest
import torch
from models import Mlp, mlp_batch

import cobra
from cobra import directions as module
from cobra.directions import GradientSums, top_directions
from cobra.sites import find_sites

pytestmark = pytest.mark.filterwarnings("ignore:the path integral misses")


def scored(model, batches, directions=4, **options) -> cobra.LayerScores:
    return cobra.calibrate(model, batches, steps=3, progress=False, directions=directions, **options)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (1, 6), (6, 1), (6, 6)])
def test_top_directions_are_the_svd(shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    _, values, rows = torch.linalg.svd(G.double(), full_matrices=False)
    found = top_directions(G, 3).double()
    assert found.shape == (min(3, *shape), shape[1])
    torch.testing.assert_close(found.norm(dim=1), values[: len(found)], rtol=1e-5, atol=1e-6)
    cosines = torch.nn.functional.cosine_similarity(found, rows[: len(found)]).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=1e-5, atol=0)


def test_rounding_is_no_direction():
    """A prior or a start made of what fp32 sums leave over would be another one on the next machine."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((40, 24), (24, 40)):
        left, right = torch.randn(shape[0], 2, generator=generator), torch.randn(2, shape[1], generator=generator)
        found = top_directions(left @ right, 5)
        assert found.shape == (5, shape[1]) and found[:2].any(1).all() and not found[2:].any()
    assert not top_directions(torch.zeros(4, 6), 3).any()


def test_a_sketch_has_room_for_the_directions():
    sums = GradientSums(directions=600)
    sums.add(0, torch.randn(1, 700, 650), torch.randn(1, 700, 2100))
    assert top_directions(sums.totals[0], 600).shape == (600, 650)


def test_sums_lie_where_their_tensors_do():
    """Whatever the default device and type are."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            sums = GradientSums()
            sums.add(0, torch.ones(1, 2, 3, device="cpu"), torch.ones(1, 2, 2100, device="cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert (sums.totals[0].device.type, sums.totals[0].dtype) == ("cpu", torch.float32) and sums.totals[0].any()


def test_wide_layers_are_sketched():
    """With 512 of 4,096 rows the strong directions and their strengths are still the gradient's."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(4096, 3, generator=generator), torch.randn(48, 3, generator=generator)
    left, right = torch.linalg.qr(left).Q, torch.linalg.qr(right).Q
    strengths = torch.tensor([9.0, 6.0, 4.0])
    noise = 0.01 * torch.randn(4096, 48, generator=generator)
    G = left * strengths @ right.t() + noise
    sums = GradientSums()
    sums.add(0, torch.eye(48)[None], G.t()[None])  # Σ grad xᵀ = G
    assert sums.totals[0].shape == (module.SKETCH, 48)
    found = top_directions(sums.totals[0], 3)
    torch.testing.assert_close(found.norm(dim=1), strengths, rtol=0.15, atol=0)
    overlap = torch.nn.functional.normalize(found, dim=1) @ right
    assert torch.linalg.svdvals(overlap).min() > 0.99


def test_sums_are_in_full_precision_under_autocast():
    """Of layers that are sketched too."""
    x, grad = torch.randn(2, 3, 5), torch.randn(2, 3, module.EXACT + 1)
    plain, cast = GradientSums(), GradientSums()
    plain.add(0, x, grad)
    with torch.autocast("cpu", torch.bfloat16):
        cast.add(0, x, grad)
    assert torch.equal(cast.totals[0], plain.totals[0])


def test_directions_are_of_the_mean_gradient():
    """Over batches of different sizes, against autograd with weights that train."""
    model, batches = Mlp(), [mlp_batch(5), mlp_batch(3)]
    scores = scored(model, batches)
    loss = sum(torch.nn.functional.cross_entropy(model(x), y, reduction="sum") for x, y in batches) / 8
    for site in find_sites(model):
        if site.name in scores.directions:
            (gradient,) = torch.autograd.grad(loss, site.weight, retain_graph=True)
            torch.testing.assert_close(scores.directions[site.name], top_directions(gradient, 4), rtol=1e-3, atol=1e-6)
    assert scores.directions


def test_directions_survive_the_file_and_are_checked(tmp_path):
    scores = scored(Mlp(), [mlp_batch()])
    scores.save(tmp_path / "scores.safetensors")
    loaded = cobra.LayerScores.load(tmp_path / "scores.safetensors")
    assert loaded.directions.keys() == scores.directions.keys()
    assert all(torch.equal(loaded.directions[name], rows) for name, rows in scores.directions.items())
    name = next(iter(scores.directions))
    scores.directions[name] = scores.directions[name][:, 1:]
    scores.save(tmp_path / "scores.safetensors")
    with pytest.raises(cobra.FormatError, match=f"directions.{name}"):
        cobra.LayerScores.load(tmp_path / "scores.safetensors")
