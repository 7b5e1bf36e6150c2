"""COBRA: decides where an adapter's rank belongs, trains it under stochastic rank gates, and merges it away.

    y = x Wᵀ + b + s ((x Aᵀ) ∘ z) Bᵀ

`calibrate` scores layers, `attach` puts gated adapters on them, `Adapter` trains, cuts, merges and exports them.
"""

from cobra._collision import warn_of_collision
from cobra.adapter import Adapter
from cobra.attach import attach
from cobra.budget import Budget
from cobra.calibrate import calibrate
from cobra.config import CobraConfig
from cobra.deploy.serving import ServedAdapters, serve
from cobra.export.load import load_adapter
from cobra.linear import CobraLinear
from cobra.lora import LoraAdapter, combine
from cobra.merge import MergeReport
from cobra.plan import RankPlan, plan_ranks
from cobra.scores import LayerScores
from cobra.storage import FormatError

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Budget",
    "CobraConfig",
    "CobraLinear",
    "FormatError",
    "LayerScores",
    "LoraAdapter",
    "MergeReport",
    "RankPlan",
    "ServedAdapters",
    "attach",
    "calibrate",
    "combine",
    "load_adapter",
    "plan_ranks",
    "serve",
]

warn_of_collision()
