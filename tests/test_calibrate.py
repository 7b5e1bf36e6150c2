"""The public calibration: what it returns and leaves out, and what it says of bad input."""

from functools import partial

import pytest
import torch
from models import Mlp, Partial, gpt2, image_batch, minilm, mlp_batch, review_batch, t5, tokenizer, vit
from models import token_batch as text_batch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import cobra
from cobra import LayerScores
from cobra.path import ESTIMATORS
from cobra.sites import find_sites, fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:the path integral misses")

calibrate = partial(cobra.calibrate, steps=3, progress=False)


@pytest.fixture(scope="module")
def model():
    return minilm()


@pytest.fixture(scope="module")
def site_scores(model):
    return calibrate(model, [review_batch()])


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


# what it returns


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


# bad input


def nan_input():
    x, y = mlp_batch()
    x[2, 0] = float("nan")
    return x, y


X, Y = torch.zeros(2, 6), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], ValueError, "the calibration loader is empty: it yielded no batch"),
        ([(X[:0], Y[:0])], ValueError, "the calibration loader is empty"),
        ([(X, Y - 100 - Y)] * 3, ValueError, r"all labels of the 3 calibration batches are masked \(-100\)"),
        ([mlp_batch(), nan_input()], ValueError, "the loss of example 2 in calibration batch 1 is nan: check its inputs"),
        ([(X, None)], ValueError, "the batch has no tensor 'labels'; add them, or pass target= and loss="),
        ([X], TypeError, r"batch 0 is Tensor; expected a mapping of tensors or an \(inputs, labels\) pair"),
        ([(X, Y), "text"], TypeError, "batch 1 is str; expected a mapping"),
        ([(X, Y, Y)], TypeError, "batch 0 is tuple; expected a mapping"),
        ([{"texts": ["fine", "dull"]}], ValueError, "batch 0 holds no tensors with a batch dimension; wrap .* collate_fn"),
        ([(X[0], 1)], ValueError, "batch 0 looks like one example without a batch dimension; wrap the dataset in a DataLoader"),
        ([(X, Y + 4)], ValueError, "label 4 is out of range: the model has 3 classes .*; correct the labels, which count from"),
        ([{"a": X, "b": X, "labels": Y}], ValueError, r"cannot tell the model's input among \['a', 'b', 'labels'\]"),
        ([(X.long(), Y)], ValueError, "input 0 is torch.int64 and Mlp has no input embeddings .* define get_input_embeddings"),
    ],
    ids=[
        "empty",
        "empty-batches",
        "all-masked",
        "nan",
        "no-labels",
        "tensor",
        "string",
        "triple",
        "texts",
        "row",
        "label",
        "two-inputs",
        "integers",
    ],
)
def test_bad_loader(loader, error, message):
    """The message says which batch, which example, what was found and what was expected."""
    with pytest.raises(error, match=message):
        calibrate(Mlp(), loader)


def rows_of(batch) -> list:
    """A batch as the rows of a dataset."""
    if isinstance(batch, tuple):
        return list(zip(*batch, strict=True))
    return [{key: tensor[i] for key, tensor in batch.items()} for i in range(len(batch["labels"]))]


@pytest.mark.parametrize(
    ("build", "make_batch"),
    [(minilm, review_batch), (gpt2, text_batch), (t5, text_batch), (vit, image_batch), (Mlp, mlp_batch)],
    ids=["minilm", "gpt2", "t5", "vit", "mlp"],
)
def test_rows_in_the_place_of_batches(build, make_batch):
    """A dataset is not a loader: the model would break somewhere inside. In a DataLoader its rows are a batch."""
    model, batch = build(), make_batch()
    rows = rows_of(batch)
    with pytest.raises(ValueError, match="batch 0 looks like one example without a batch dimension; wrap the dataset in a "):
        calibrate(model, rows)
    assert_equal(calibrate(model, DataLoader(rows, batch_size=len(rows))), calibrate(model, [batch]))


def test_rows_without_a_label_in_the_place_of_batches(model):
    """What is scored may be the caller's own; ids of one text are still no batch."""
    rows = [{key: tensor for key, tensor in row.items() if key != "labels"} for row in rows_of(review_batch())]
    own = {"target": lambda outputs, batch: outputs.logits[:, 0], "loss": lambda outputs, batch: outputs.logits.square().sum(1)}
    with pytest.raises(ValueError, match="batch 0 looks like one example without a batch dimension"):
        calibrate(model, rows, **own)


def test_rows_of_lists_in_the_place_of_batches(model, site_scores):
    """As tokenizers make them; the collate_fn that the message names pads them to the batch."""
    from transformers import DataCollatorWithPadding

    batch = review_batch()
    rows = [
        {key: tensor[mask.bool()].tolist() if tensor.ndim else tensor.item() for key, tensor in row.items()}
        for row, mask in zip(rows_of(batch), batch["attention_mask"], strict=True)
    ]
    with pytest.raises(ValueError, match=r"batch 0 holds no tensors with a batch dimension; .* DataCollatorWithPadding"):
        calibrate(model, rows)
    loader = DataLoader(rows, batch_size=4, collate_fn=DataCollatorWithPadding(tokenizer()))
    assert_equal(calibrate(model, loader), site_scores)


def test_examples_of_one_token_are_no_row():
    """A model of one's own may take ids (B,); only those of transformers never do."""
    ids, labels = token_batch([True] * 5)
    assert calibrate(Tokens(), [(ids[:, 1], labels[:, 1])]).settings["examples"] == 5


@pytest.mark.parametrize("label", [5, -1])
@pytest.mark.parametrize(("build", "make_batch"), [(minilm, review_batch), (vit, image_batch)], ids=["minilm", "vit"])
def test_label_without_a_class(build, make_batch, label):
    """Named before the model's own loss breaks over it; one beyond max_examples is not looked at, and -100 is masked."""
    model = build()
    loader = [make_batch() | {"labels": torch.tensor([1, 0, -100, label])}]
    with pytest.raises(ValueError, match=rf"label {label} is out of range: the model has {model.num_labels} classes .and -100"):
        calibrate(model, loader)
    assert calibrate(model, loader, max_examples=2).settings["examples"] == 2


def test_integer_labels_of_a_regression():
    """With one output transformers fits numbers, which are no classes."""
    batch = review_batch() | {"labels": torch.tensor([5, 0, -3, 1])}
    scores = calibrate(
        minilm(labels=1),
        [batch],
        target=lambda outputs, batch: outputs.logits[:, 0],
        loss=lambda outputs, batch: (outputs.logits[:, 0] - batch["labels"]).square(),
    )
    assert scores.settings["examples"] == 4


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
