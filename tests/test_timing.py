"""Alternatives take turns, and are compared round by round."""

import pytest

from cobra.timing import Comparison, Timing, compare


def test_alternatives_take_turns():
    calls: list[str] = []
    found = compare("work", "a", {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=2)
    assert "".join(calls) == "aabb" + "ababab"
    assert [timing.name for timing in found.timings] == ["a", "b"]
    assert all(len(timing.seconds) == 3 and min(timing.seconds) > 0 for timing in found.timings)


def test_rows_compare_round_by_round():
    """A slow round slows both, and its ratio with the rest."""
    timings = (Timing("a", (1.0, 10.0, 2.0)), Timing("b", (1.5, 20.0, 2.0)))
    first, second = Comparison("work", "a", timings).rows()
    assert (first["ratio_low"], first["ratio"], first["ratio_high"]) == (1.0, 1.0, 1.0)
    assert (second["ratio_low"], second["ratio"], second["ratio_high"]) == (1.0, 1.5, 2.0)
    assert second["seconds"] == 2.0 and second["rounds"] == 3 and second["yardstick"] == "a"


def test_what_an_alternative_raises_is_not_timed_away():
    def fails():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        compare("work", "a", {"a": fails}, rounds=1)


def test_counted_work_has_a_rate():
    timings = (Timing("a", (1.0, 2.0, 4.0)), Timing("b", (0.5, 0.5, 0.5)))
    rows = Comparison("work", "a", timings, amount=8.0, unit="B").rows()
    assert [(row["rate"], row["unit"]) for row in rows] == [(4.0, "B/s"), (16.0, "B/s")]
    assert "rate" not in Comparison("work", "a", timings).rows()[0]
