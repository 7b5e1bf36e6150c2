"""The figure of a diagnosis, both factors through the model's depth, and the rows behind it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from cobra.diagnosis import Agreement, Diagnosis
from cobra.report.markup import Table
from cobra.report.names import short_names
from cobra.report.plots.canvas import BLUE, MUTED, VERMILION, finish, name_ticks, new_figure, styled

_ZONES = {"red": VERMILION, "under": BLUE}


@styled
def depth_profile(diagnosis: Diagnosis, path: Path | str | None = None) -> Figure:
    """Share of every layer in contribution and in gradient with 95 % intervals over examples; layers of both zones marked."""
    layers = diagnosis.layers
    G, x = len(layers), np.arange(len(layers))
    names = short_names(layer.name for layer in layers)
    figure, axes = new_figure(min(12.0, max(6.4, 2 + 0.17 * G)), 3.6 + 0.06 * max(map(len, names)))
    for zone, colour in _ZONES.items():
        for i in [i for i, layer in enumerate(layers) if layer.zone == zone]:
            axes.axvspan(i - 0.5, i + 0.5, color=colour, alpha=0.16, linewidth=0)
    for name, colour, label in (
        ("contribution", BLUE, "contribution φ (shaded: ≥ 2 × gradient)"),
        ("gradient", VERMILION, "gradient Γ (shaded: the red zone, ≥ 2 × contribution)"),
    ):
        low, high = np.array([getattr(layer, f"{name}_interval") for layer in layers]).T
        axes.fill_between(x, low, high, color=colour, alpha=0.3, linewidth=0)
        axes.plot(x, [getattr(layer, name) for layer in layers], color=colour, marker="o", markersize=2.5, label=label)
    axes.axhline(1 / G, color=MUTED, linewidth=0.8, linestyle=":")
    name_ticks(axes.xaxis, names, 0)
    axes.tick_params(axis="x", rotation=90)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    axes.set(xlim=(-0.7, G - 0.3), ylim=(0, None), ylabel="share of the sum over layers")
    axes.set_title(
        f"Pearson {_stated(diagnosis.pearson)}, Spearman {_stated(diagnosis.spearman)} over {G} layers; "
        f"95 % over {diagnosis.settings['examples']} examples",
        fontsize=9,
    )
    figure.legend(loc="outside lower left", ncols=2, fontsize=8)
    return finish(figure, path)


def layer_rows(diagnosis: Diagnosis) -> Table:
    """Every layer; what is not known is empty."""
    header = ("layer",)
    for name in ("contribution", "gradient"):
        header += (f"{name} share", f"{name} 95 % from", f"{name} 95 % to")
    rows = [
        (
            *(layer["name"], layer["contribution"], *layer["contribution_interval"]),
            *(layer["gradient"], *layer["gradient_interval"], layer["zone"], layer["certainty"]),
        )
        for layer in diagnosis.to_dict()["layers"]
    ]
    return Table((*header, "zone", "share of resamples that agree on the zone"), rows)


def _stated(agreement: Agreement) -> str:
    if np.isnan(agreement.value):
        return "not defined"
    low, high = agreement.over_examples
    return f"{agreement.value:.2f}" + ("" if np.isnan(low) else f" [{low:.2f}, {high:.2f}]")
