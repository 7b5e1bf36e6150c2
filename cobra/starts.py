"""What the gates and lora_A of every layer start from, by the scores of a calibration."""

from __future__ import annotations

import math

import torch

from cobra.config import CobraConfig
from cobra.linear import CobraLinear
from cobra.prior import fuse, prior_logits
from cobra.scores import LayerScores
from cobra.singular import ROW_NORM
from cobra.sites import Site


def prior_of_gates(
    members: dict[str, list[Site]], ranks: list[int], config: CobraConfig, scores: LayerScores | None
) -> list[tuple[float, ...]]:
    """Prior logits of every group's gates."""
    opened = math.log(config.open_probability / (1 - config.open_probability))
    if scores is None and config.prior_level == "rank":
        raise ValueError("prior_level='rank' reads a calibration: pass scores made with directions=r_max")
    if scores is None:
        return [(opened,) * rank for rank in ranks]
    row = {name: i for i, name in enumerate(scores.sites)}
    rows = [row[name] for name in members]
    if config.prior_level == "group":
        pi = fuse(scores.conductance[rows], scores.gradient[rows], config.fusion)
        logits = prior_logits(pi, config.gamma, config.prior_scale).repeat_interleave(torch.tensor(ranks))
    else:
        demand = [_directions_of(group, rank, scores) for group, rank in zip(members.values(), ranks, strict=True)]
        phi = scores.conductance[rows].repeat_interleave(torch.tensor(ranks))
        logits = prior_logits(fuse(phi, torch.cat(demand), config.fusion), config.gamma, config.prior_scale)
    # in fp32, the logits' own precision, so that the KL starts at exactly 0
    return [tuple(part.float().tolist()) for part in (logits + opened).split(ranks)]


def _directions_of(group: list[Site], rank: int, scores: LayerScores) -> torch.Tensor:
    """(rank,) gradient demand of each gate of a group: the root of Σ σ_k² over its layers."""
    squares = [_directions(site.name, rank, scores).square().sum(1) for site in group]
    return torch.stack(squares).sum(0).sqrt()


def directions_to_start_from(sites: list[Site], config: CobraConfig, scores: LayerScores | None) -> dict[str, torch.Tensor]:
    """Layer -> directions that its lora_A starts from."""
    if config.init == "uniform":
        return {}
    if config.init == "auto":
        kept = {} if scores is None else scores.directions
        return {site.name: kept[site.name] for site in sites if site.name in kept}
    if scores is None:
        raise ValueError("init='gradient' starts from a calibration: pass scores made with directions=r_max")
    return {site.name: _directions(site.name, min(config.r_max, site.in_features, site.out_features), scores) for site in sites}


def _directions(name: str, rank: int, scores: LayerScores) -> torch.Tensor:
    found = scores.directions.get(name)
    if found is None or len(found) < rank:
        kept = 0 if found is None else len(found)
        raise ValueError(
            f"{name}: the scores keep {kept} gradient directions and the config needs {rank}; "
            f"calibrate(..., directions={rank}), or lower r_max"
        )
    return found[:rank]


@torch.no_grad()
def start_from(layer: CobraLinear, directions: torch.Tensor, scale: float) -> None:
    """lora_A's rows along the directions, at `scale` times the length that drawn rows have; rows without a direction stay as
    drawn."""
    rows = directions[: layer.rank].to(layer.lora_A)
    norms = rows.norm(dim=1, keepdim=True)
    unit = rows / norms.clamp(min=torch.finfo(rows.dtype).tiny) * scale * ROW_NORM
    layer.lora_A[: len(rows)] = torch.where(norms > 0, unit, layer.lora_A[: len(rows)])
