"""What scores, plans and merge reports show in a notebook: a line, a table behind it, a data frame, a figure."""

import pytest
import torch
from models import attached, image_batch, stir, vit
from test_merge import small_updates

import cobra


@pytest.fixture(scope="module")
def scores():
    return cobra.calibrate(vit(), [image_batch()], steps=3, progress=False)


@pytest.fixture(scope="module")
def results(scores):
    """One of each, of one model."""
    _, adapter = attached()
    stir(adapter)
    return [scores, adapter.extract(), adapter.merge()]


def test_html_is_the_line_and_the_table(results):
    for result in results:
        html = result._repr_html_()
        assert html.startswith(f"<p>{type(result).__name__}(") and html.count("<details>") == html.count("</pre>") == 1
        assert "vit.layers.1.mlp.fc2" in html


def test_html_is_escaped():
    """A layer's name is anybody's."""
    model = torch.nn.ModuleDict({"<b>": torch.nn.Linear(2, 2), "up": torch.nn.Linear(2, 2)})
    plan = cobra.attach(model, cobra.CobraConfig(2, r_max=2, gate="mean")).extract()
    assert "<b>" in plan.table() and "&lt;b&gt;" in plan._repr_html_() and "<b>" not in plan._repr_html_()


def test_every_result_has_a_row_a_layer_and_a_figure(results, tmp_path):
    for result in results:
        assert len(result.to_dataframe()) == 12
        figure = result.plot(tmp_path / "figure.png")
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG") and figure.axes
        (tmp_path / "figure.png").unlink()


def test_table_of_scores(scores):
    head, *lines = [line.split() for line in scores.table().splitlines()]
    assert head == ["site", "contribution", "gradient", "prior"]
    assert [line[0] for line in lines] == list(scores.sites)
    assert [float(line[1]) for line in lines] == pytest.approx(scores.conductance.tolist(), rel=6e-3)
    assert [float(line[2]) for line in lines] == pytest.approx(scores.gradient.tolist(), rel=6e-3)
    assert sum(float(line[3].rstrip("%")) for line in lines) == pytest.approx(100, abs=0.1)


def test_figure_of_a_merge():
    """A point a layer in each panel; layers that stay unmerged are hollow, and none of them is lost."""
    _, adapter = small_updates()
    report = adapter.merge(tolerance=0.2, above="keep")
    sizes, lost = report.plot().axes
    for axes, values in (
        (sizes, [site.delta_norm / site.weight_norm for site in report.sites]),
        (lost, [site.rounding_loss for site in report.sites]),
    ):
        filled, hollow = (points.get_offsets() for points in axes.collections[1:])
        assert len(filled) == 12 - len(report.kept) and len(hollow) == len(report.kept) > 0
        found = {int(row): value for value, row in [*filled.tolist(), *hollow.tolist()]}
        assert [found[i] for i in range(12)] == pytest.approx(values)
    assert sizes.get_title(loc="left") == f"{12 - len(report.kept)} of 12 layers merged"


def test_figure_of_an_empty_update():
    """Before any training nothing moved, and the figure still opens."""
    _, adapter = attached()
    report = adapter.merge()
    assert all(site.delta_norm == 0 for site in report.sites) and len(report.plot().axes) == 2
