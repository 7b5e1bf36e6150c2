import pytest
import torch

from cobra_kernels import interpolate_path, interpolate_path_ref

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
ALPHAS = torch.tensor([0.0, 0.01, 0.3, 0.5, 0.7, 0.99, 1.0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3,), (3, 5), (2, 3, 7)], ids=str)
def test_points_are_rounded_once(shape, dtype):
    """Against the line in fp64: the alphas keep their digits beside half-precision inputs."""
    x, baseline = torch.randn(2, *shape).to(dtype)
    points = interpolate_path(x, baseline, ALPHAS)
    a = ALPHAS.double().view(-1, *[1] * len(shape))
    exact = (baseline.double() + a * (x.double() - baseline.double())).flatten(0, 1)
    assert points.dtype == dtype and points.shape == (len(ALPHAS) * shape[0], *shape[1:])
    sums = 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    torch.testing.assert_close(points.double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=sums)
    torch.testing.assert_close(points, interpolate_path_ref(x, baseline, ALPHAS), rtol=torch.finfo(dtype).eps, atol=sums)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_end_points_are_exact(dtype):
    """F(x) - F(x0) is the yardstick of completeness, also where x and x0 differ by orders of magnitude."""
    x, baseline = torch.randn(3, 8).to(dtype), 1e4 * torch.randn(3, 8).to(dtype)
    for start, end in ((baseline, x), (x, baseline)):
        points = interpolate_path(end, start, torch.tensor([0.0, 1.0]))
        assert torch.equal(points, torch.cat((start, end)))


def test_points_are_the_outer_axis():
    points = interpolate_path(torch.ones(3, 2), torch.zeros(3, 2), ALPHAS)
    assert torch.equal(points, ALPHAS.repeat_interleave(3)[:, None].expand(-1, 2))


def test_linear_in_both_ends():
    (x, y), (x0, y0) = torch.randn(2, 2, 3, 5, dtype=torch.float64)
    joint = interpolate_path(2 * x - 3 * y, 2 * x0 - 3 * y0, ALPHAS)
    parts = 2 * interpolate_path(x, x0, ALPHAS) - 3 * interpolate_path(y, y0, ALPHAS)
    torch.testing.assert_close(joint, parts, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (5,), (4, 5), (1, 4, 5)], ids=str)
def test_baseline_broadcasts(shape):
    """One baseline for all examples: zero, or a mean embedding."""
    x, baseline = torch.randn(3, 4, 5), torch.randn(shape)
    assert torch.equal(interpolate_path(x, baseline, ALPHAS), interpolate_path(x, baseline.expand_as(x), ALPHAS))


def test_baseline_that_does_not_broadcast_is_refused():
    with pytest.raises(RuntimeError, match="expand"):
        interpolate_path(torch.ones(3, 5), torch.ones(2, 3, 5), ALPHAS)


def test_strided_inputs():
    x, baseline = torch.randn(5, 3).t(), torch.randn(3, 10)[:, ::2]
    dense = interpolate_path(x.contiguous(), baseline.contiguous(), ALPHAS)
    assert torch.equal(interpolate_path(x, baseline, ALPHAS), dense)


@pytest.mark.parametrize(("examples", "points"), [(0, 3), (2, 0)])
def test_empty(examples, points):
    assert interpolate_path(torch.ones(examples, 5), torch.zeros(5), torch.ones(points)).shape == (examples * points, 5)
