"""The public calibration: what it returns and leaves out, and what it says of bad input."""

from functools import partial

import pytest
import torch
from calibrations import Tokens, assert_equal, calibrate, token_batch
from models import Mlp, Partial, image_batch, minilm, mlp_batch, review_batch, vit
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import cobra
from cobra.path import ESTIMATORS
from cobra.sites import find_sites, fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:the path integral misses")


@pytest.fixture(scope="module")
def model():
    return minilm()


@pytest.fixture(scope="module")
def site_scores(model):
    return calibrate(model, [review_batch()])


def test_scores_describe_themselves(model, site_scores):
    """Every documented field, from the shapes to the definitions of phi, F(x) - F(x0) and the fingerprint."""
    scores, batch = site_scores, review_batch()
    assert scores.sites == tuple(site.name for site in find_sites(model))
    assert scores.members == tuple((name,) for name in scores.sites)
    assert scores.attributions.shape == (4, 37)
    assert scores.attributions.dtype == scores.conductance.dtype == scores.gradient.dtype == torch.float32
    torch.testing.assert_close(scores.conductance, scores.attributions.abs().mean(0))
    assert scores.conductance.min() > 0 and scores.gradient.min() > 0
    torch.testing.assert_close(
        scores.prior, scores.conductance.double() * scores.gradient / (scores.conductance @ scores.gradient)
    )
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with torch.no_grad():
        x, x0 = (model(inputs_embeds=e, attention_mask=batch["attention_mask"]).logits for e in (embeds, 0 * embeds))
    change = (x - x0).gather(1, batch["labels"][:, None]).abs().mean().item()
    assert scores.completeness.change == pytest.approx(change, rel=1e-3)
    assert scores.unused == {} and scores.fingerprint == fingerprint(find_sites(model))
    assert scores.settings == {
        "estimator": "paper",
        "quadrature": "midpoint",
        "steps": 3,
        "baseline": "zero",
        "granularity": "site",
        "examples": 4,
    }


def test_examples_are_pooled_not_batches():
    """However they are batched: attributions are stacked, phi is their mean size, Gamma the root of the mean square."""
    model, (x, y) = Mlp(), mlp_batch(examples=7)
    whole = calibrate(model, [(x, y)])
    assert_equal(calibrate(model, [(x[:3], y[:3]), (x[3:3], y[3:3]), (x[3:], y[3:])]), whole)
    alone = torch.stack([calibrate(model, [(x[i : i + 1], y[i : i + 1])]).gradient for i in range(7)])
    torch.testing.assert_close(whole.gradient, alone.square().mean(0).sqrt())


