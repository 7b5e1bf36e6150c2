"""Which layers are sites: heads, ties, shared and foreign modules, and what a wrong name is told."""

import copy
import re
from collections import Counter

import pytest
import torch
from models import minilm
from torch import nn
from torch.nn.utils import prune

import cobra
from cobra.sites import block_of, blocks_of, find_sites, fingerprint, linear_names


@pytest.fixture(scope="module")
def model():
    return minilm()


def names(model, *target) -> list[str]:
    return [site.name for site in find_sites(model, *target)]


def named(**modules: nn.Module) -> nn.Module:
    """A module with the given children."""
    parent = nn.Module()
    for name, module in modules.items():
        parent.add_module(name, module)
    return parent


def weightless() -> nn.Module:
    linear = nn.Linear(1, 2)
    linear.weight = nn.Parameter(torch.zeros(2, 0))
    return linear


class Tied(nn.Module):
    """An embedding that is also the output layer, under a name that says nothing."""

    def __init__(self):
        super().__init__()
        self.tokens, self.up, self.unembed = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.unembed.weight = self.tokens.weight


def test_all_linear_is_all_but_the_head(model):
    """36 linears of six blocks and the pooler, in the model's order; the classifier is trained whole, not adapted."""
    sites = find_sites(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert [site.name for site in sites] == [name for name in linears if name != "classifier"]
    assert len(sites) == 37
    assert all((site.out_features, site.in_features) == site.module.weight.shape for site in sites)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("lm_head", True),
        ("score", True),
        ("classifier", True),
        ("classifier.out_proj", True),
        ("vit.head", True),
        ("heads.3", True),
        ("blocks.0.head", False),
        ("pre_classifier", True),
        ("header", False),
    ],
)
def test_heads_by_name(name, head):
    """A customary name counts at the top of a model; inside a numbered block "head" means something else."""
    leaf = nn.Linear(3, 3)
    for part in reversed(name.split(".")):
        leaf = named(**{part: leaf})
    leaf.add_module("up", nn.Linear(3, 3))
    assert names(leaf) == (["up"] if head else [name, "up"])


def test_heads_by_the_models_own_word():
    """Whatever get_output_embeddings returns is a head, under any name."""
    model = named(up=nn.Linear(3, 3), unembed=nn.Linear(3, 3))
    model.get_output_embeddings = lambda: model.unembed
    assert names(model) == ["up"]


@pytest.mark.parametrize(
    ("target", "count"),
    [
        (r".*\.(query|value)", 12),
        (r"bert\.encoder\.layer\.[01]\..*", 12),
        (("query", "value"), 12),
        (("attention.output.dense",), 6),
        (("output.dense",), 12),
        (("classifier", "bert.pooler.dense"), 2),
        (lambda name, module: module.out_features == 1536, 6),
        (".*", 38),
    ],
    ids=["regex", "regex-layers", "endings", "long-ending", "shared-ending", "full-names", "callable", "everything"],
)
def test_target_modules(model, target, count):
    """A regular expression takes full names, a tuple takes names or their endings at a dot; heads are left out of neither."""
    assert len(find_sites(model, target)) == count


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (("querry",), "'querry' (did you mean 'query'"),
        (("query", "v_proj"), "'v_proj' (did you mean"),
        (("uery",), "'uery' (did you mean 'query'"),
        (r".*\.querry", r"target_modules='.*\\.querry' (a regular expression) matches no linear layer (did you mean"),
        (lambda name, module: False, "target_modules accepted none of the 38 linear layers"),
        ((), "the list is empty"),
        (("embeddings",), "'embeddings' (did you mean"),
    ],
    ids=["typo", "one-of-two", "no-dot", "regex", "callable", "empty", "not-linear"],
)
def test_unknown_targets_name_close_ones(model, target, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        find_sites(model, target)


QUERY = "it must match the full name, such as 'bert.encoder.layer.0.attention.self.query'"


@pytest.mark.parametrize(
    ("target", "message", "written"),
    [
        ("query", f"{QUERY}; write '.*query' or the tuple ('query',)", {".*query": 6, ("query",): 6}),
        ("self.query", f"{QUERY}; write '.*self.query' or the tuple ('self.query',)", {".*self.query": 6, ("self.query",): 6}),
        ("layer.0", f"{QUERY}; write '.*layer.0.*'", {".*layer.0.*": 6}),
        ("bert", f"{QUERY}; write 'bert.*'", {"bert.*": 37}),
        ("query|key", f"{QUERY}; write it between '.*(' and ').*'", {".*(query|key).*": 12}),
        ("querry", "(did you mean '.*query', '.*self.query', '.*key'?)", {".*query": 6, ".*self.query": 6, ".*key": 6}),
    ],
    ids=["ending", "long-ending", "middle", "beginning", "either", "typo"],
)
def test_expressions_for_a_part_of_a_name(model, target, message, written):
    """What the message says to write in their place finds layers as it stands."""
    with pytest.raises(ValueError) as caught:
        find_sites(model, target)
    start = f"target_modules={target!r} (a regular expression) matches no linear layer"
    assert str(caught.value).removeprefix(start).removeprefix(":").strip() == message
    assert {fix: len(find_sites(model, fix)) for fix in written} == written


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3)), "Sequential has no linear layers"),
        (nn.Linear(2, 2), "the model is itself one linear layer; wrap it"),
        (nn.ModuleDict({"lm_head": nn.Linear(2, 2)}), "all-linear leaves out output heads, and no other linear layer is left"),
        (named(up=weightless()), r"up\.weight is empty, shape \(2, 0\)"),
    ],
    ids=["no-linear", "bare-linear", "only-heads", "empty-weight"],
)
def test_nothing_to_adapt(model, message):
    with pytest.raises(ValueError, match=message):
        find_sites(model)


