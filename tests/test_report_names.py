"""Where each layer stands in a figure."""

import numpy as np
import pytest

from cobra.report.names import grid


@pytest.mark.parametrize(
    ("names", "values", "row_names", "columns"),
    [
        (["h.0.q", "h.0.v", "h.1.q", "h.1.v"], [[0, 1], [2, 3]], ["0", "1"], ["q", "v"]),
        (["enc.h.0.q", "enc.h.0.v", "dec.h.0.q"], [[0, 1], [2, None]], ["enc.0", "dec.0"], ["q", "v"]),
        (["h.0.q", "h.0.v", "pooler"], [[0, 1, None], [None, None, 2]], ["0", "pooler"], ["q", "v", "pooler"]),
        (["up", "mid"], [[0], [1]], ["up", "mid"], [""]),
    ],
    ids=["blocks", "two stacks", "pooler", "list"],
)
def test_grid(names, values, row_names, columns):
    """Every value once, in its block's row and its module's column."""
    found = grid({name: i for i, name in enumerate(names)})
    assert [[None if np.isnan(v) else v for v in row] for row in found.values.tolist()] == values
    assert (found.rows, found.columns) == (row_names, columns)