def test_blocks_pool_their_layers(model, site_scores):
    """A block's attribution is the sum over its layers, and its gradient the norm of all of them together."""
    blocks = calibrate(model, [review_batch()], granularity="block")
    assert blocks.sites == (*(f"bert.encoder.layer.{i}" for i in range(6)), "bert.pooler.dense")
    assert [len(members) for members in blocks.members] == [6] * 6 + [1]
    for g, members in enumerate(blocks.members):
        rows = [site_scores.sites.index(member) for member in members]
        torch.testing.assert_close(blocks.attributions[:, g], site_scores.attributions[:, rows].sum(1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(blocks.gradient[g], site_scores.gradient[rows].square().sum().sqrt())


@pytest.mark.parametrize("max_examples", [1, 4, 6, 7, 100])
def test_max_examples_cuts_inside_a_batch(max_examples):
    """The first of the loader count, exactly, and the loader is asked for no batch that is not needed."""
    model, (x, y) = Mlp(), mlp_batch(examples=9)
    asked = []

    def loader():
        for start in (0, 3, 6):
            asked.append(start)
            yield x[start : start + 3], y[start : start + 3]

    found = calibrate(model, loader(), max_examples=max_examples)
    kept = min(9, max_examples)
    assert_equal(found, calibrate(model, [(x[:kept], y[:kept])]))
    assert asked == [0, 3, 6][: -(-kept // 3)]


def test_masked_examples_do_not_count():
    """Examples without a gold token have nothing to attribute: they dilute no mean and use up no max_examples."""
    model, mixed, masked = Tokens(), token_batch([True, False, True, False]), token_batch([False, False])
    ids, labels = mixed
    expected = calibrate(model, [(ids[[0, 2]], labels[[0, 2]])])
    assert expected.settings["examples"] == 2
    assert_equal(calibrate(model, [masked, mixed]), expected)
    assert_equal(calibrate(model, [masked, mixed, masked], max_examples=3), expected)


def test_masked_examples_do_not_count_for_a_loss_that_does_not_mask():
    """Nor in the gradient's directions."""
    x, labels = mlp_batch(8)
    options = {
        "loss": lambda outputs, batch: outputs.logsumexp(1),
        "target": lambda outputs, batch: outputs.sum(1),
        "directions": 2,
    }
    model, masked = Mlp(), labels.clone()
    masked[5:] = -100
    found, expected = calibrate(model, [(x, masked)], **options), calibrate(model, [(x[:5], labels[:5])], **options)
    assert_equal(found, expected)
    for name, rows in expected.directions.items():
        torch.testing.assert_close(found.directions[name], rows)


def test_masked_examples_do_not_count_inside_the_last_batch():
    """Two of these four rows count, and two are asked for."""
    scores = calibrate(Tokens(), [token_batch([True, False, True, False])], max_examples=2)
    assert scores.settings["examples"] == 2


def test_masked_first_batch_of_a_model_with_its_own_loss(model, site_scores):
    """transformers' mean loss over no labels is NaN, which says nothing against the default loss."""
    masked = review_batch() | {"labels": torch.full((4,), -100)}
    assert_equal(calibrate(model, [masked, review_batch()]), site_scores)


@pytest.mark.parametrize("estimator", ["paper", "conductance", "direct"])
def test_unused_layers_are_reported_not_scored(estimator):
    """A score of 0 would read as "contributes little"; these have none, and a warning says so."""
    with pytest.warns(UserWarning, match="2 layers have no score and get no rank: never .never called., nowhere"):
        scores = calibrate(Partial(), [mlp_batch()], estimator=estimator)
    assert scores.sites == ("up", "mid")
    assert scores.unused == {"never": "never called", "nowhere": "its output reaches no result"}


class Written(nn.Module):
    """On sequences: a layer under a ReLU, and one used twice, where `finish` may write into the second use's output."""

    def __init__(self, finish, inplace: bool = False):
        super().__init__()
        torch.manual_seed(1)
        self.up, self.mix, self.classifier = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.activation, self.finish = nn.ReLU(inplace), finish

    def forward(self, x):
        h = self.activation(self.up(x))
        return self.classifier((torch.tanh(self.mix(h)) + self.finish(self.mix(h * 0.5), x)).mean(1))


def without_first_(h: torch.Tensor) -> torch.Tensor:
    h[..., 0] = 0
    return h


WRITES = {
    "relu": (lambda h, x: F.relu(h), lambda h, x: F.relu_(h)),
    "add": (lambda h, x: h + x, lambda h, x: h.add_(x)),
    "mul": (lambda h, x: h * 0.5, lambda h, x: h.mul_(0.5)),
    "part": (lambda h, x: F.pad(h[..., 1:], (1, 0)), lambda h, x: without_first_(h)),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("write", WRITES)
def test_outputs_written_in_place_count(write, estimator):
    """nn.Linear's output of a sequence is a view, whose history a write moves: the scores are those without writes."""
    plain, inplace = WRITES[write]
    batch = mlp_batch(tokens=4)
    found = calibrate(Written(inplace, inplace=True), [batch], estimator=estimator)
    assert_equal(found, calibrate(Written(plain), [batch], estimator=estimator))
    assert found.unused == {} and found.gradient.min() > 0


@pytest.mark.parametrize("write", WRITES)
def test_undeclared_writes_into_outputs(write):
    """Without a module that declares them: what reads outputs refuses, what reads their copies ("direct") is right."""
    plain, inplace = WRITES[write]
    batch = mlp_batch(tokens=4)
    for estimator in ("paper", "conductance"):
        with pytest.raises(RuntimeError, match="writes in place over the output of mix"):
            calibrate(Written(inplace), [batch], estimator=estimator)
    expected = calibrate(Written(plain), [batch], estimator="direct")
    assert_equal(calibrate(Written(inplace), [batch], estimator="direct"), expected)


class Towers(nn.Module):
    """The path runs through x; the tower over y does not depend on it."""

    main_input_name = "x"

    def __init__(self):
        super().__init__()
        self.up, self.tower, self.classifier = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x, y, labels=None):
        return self.classifier(torch.tanh(self.up(x)) * torch.tanh(self.tower(y)))


@pytest.mark.parametrize("estimator", ["paper", "conductance"])
def test_layers_that_do_not_depend_on_the_path_are_named(estimator):
    """A contribution of 0 that was not measured reads as one that was."""
    torch.manual_seed(0)
    batch = {"x": torch.randn(4, 6), "y": torch.randn(4, 6), "labels": torch.tensor([0, 1, 2, 0])}
    with pytest.warns(
        UserWarning, match="1 layers do not depend on input 'x', which the path runs through: tower; their contr"
    ):
        scores = calibrate(Towers(), [batch], estimator=estimator)
    found = dict(zip(scores.sites, zip(scores.conductance.tolist(), scores.gradient.tolist(), strict=True), strict=True))
    assert found["tower"][0] == 0 < found["tower"][1] and found["up"][0] > 0


def test_within_inference_mode():
    model, batch = Mlp(), mlp_batch()
    with torch.inference_mode():
        found = calibrate(model, [batch])
    assert_equal(found, calibrate(model, [batch]))


def test_a_stream_whose_length_raises():
    """torch's ChainDataset has a __len__ that only sums those of its parts."""

    model, batch = Mlp(), mlp_batch()

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from zip(*batch, strict=True)

    loader = DataLoader(torch.utils.data.ChainDataset([Stream()]), batch_size=5)
    assert_equal(cobra.calibrate(model, loader, steps=3), calibrate(model, [batch]))


@pytest.mark.parametrize(("estimator", "complete"), [("paper", False), ("conductance", False), ("direct", True)])
def test_only_direct_is_complete_across_layers(estimator, complete):
    """The path residual is the quadrature's alone; the sum over sites is F(x) - F(x0) for "direct" and nothing else."""
    completeness = calibrate(Mlp(), [mlp_batch()], steps=15, estimator=estimator, quadrature="lobatto").completeness
    assert completeness.path < 1e-5
    assert (completeness.sites < 1e-5) is complete


def test_no_layer_used_is_an_error():
    with pytest.raises(ValueError, match=r"none of the 2 layers was used.*never \(never called\)"):
        calibrate(Partial(), [mlp_batch()], target_modules=("never", "nowhere"))


def test_a_head_of_zeros_is_named():
    """It hides the layers below: all scores would be 0."""
    model = Mlp()
    nn.init.zeros_(model.classifier.weight)
    with pytest.warns(UserWarning, match=r"no gradient reaches the layers, .* fit or initialise the head first"):
        calibrate(model, [mlp_batch()])


def test_target_and_loss_get_the_loaders_batch():
    """Custom functions see outputs and the batch as the loader gave it, and decide what is scored."""
    model, batch = Mlp(), mlp_batch()

    def target(outputs, pair):
        return outputs.gather(1, pair[1][:, None])[:, 0]

    def loss(outputs, pair):
        return F.cross_entropy(outputs, pair[1], reduction="none")

    default = calibrate(model, [batch])
    assert_equal(calibrate(model, [batch], target=target, loss=loss), default)
    doubled = calibrate(model, [batch], target=lambda *a: 2 * target(*a), loss=lambda *a: 3 * loss(*a))
    torch.testing.assert_close(doubled.attributions, 2 * default.attributions)
    torch.testing.assert_close(doubled.gradient, 3 * default.gradient)


class OwnLoss(Mlp):
    """A model that returns a loss, smoothed or plain, as transformers' models do."""

    def __init__(self, smoothing: float):
        super().__init__()
        self.smoothing = smoothing

    def forward(self, x, labels):
        from transformers.modeling_outputs import SequenceClassifierOutput

        logits = super().forward(x)
        return SequenceClassifierOutput(F.cross_entropy(logits, labels, label_smoothing=self.smoothing), logits)


def test_default_loss_is_checked_against_the_models():
    """A model trained on another loss than the default is noticed; naming the loss settles it."""
    x, labels = mlp_batch()
    loader = [{"x": 5 * x, "labels": labels}]
    calibrate(OwnLoss(0.0), loader)
    model = OwnLoss(0.5)
    with pytest.raises(ValueError, match=r"default per-example loss averages .*, the model's own loss is .*; pass loss="):
        calibrate(model, loader)
    calibrate(model, loader, loss=lambda outputs, batch: F.cross_entropy(outputs.logits, batch["labels"], reduction="none"))


def test_poor_quadrature_is_reported():
    """A path that three points cannot follow gives numbers all the same; the warning is what tells."""
    model, (x, y) = Mlp(), mlp_batch()
    with pytest.warns(UserWarning, match=r"the path integral misses \d+% of F\(x\) - F\(x0\)"):
        scores = calibrate(model, [(100 * x, y)])
    assert scores.completeness.path > 0.05


def steep_tokens() -> nn.Module:
    """Along the path its layer jumps between three points, from whatever baseline."""
    model = Tokens()
    model.up.weight.data *= 100
    return model


@pytest.mark.parametrize(
    ("build", "make_batch", "options", "remedy"),
    [
        (vit, image_batch, {}, "take more steps, or quadrature='lobatto'"),
        (vit, image_batch, {"quadrature": "lobatto"}, "take more steps"),
        (steep_tokens, partial(token_batch, [True] * 4), {"baseline": "mean"}, "take more steps, or quadrature='lobatto'"),
        (
            steep_tokens,
            partial(token_batch, [True] * 4),
            {"quadrature": "lobatto"},
            "compare it with baseline='mean' where a model normalises its embeddings, which is singular at zero; "
            "otherwise take more steps",
        ),
    ],
    ids=["images", "images-lobatto", "tokens-mean", "tokens-lobatto"],
)
def test_advice_against_a_poor_quadrature_can_be_taken(build, make_batch, options, remedy):
    """Images have no mean embedding, and what was asked for already is no advice."""
    with pytest.warns(UserWarning, match="the path integral misses") as caught:
        calibrate(build(), [make_batch()], **options)
    assert str(caught[0].message).split("F(x0): ")[1] == remedy


@pytest.mark.parametrize("baseline", ["zero", "mean", "pad", "tensor"])
def test_baselines_end_the_path_where_they_say(model, baseline):
    """The change is F(x) - F(x0), with x0 the named embedding at every token."""
    batch = review_batch()
    embedding = model.get_input_embeddings()
    weight = embedding.weight.detach()
    x0 = {"zero": 0 * weight[0], "mean": weight.mean(0), "pad": weight[embedding.padding_idx], "tensor": weight[1000]}[baseline]
    x = embedding(batch["input_ids"])
    with torch.no_grad():
        logits = [model(inputs_embeds=e, attention_mask=batch["attention_mask"]).logits for e in (x, x0.expand_as(x))]
    change = (logits[0] - logits[1]).gather(1, batch["labels"][:, None]).abs().mean().item()
    scores = calibrate(model, [batch], steps=1, baseline=x0 if baseline == "tensor" else baseline)
    assert scores.completeness.change == pytest.approx(change, rel=1e-3)
    assert scores.settings["baseline"] == baseline


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "captum"}, "estimator='captum' is not one of paper, conductance, direct"),
        ({"quadrature": "simpson"}, "quadrature='simpson' is not one of midpoint, gausslegendre, trapezoid, lobatto"),
        ({"granularity": "layer"}, "granularity='layer' is not one of site, block"),
        ({"steps": 0}, "steps=0: midpoint needs an integer of at least 1"),
        ({"max_examples": 0}, "max_examples=0: expected at least 1"),
        ({"baseline": "mean"}, "baseline='mean' needs token embeddings; input 0 is torch.float32 and takes 'zero' or a tensor"),
        ({"baseline": "men"}, "baseline='men' is not a tensor or one of zero, mean, pad"),
        ({"target_modules": ("upp",)}, r"'upp' \(did you mean 'up'"),
        ({"target": lambda o, b: o}, r"target must return one value per example, shape \(10,\); it returned \(10, 3\)"),
        ({"target": lambda o, b: o.sum()}, r"target must return one value per example, shape \(10,\); it returned \(\)"),
        ({"target": lambda o, b: 1.0}, r"target must return one value per example, shape \(10,\); it returned float"),
        ({"loss": lambda o, b: o.sum()}, r"loss must return one value per example, shape \(5,\); it returned \(\)"),
        ({"loss": lambda o, b: None}, r"loss must return one value per example, shape \(5,\); it returned NoneType"),
        ({"loss": lambda o, b: o.sum(1) / 0}, "the loss of example 0 in calibration batch 0 is -?inf"),
        ({"target": lambda o, b: torch.zeros(len(o))}, "the target does not depend on the model's input"),
        ({"target": lambda o, b: (o - o).sum(1).sqrt()}, "the conductance of .* is not finite; calibrate in fp32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        calibrate(Mlp(), [mlp_batch()], **options)


def test_padded_batches_of_torchs_own_transformer():
    """Its fast path would give the sites nested tensors where no gradient is asked for."""
    torch.manual_seed(0)

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
            self.layers, self.head = torch.nn.TransformerEncoder(layer, 2), torch.nn.Linear(16, 3)

        def forward(self, x):
            mask = torch.arange(x.shape[1]) > 2
            return self.head(self.layers(x, src_key_padding_mask=mask.expand(len(x), -1))[:, 0])

    before = torch.backends.mha.get_fastpath_enabled()
    batch = torch.randn(3, 5, 16), torch.tensor([0, 1, 2])
    scores = cobra.calibrate(Encoder(), [batch], steps=4, progress=False)
    assert scores.conductance.isfinite().all() and (scores.conductance > 0).any()
    assert torch.backends.mha.get_fastpath_enabled() == before