@pytest.mark.parametrize("target", ["all-linear", ("up",)])
def test_integer_weights_are_refused(target):
    """A quantised weight cannot take a merge; the message says how to go on."""
    model = named(up=nn.Linear(3, 3), down=nn.Linear(3, 3))
    model.up.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"up\.weight is torch\.int8.*load the model unquantised or leave the layer out"):
        find_sites(model, target)
    assert names(model, ("down",)) == ["down"]


def test_weights_tied_to_an_embedding():
    """Left out of all-linear; named outright they are refused, for a merge would change the embedding."""
    assert names(Tied()) == ["up"]
    with pytest.raises(ValueError, match=r"unembed\.weight is tied to an embedding"):
        find_sites(Tied(), ("unembed",))


def test_one_weight_is_one_site():
    """A module under two names, and two modules with one weight: one site each, that knows all of its modules."""
    model = named(a=nn.Linear(3, 3), b=nn.Linear(3, 3), c=nn.Linear(3, 3))
    model.again = model.a
    model.c.weight = model.b.weight
    first, second = find_sites(model)
    assert [name for name, _ in first.modules] == ["a", "again"] and first.distinct_modules == [model.a]
    assert [name for name, _ in second.modules] == ["b", "c"] and second.distinct_modules == [model.b, model.c]
    assert [name for name, _ in find_sites(model, ("again",))[0].modules] == ["a", "again"]
    with pytest.raises(ValueError, match="c shares its weight with a target layer"):
        find_sites(model, ("b",))
    computed = named(a=nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=r"a.weight is computed \(a parametrization\)"):
        find_sites(computed)
    pruned = named(a=prune.l1_unstructured(nn.Linear(3, 3), "bias", 1))
    with pytest.raises(ValueError, match=r"a.bias is computed \(a parametrization\)"):
        find_sites(pruned)


@pytest.mark.parametrize("inner", [False, True])
def test_compiled_models_are_refused(inner):
    """Their names begin with _orig_mod, under which an adapter would load nowhere; compile() in place changes none."""
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 3))
    model.compile(backend="eager")
    assert names(model) == ["0.0", "1"]
    if inner:
        model[0] = torch.compile(model[0], backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    said = f"{'0' if inner else 'the model'} is wrapped by torch.compile; give COBRA the model itself, and compile it after"
    with pytest.raises(ValueError, match=said):
        find_sites(model)
    with pytest.raises(ValueError, match=said):
        cobra.calibrate(model, [(torch.ones(2, 3), torch.ones(2).long())], progress=False)
    with pytest.raises(ValueError, match=said):
        cobra.attach(model, cobra.CobraConfig(rank_budget=2, gate="mean"))


def test_modules_that_are_not_called():
    """nn.MultiheadAttention reads out_proj's weight and never calls it: an adapter there would do nothing."""
    assert names(nn.TransformerEncoderLayer(8, 2, 16)) == ["linear1", "linear2"]


def test_linears_with_another_forward():
    """A subclass that only adds to nn.Linear is a site; one that computes something else is not."""

    class Named(nn.Linear):
        pass

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert names(named(a=Named(3, 3), b=Scaled(3, 3))) == ["a"]


def test_conv1d():
    """transformers' Conv1D keeps W as (K, N); a site shows it as (N, K), without a copy."""
    from transformers.pytorch_utils import Conv1D

    (site,) = find_sites(named(up=Conv1D(5, 3)))
    assert (site.in_features, site.out_features) == (3, 5)
    assert site.weight.shape == (5, 3) and site.weight.data_ptr() == site.module.weight.data_ptr()


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("bert.encoder.layer.3.attention.self.query", "bert.encoder.layer.3"),
        ("model.layers.10.mlp.experts.7.w1", "model.layers.10"),
        ("transformer.h.0", "transformer.h.0"),
        ("3.up", "3"),
        ("bert.pooler.dense", "bert.pooler.dense"),
        ("layer3.fc1", "layer3.fc1"),
        ("v2.layers.1.up", "v2.layers.1"),
    ],
)
def test_block_of(name, block):
    assert block_of(name) == block


