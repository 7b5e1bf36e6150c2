"""The figures of a run, each a function of what was measured; with a path the figure is written there."""

from cobra.report.plots.evaluation import reliability
from cobra.report.plots.factors import factor_scatter
from cobra.report.plots.gates import gate_probabilities, gate_trajectories
from cobra.report.plots.merge import merge_updates
from cobra.report.plots.prior import prior_posterior
from cobra.report.plots.ranks import rank_heatmap
from cobra.report.plots.training import loss_curves, series_panels

__all__ = [
    "factor_scatter",
    "gate_probabilities",
    "gate_trajectories",
    "loss_curves",
    "merge_updates",
    "prior_posterior",
    "rank_heatmap",
    "reliability",
    "series_panels",
]
