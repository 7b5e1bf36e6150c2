"""What inputs look like along the rows that lora_A starts from: by hand on drawn inputs, and in the committed rows."""

import pytest
import torch

from bench.accuracy import starts


def test_spread_and_constant_share():
    """Inputs that vary twice as much along the first axis as elsewhere, and are 3 on average along the second."""
    x = torch.randn(100_000, 8, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 2
    x[:, 1] += 3
    found = starts.measure(x, torch.eye(8)[:2] * 5)
    # along the directions variances are 4 and 1; along uniform rows their mean over axes
    assert found["spread"] == pytest.approx((2.5 / (11 / 8)) ** 0.5, rel=0.05)
    assert found["constant"] == pytest.approx(0, abs=1e-3) and found["constant_second"] == pytest.approx(0.9, abs=1e-2)
    assert found["slope"] == pytest.approx(2)  # all of the gradient lies in a quarter of the axes
    assert 0.1 < found["constant_uniform"] < 0.7 and found["cosine"] == pytest.approx(0, abs=1e-2)
    assert starts.measure(x, torch.eye(8)[[1, 0]])["cosine"] == pytest.approx(1, abs=1e-2)


def test_committed_rows():
    """One of every task, over all linear layers of MiniLM; a line each."""
    rows = starts.read_rows()
    assert [row["task"] for row in rows] == list(starts.TASKS)
    for row in rows:
        assert len(row["layers"]) == 36 and len({name for name, *_ in row["layers"]}) == 36
        assert sum(spread for _, spread, _ in row["layers"]) / 36 == pytest.approx(row["spread"], abs=1e-3)
        assert all(0 <= cosine <= 1 for *_, cosine in row["layers"])
        assert row["slope"] > 1
    lines = starts.markdown(rows).splitlines()
    assert len(lines) == len(rows) + 2 and len({line.count("|") for line in lines}) == 1