@pytest.mark.parametrize(
    ("names", "blocks"),
    [
        (["0.layers.0.q", "0.layers.1.q", "0.pooler"], ["0.layers.0", "0.layers.1", "0.pooler"]),
        (["0.0.h.4.q", "0.0.h.4.k"], ["0.0.h.4", "0.0.h.4"]),
        (["0.q", "0.k"], ["0", "0"]),
        (["0.up", "2"], ["0", "2"]),
        (["layers.0.experts.1.up", "layers.0.experts.2.up"], ["layers.0", "layers.0"]),
        (["0.h.0.q", "0.h.0.up", "0.h.1.q", "0.h.1.up", "2"], ["0.h.0", "0.h.0", "0.h.1", "0.h.1", "2"]),
        ([f"h.0.{n}" for n in ("q", "k", "v", "o", "ffn.0.up", "ffn.0.down", "ffn.1.up", "ffn.1.down")], ["h.0"] * 8),
    ],
)
def test_blocks_within_what_is_around_the_model(names, blocks):
    assert list(blocks_of(names, names).values()) == blocks
    assert blocks_of(names[:1], names) == {names[0]: blocks[0]}  # whichever of them are adapted


def small(kind: str, **sizes) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind.split('For')[0]}Config")(**sizes)
    with torch.device("meta"):
        return getattr(transformers, kind)(config)


def test_blocks_of_models_with_stages():
    """A stage is no block, where it has several; T5's layers are parts of one, and MobileBERT's feed-forward networks."""
    swin = small("SwinForImageClassification", image_size=32, patch_size=4, embed_dim=8, depths=[2, 3], num_heads=[2, 2])
    found = Counter(blocks_of(linear_names(swin), linear_names(swin)).values())
    inner = {f"swin.encoder.layers.{stage}.blocks.{i}": 6 for stage, i in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2))}
    assert found == {**inner, "swin.encoder.layers.0": 1, "classifier": 1}  # between the stages is a projection
    t5 = small("T5ForConditionalGeneration", num_layers=2, d_model=16, d_ff=8, num_heads=2)
    assert set(blocks_of(linear_names(t5), linear_names(t5)).values()) == {
        *(f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(2)),
        "lm_head",
    }
    mobile = small("MobileBertForSequenceClassification", num_hidden_layers=2)
    found = Counter(blocks_of(linear_names(mobile), linear_names(mobile)).values())
    assert {name for name, layers in found.items() if layers > 1} == {f"mobilebert.encoder.layer.{i}" for i in range(2)}


def test_fingerprint_knows_the_checkpoint(model):
    """Equal for a bf16 copy, which holds the same weights; different for other weights, names and shapes."""
    sites = find_sites(model)
    other = copy.deepcopy(model)
    assert fingerprint(find_sites(other.bfloat16())) == fingerprint(sites)
    nn.init.normal_(other.get_submodule(sites[20].name).weight)
    assert fingerprint(find_sites(other)) != fingerprint(sites)
    assert fingerprint(sites[1:]) != fingerprint(sites)


@pytest.mark.parametrize("other", [named(b=nn.Linear(4, 6)), named(a=nn.Linear(6, 4))], ids=["name", "shape"])
def test_fingerprint_knows_names_and_shapes(other):
    model = named(a=nn.Linear(4, 6))
    for m in (model, other):
        nn.init.ones_(next(m.parameters()))
    assert fingerprint(find_sites(model)) != fingerprint(find_sites(other))
