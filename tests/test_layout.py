"""Where the examples are in what layers see: first, several rows each, or in a dimension in which they cannot be told apart."""

from functools import partial

import pytest
import torch
from calibrations import assert_equal, calibrate
from models import Mlp, mlp_batch
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:the path integral misses")


def test_sequence_first_layers_are_refused():
    """A layer that sees (tokens, batch, features) would mix the examples up."""

    class SequenceFirst(Mlp):
        def forward(self, x):
            return self.classifier(torch.tanh(self.up(x.transpose(0, 1))).mean(0))

    with pytest.raises(ValueError, match=r"up sees a tensor of shape \(7, 5, 6\) in a batch of 5: its first dimension must be"):
        calibrate(SequenceFirst(), [mlp_batch(tokens=7)])
    for examples in (5, 1):  # which divide the tokens, as all points of the path do
        shapes = rf"\(15, {examples}, 10\) in a batch of {examples} and \(15, {2 * examples}, 10\) in one of {2 * examples}"
        with pytest.raises(ValueError, match=rf"up has an output of shape {shapes}: its first dimension must be the batch"):
            calibrate(SequenceFirst(), [mlp_batch(examples, tokens=15)])


class Around(nn.Module):
    """A layer of torch, and others around it; its inputs are (batch, tokens, features)."""

    def __init__(self, layer: nn.Module, batch_first: bool):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.layer, self.classifier = nn.Linear(6, 16), layer, nn.Linear(16, 3)
        self.batch_second = not batch_first
        self.out = nn.Linear(16, 16)

    def forward(self, x):
        h = torch.tanh(self.up(x))
        h = self.layer(h.transpose(0, 1) if self.batch_second else h)
        h = h[0] if isinstance(h, tuple) else h
        return self.classifier(self.out(h.transpose(0, 1) if self.batch_second else h).mean(1))


def around(build, batch_first: bool) -> Around:
    torch.manual_seed(1)
    return Around(build(batch_first=batch_first), batch_first)


@pytest.mark.parametrize("examples", [4, 1])
def test_transformer_layers_with_the_batch_second_are_refused(examples):
    """torch's default; in a sequence that the rows divide the numbers would be wrong and no shape would say so."""
    build = partial(nn.TransformerEncoderLayer, 16, 2, 32, dropout=0.0)
    batch = mlp_batch(examples, tokens=12)
    with pytest.raises(ValueError, match=r"^layer takes its batch in the second dimension, .* make it with batch_first=True"):
        calibrate(around(build, False), [batch])
    expected = calibrate(around(build, True), [batch])
    found = calibrate(around(build, False), [batch], target_modules=("up", "out"))  # the way out that the message names
    kept = [expected.sites.index(name) for name in found.sites]
    assert found.sites == ("up", "out")
    torch.testing.assert_close(found.conductance, expected.conductance[kept])
    torch.testing.assert_close(found.gradient, expected.gradient[kept])


def test_layers_around_one_with_the_batch_second():
    """An LSTM as torch makes it has no linear layers: what sees the batch first is scored as ever."""
    build, batch = partial(nn.LSTM, 16, 16), mlp_batch(4, tokens=12)
    assert_equal(calibrate(around(build, False), [batch]), calibrate(around(build, True), [batch]))


def test_a_layer_between_the_transposes_of_an_attention():
    """The message names the module that the layer's order comes from."""

    class Block(nn.Module):
        def __init__(self, batch_first):
            super().__init__()
            self.attention, self.mlp = nn.MultiheadAttention(16, 2, batch_first=batch_first), nn.Linear(16, 16)

        def forward(self, h):
            return self.mlp(self.attention(h, h, h)[0])

    batch = mlp_batch(4, tokens=12)
    with pytest.raises(ValueError, match=r"^layer.mlp has .*; make layer.attention with batch_first=True, or leave it out"):
        calibrate(around(Block, False), [batch])
    assert "layer.mlp" in calibrate(around(Block, True), [batch]).sites


def test_layers_called_once_an_example_are_refused():
    """They see (tokens, features), which are no examples."""

    class OneByOne(Mlp):
        def forward(self, x):
            return torch.stack([super(OneByOne, self).forward(example).mean(0) for example in x])

    with pytest.raises(ValueError, match=r"up has an output of shape \(15, 10\) in a batch of 5 and \(15, 10\) in one of 10"):
        calibrate(OneByOne(), [mlp_batch(tokens=15)])


@pytest.mark.parametrize("layout", ["flat", "windows"])
def test_more_rows_than_examples(layout):
    """All tokens in one dimension, or windows of them: a multiple of the batch, example by example."""

    class Folded(Mlp):
        def forward(self, x):
            rows = x.reshape(-1, 6) if layout == "flat" else x.reshape(-1, 3, 6)
            return super().forward(rows).reshape(len(x), -1, 3).mean(1)

    batch, folded, plain = mlp_batch(tokens=15), Folded(), Mlp()
    plain.load_state_dict(folded.state_dict())
    for name in ("conductance", "gradient"):
        found, expected = (getattr(calibrate(model, [batch]), name) for model in (folded, plain))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_rows_token_by_token_are_refused():
    """All first tokens, then all second ones: as many rows as example by example, and no shape tells."""

    class InTurn(Mlp):
        def forward(self, x):
            rows = super().forward(x.transpose(0, 1).reshape(-1, 6))
            return rows.reshape(x.shape[1], len(x), 3).mean(0)

    message = r"^up sees the first token of all 5 examples, then the second one, in its 75 rows: those of an example must stand"
    with pytest.raises(ValueError, match=message):
        calibrate(InTurn(), [mlp_batch(tokens=15)])
    with pytest.raises(ValueError, match=message.replace("5 ex", "2 ex").replace("75", "30")):
        calibrate(InTurn(), [mlp_batch(1, tokens=15)])  # points of the path are dealt like examples
    same = mlp_batch(tokens=15)[0][:1, :1].expand(5, 15, 6), torch.zeros(5, dtype=torch.long)
    assert calibrate(InTurn(), [same]).settings["examples"] == 5  # equal tokens are the same in any order
