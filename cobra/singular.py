"""The singular directions of an update: what a cut to fewer ranks loses least by.

    scaling lora_B diag(z̄) lora_A = U diag(σ) Vᵀ          z̄ the mean gates, as in evaluation mode

Gates are trained on rows of lora_A as they happen to lie, and what one of them carries another may carry too. In the basis of
the singular directions nothing is carried twice: dropping direction k changes the update by σ_k in Frobenius norm, and of all
updates of a rank the one of the largest σ is nearest (Eckart and Young, 1936). Energies σ² of different layers add up, so that
one selection under one budget says where rank is needed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cobra.distributed import whole
from cobra.linear import CobraLinear

ROW_NORM = 3**-0.5  # of lora_A as it is drawn: the step that an optimizer takes on lora_B depends on it


class Directions(NamedTuple):
    """lora_A (r, K) and lora_B (N, r) whose k-th rank is the k-th singular direction; energy (r,) fp64, the largest first."""

    lora_A: Tensor
    lora_B: Tensor
    energy: Tensor


@torch.no_grad()
def singular_directions(layer: CobraLinear) -> Directions:
    """The update of a layer in its singular basis, in fp64, gates folded in; rows of lora_A at the length of drawn ones. Ranks
    beyond the layer's features are 0.

    Raises ValueError for matrices that are not finite.
    """
    lora_A, lora_B = whole(layer.lora_A).double(), whole(layer.lora_B).double()
    if layer.lora_gate is not None:
        lora_B = lora_B * layer.mean_gates(whole(layer.lora_gate).double())
    if not (lora_A.isfinite().all() and lora_B.isfinite().all()):
        raise ValueError("the update is not finite: the training diverged; lower the learning rate")
    Q_B, R_B = torch.linalg.qr(lora_B)
    Q_A, R_A = torch.linalg.qr(lora_A.t())
    U, sigma, Vt = torch.linalg.svd(R_B @ R_A.t(), full_matrices=False)
    energy = (layer.scaling * sigma).square()
    beyond = layer.rank - len(sigma)
    rows, columns = ROW_NORM * Vt @ Q_A.t(), Q_B @ U * (sigma / ROW_NORM)
    return Directions(F.pad(rows, (0, 0, 0, beyond)), F.pad(columns, (0, beyond)), F.pad(energy, (0, beyond)))
