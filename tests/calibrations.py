"""What tests of a calibration share: short paths, a small language model, and what makes two calibrations equal."""

from functools import partial

import torch
from torch import nn

import cobra
from cobra import LayerScores

calibrate = partial(cobra.calibrate, steps=3, progress=False)


class Tokens(nn.Module):
    """A language model of three layers; takes (ids, labels) pairs."""

    def __init__(self):
        super().__init__()
        self.embedding, self.up, self.lm_head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)

    def forward(self, ids):
        h = self.embedding(ids)
        return self.lm_head(h + torch.tanh(self.up(h)))


def token_batch(labelled: list[bool]):
    """Labels at every second token, or nowhere."""
    ids = torch.randint(11, (len(labelled), 5))
    labels = ids.clone()
    labels[:, ::2] = -100
    labels[~torch.tensor(labelled)] = -100
    return ids, labels


def assert_equal(found: LayerScores, expected: LayerScores) -> None:
    for name in ("conductance", "gradient", "attributions"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-6)
    assert found.sites == expected.sites and found.settings == expected.settings
