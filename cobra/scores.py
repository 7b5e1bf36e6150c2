"""What a calibration found: contribution and gradient of every group, and everything needed to use or check them later."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cobra import storage
from cobra.notebook import folded_table
from cobra.prior import fuse

KIND = "layer scores"
DIRECTIONS = "directions."  # begins the names of these tensors in a file
_SETTINGS = ("estimator", "quadrature", "steps", "baseline", "granularity", "examples")


@dataclass(frozen=True)
class Completeness:
    """How far sums of attributions are from F(x) - F(x0), relative: Σ|residual| / Σ|F(x) - F(x0)| over the examples.

    path: at the entry, where everything passes: the quadrature's own error. For "direct" it equals `sites`.
    sites: the sum over all sites ("direct": and the bypass). Zero is only promised for "direct"; the published claim that
        Eq. (1) sums to F(x) - F(x0) over layers does not hold.
    change: mean |F(x) - F(x0)|
    """

    path: float
    sites: float
    change: float


@dataclass(frozen=True, eq=False)
class LayerScores:
    """Scores of G groups of layers over n calibration examples.

    sites: G names, of single layers or, at block granularity, of blocks
    members: the layers in each group
    shapes: (K, N) of each of those layers
    conductance: (G,) phi, the mean over examples of |A(x)|
    gradient: (G,) Gamma, the root mean square over examples of the gradient norm
    attributions: (n, G) signed A(x), fp32
    completeness: see `Completeness`
    unused: layer -> why it has no score (never called, or no gradient reached it)
    settings: estimator, quadrature, steps, baseline, granularity, examples
    fingerprint: of the model that was calibrated (`cobra.sites.fingerprint`)
    gradient_norms: (n, G) gradient norm of each example, fp32; None in files of releases that did not keep them
    directions: layer -> (q, K), the mean gradient's q leading right singular vectors times their singular values, strongest
        first; empty where the calibration kept none
    """

    sites: tuple[str, ...]
    members: tuple[tuple[str, ...], ...]
    shapes: tuple[tuple[tuple[int, int], ...], ...]
    conductance: Tensor
    gradient: Tensor
    attributions: Tensor
    completeness: Completeness
    unused: dict[str, str]
    settings: dict
    fingerprint: str
    gradient_norms: Tensor | None = None
    directions: dict[str, Tensor] = field(default_factory=dict)

    @property
    def prior(self) -> Tensor:
        """(G,) pi with the product of both factors, COBRA Eq. (2)."""
        return fuse(self.conductance, self.gradient)

    @property
    def correlation(self) -> float:
        """Pearson correlation of conductance and gradient over groups; NaN for a single one."""
        if len(self.sites) == 1:
            return float("nan")
        return torch.corrcoef(torch.stack((self.conductance, self.gradient)))[0, 1].item()

    def save(self, path: Path | str) -> None:
        """Writes one safetensors file, whole or not at all."""
        tensors = {"conductance": self.conductance, "gradient": self.gradient, "attributions": self.attributions}
        if self.gradient_norms is not None:
            tensors["gradient_norms"] = self.gradient_norms
        tensors |= {f"{DIRECTIONS}{name}": rows for name, rows in self.directions.items()}
        meta = {
            "sites": self.sites,
            "members": self.members,
            "shapes": self.shapes,
            "completeness": dataclasses.asdict(self.completeness),
            "unused": self.unused,
            "settings": self.settings,
            "fingerprint": self.fingerprint,
        }
        storage.write_tensors(path, tensors, KIND, meta)

    @classmethod
    def load(cls, path: Path | str) -> LayerScores:
        """Reads what `save` wrote. Raises FileNotFoundError, and FormatError for truncated or foreign files."""
        tensors, meta = storage.read_tensors(path, KIND)
        storage.expect(
            path,
            meta,
            {
                "sites": lambda v: isinstance(v, list) and len(v) > 0,
                "members": lambda v: isinstance(v, list) and len(v) == len(meta["sites"]),
                "shapes": lambda v: isinstance(v, list) and list(map(len, v)) == list(map(len, meta["members"])),
                "completeness": lambda v: isinstance(v, dict) and v.keys() == {"path", "sites", "change"},
                "unused": lambda v: isinstance(v, dict),
                "settings": lambda v: isinstance(v, dict) and v.keys() >= {*_SETTINGS},
                "fingerprint": lambda v: isinstance(v, str),
            },
        )
        groups = len(meta["sites"])
        for name, shape in (("conductance", (groups,)), ("gradient", (groups,)), ("attributions", (None, groups))):
            found = tuple(tensors[name].shape) if name in tensors else None
            if found is None or len(found) != len(shape) or found[-1] != groups:
                raise storage.FormatError(f"{path}: tensor {name!r} should have shape {shape}, found {found}")
        norms = tensors.get("gradient_norms")
        if norms is not None and norms.shape != tensors["attributions"].shape:
            expected = tuple(tensors["attributions"].shape)
            raise storage.FormatError(
                f"{path}: tensor 'gradient_norms' should have shape {expected}, found {tuple(norms.shape)}"
            )
        return cls(
            tuple(meta["sites"]),
            tuple(map(tuple, meta["members"])),
            tuple(tuple(map(tuple, group)) for group in meta["shapes"]),
            tensors["conductance"],
            tensors["gradient"],
            tensors["attributions"],
            Completeness(**meta["completeness"]),
            meta["unused"],
            meta["settings"],
            meta["fingerprint"],
            norms,
            _directions(path, tensors, meta),
        )

    def table(self) -> str:
        """One line a group: contribution φ, gradient Γ, their product's share π."""
        width = max([len(name) for name in self.sites] + [4])
        lines = [f"{'site':<{width}}  contribution  gradient    prior"]
        for name, phi, gamma, pi in zip(
            self.sites, self.conductance.tolist(), self.gradient.tolist(), self.prior.tolist(), strict=True
        ):
            lines.append(f"{name:<{width}}  {phi:>12.3g}  {gamma:>8.3g}  {pi:>7.2%}")
        return "\n".join(lines)

    def to_dataframe(self):
        """One row a group: site, conductance, gradient, prior (needs pandas)."""
        import pandas

        columns = {"conductance": self.conductance, "gradient": self.gradient, "prior": self.prior}
        return pandas.DataFrame({"site": self.sites, **{k: v.numpy() for k, v in columns.items()}})

    def plot(self, path: Path | str | None = None):
        """Gradient against contribution, one point a group, with their correlation (needs matplotlib)."""
        from cobra.report.plots import factor_scatter

        return factor_scatter(self, path)

    def __repr__(self) -> str:
        s = self.settings
        return (
            f"LayerScores({len(self.sites)} {s['granularity']}s, {s['estimator']} over {s['steps']} {s['quadrature']} points, "
            f"{s['examples']} examples, correlation {self.correlation:.2f}, path residual {self.completeness.path:.1%})"
        )

    def _repr_html_(self) -> str:
        return folded_table(self, self.table())


def _directions(path: Path | str, tensors: dict[str, Tensor], meta: dict) -> dict[str, Tensor]:
    """The directions in a file, each checked against its layer's features."""
    found = {name.removeprefix(DIRECTIONS): rows for name, rows in tensors.items() if name.startswith(DIRECTIONS)}
    features: dict[str, int] = {}
    for members, shapes in zip(meta["members"], meta["shapes"], strict=True):
        features |= {name: shape[0] for name, shape in zip(members, shapes, strict=True)}
    for name, rows in found.items():
        if rows.ndim != 2 or rows.shape[1] != features.get(name):
            expected = f"(q, {features[name]})" if name in features else "no such layer"
            raise storage.FormatError(
                f"{path}: tensor {DIRECTIONS + name!r} has shape {tuple(rows.shape)}, expected {expected}"
            )
    return found
