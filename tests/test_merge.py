"""Merging and unmerging, and the report of what the weights gained."""

import copy
import sys

import pytest
import torch
from models import (
    Mlp,
    attached,
    gpt2,
    image_batch,
    layers_of,
    logits_of,
    minilm,
    review_batch,
    smollm2,
    state_of,
    stir,
    token_batch,
    vit,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

import cobra
from cobra import CobraLinear
from cobra.deploy.cost import Workload, site_shapes
from cobra.deploy.planner import plan_deployment
from cobra_kernels import extension

BATCH = image_batch()


def test_merge_and_unmerge_are_checked():
    _, adapter = attached()
    with pytest.raises(ValueError, match="not merged"):
        adapter.unmerge()
    plan = adapter.extract()
    adapter.merge()
    for call in (adapter.merge, lambda: adapter.apply(plan)):
        with pytest.raises(ValueError, match="merged"):
            call()


def test_merge_of_a_diverged_adapter_changes_nothing():
    """The layers merged before the bad one are put back, bit for bit."""
    model, adapter = attached()
    stir(adapter)
    with torch.no_grad():
        layers_of(adapter)[5].lora_B[0, 0] = float("nan")
    before, weights = state_of(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"vit\.layers\.0\.mlp\.fc2: the merged weight is not finite"):
        adapter.merge()
    assert state_of(model) == before
    assert all(torch.equal(value.nan_to_num(), weights[name].nan_to_num()) for name, value in model.state_dict().items())


@pytest.mark.parametrize("build", [vit, gpt2], ids=["linear", "Conv1D"])
def test_merged_in_place(build):
    """The same bits and report as with a way back, in the memory that the weights had; and no way back."""
    model, adapter = attached(build)
    stir(adapter)
    report, expected = adapter.merge(), copy.deepcopy(model.state_dict())
    adapter.unmerge()
    places = {name: p.data_ptr() for name, p in model.named_parameters() if "lora_" not in name}
    assert adapter.merge(reversible=False) == report
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
    with pytest.raises(ValueError, match=r"in place .*load the base model again"):
        adapter.unmerge()
    adapter.detach()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_merged_under_other_defaults():
    """A default device and inference mode reach neither the merge nor the weights it makes."""
    model, adapter = attached()
    stir(adapter)
    with torch.device("meta"):
        adapter.merge(workspace=5_000)
    adapter.unmerge()
    with torch.inference_mode():
        adapter.merge()
    assert not any(p.is_inference() for p in model.parameters())


def test_a_diverged_adapter_in_place_says_what_is_lost():
    _, adapter = attached()
    stir(adapter)
    with torch.no_grad():
        layers_of(adapter)[5].lora_B[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"mlp\.fc2: the merged weight is not finite .*load the base model again"):
        adapter.merge(reversible=False)


@pytest.mark.parametrize("training", [True, False])
def test_mode_follows_through_a_merge(training):
    """model.eval() while merged holds after unmerge: evaluation must never see noise, nor training go without."""
    model, adapter = attached()
    stir(adapter)
    model.train(not training)
    adapter.merge()
    model.train(training)
    adapter.unmerge()
    assert all(layer.training is training for layer in layers_of(adapter))


@pytest.mark.parametrize("training", [True, False])
def test_a_mode_set_while_merged_holds_where_the_model_had_it(training):
    """attach() leaves layers in training mode within a model in evaluation mode: eval() says what is meant all the same."""
    model, adapter = attached(lambda: Mlp().eval())
    stir(adapter)
    x = torch.randn(5, 6)
    model.train(training)
    for layer in layers_of(adapter):
        layer.train(not training)
    adapter.merge()
    merged = model.train(training)(x)
    adapter.unmerge()
    assert all(layer.training is training for layer in layers_of(adapter))
    torch.testing.assert_close(model.eval()(x), merged)


def test_a_mode_that_nobody_set_holds_through_a_merge():
    model, adapter = attached(lambda: Mlp().eval())
    adapter.merge()
    adapter.unmerge()
    assert not model.training and all(layer.training for layer in layers_of(adapter))
    adapter.detach()
    assert not any(module.training for module in model.modules())


def test_unmerge_in_mid_search():
    """Merging to look and going on is as if nothing had been merged."""
    model, adapter = attached()
    stir(adapter)
    noisy = logits_of(model, BATCH)
    adapter.merge()
    merged = logits_of(model, BATCH)
    adapter.unmerge()
    assert torch.equal(logits_of(model, BATCH), noisy)
    torch.testing.assert_close(merged, logits_of(model.eval(), BATCH), rtol=1e-5, atol=1e-5)


def test_merge_report():
    """What each layer gained, beside what it had, and what its dtype could not hold."""
    _, adapter = attached()
    stir(adapter)
    updates = [(2 * layer.lora_B * layer.lora_gate.sigmoid() @ layer.lora_A).norm().item() for layer in layers_of(adapter)]
    weights = [layer.weight.norm().item() for layer in layers_of(adapter)]
    report = adapter.merge()
    assert [site.name for site in report.sites] == [group.name for group in adapter.groups]
    assert [site.delta_norm for site in report.sites] == pytest.approx(updates)
    assert [site.weight_norm for site in report.sites] == pytest.approx(weights)
    assert 0 < report.worst_rounding_loss < 1e-6
    assert len(report.table().splitlines()) == 13
    assert repr(report).startswith("MergeReport(12 layers, at most ")


@pytest.mark.parametrize(("build", "batch"), [(vit, image_batch()), (gpt2, token_batch()), (minilm, review_batch())])
def test_probe(build, batch):
    """The report says what a look at the logits says."""
    model, adapter = attached(build)
    stir(adapter)
    model.eval()
    before = logits_of(model, batch)
    model.train()
    report = adapter.merge(probe=batch)
    assert all(module.training for module in model.modules())
    model.eval()
    assert report.logit_difference == (logits_of(model, batch) - before).abs().max().item() < 1e-4
    assert "outputs moved by at most" in repr(report)


class Answers(nn.Module):
    """Gives a loss, then what the wrapped model answers, in a tuple."""

    def __init__(self):
        super().__init__()
        self.inner = Mlp()

    def forward(self, x):
        y = self.inner(x)
        return y.mean(), (y, "text")


def test_probe_of_a_model_that_returns_a_tuple():
    model, adapter = attached(Answers)
    stir(adapter)
    x = torch.randn(4, 6)
    before = model.eval()(x)[1][0]
    report = adapter.merge(probe=(x, torch.zeros(4)))
    assert report.logit_difference == (model(x)[1][0] - before).abs().max().item() < 1e-5


def test_a_probe_without_outputs_is_refused():
    """Before anything is merged."""
    model, adapter = attached(Mlp)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.register_forward_hook(lambda module, args, output: {"text": "no"})
    with pytest.raises(ValueError, match="probe: the model returns dict without a tensor of outputs; merge without probe"):
        adapter.merge(probe=(torch.randn(4, 6), torch.zeros(4)))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("way", ["unmerge", "detach"])
def test_merges_are_taken_back_in_order(way):
    """An adapter that was merged on top is not lost with the one below it; in order the base's bits come back."""
    model, first = attached(Mlp)
    base = {name: model.get_submodule(name).weight.clone() for name in ("up", "mid")}  # the head stays as it was trained
    stir(first)
    first.merge()
    second = cobra.attach(model, first.config)
    stir(second)
    second.merge()
    x = torch.randn(4, 6)
    expected = model.eval()(x)
    with pytest.raises(
        ValueError, match=r"not those that this merge wrote.*unmerge\(\) the adapter first that was merged after"
    ):
        getattr(first, way)()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    second.detach()
    first.detach()
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in base.items())


class Wide(nn.Module):
    """One layer of more lanes than a checksum reads at a time: as nn.Linear of elements, as Conv1D of 8 bytes."""

    def __init__(self, conv: bool, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        self.layer = (Conv1D(700, 501) if conv else nn.Linear(501, 700)).to(dtype)


EDITS = {
    "a row": lambda w: w[5].zero_(),
    "signs": lambda w: w[:, 7].neg_(),
    "one bit": lambda w: w[-1, -1].copy_(torch.nextafter(w[-1, -1], w[0, 0])),
    "rows in another order": lambda w: w.copy_(w.flip(0).clone()),
    "columns in another order": lambda w: w.copy_(w.flip(1).clone()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "Conv1D"])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_what_was_changed_in_merged_weights_is_not_lost(edit, conv, dtype):
    """Wherever it was: unmerge names the layer and leaves the change; as the merge left them the weights go back."""
    model, adapter = attached(lambda: Wide(conv, dtype), rank_budget=2, r_max=2)
    base = model.layer.weight.clone()
    stir(adapter)
    adapter.merge()
    merged = model.layer.weight.data.clone()
    with torch.no_grad():
        edit(model.layer.weight)
    changed = model.layer.weight.clone()
    with pytest.raises(ValueError, match=r"^layer: the weights are not those that this merge wrote"):
        adapter.unmerge()
    assert torch.equal(model.layer.weight, changed) and not torch.equal(changed, merged)
    model.layer.weight.data = merged.t().clone().t()  # the same bits, laid out otherwise
    adapter.unmerge()
    assert torch.equal(model.layer.weight, base)


def test_weights_that_were_quantised_after_the_merge():
    """They are not those that were merged, and the base weights cannot be put into them."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, adapter = attached(Mlp)
    stir(adapter)
    adapter.merge()
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"^up: the weights are not those that this merge wrote"):
        adapter.unmerge()


def small_updates(dtype=torch.bfloat16):
    """An adapter whose updates grow from layer to layer, on a half-precision base."""
    model, adapter = attached(lambda: vit().to(dtype))
    stir(adapter)
    with torch.no_grad():
        for i, layer in enumerate(layers_of(adapter)):
            layer.lora_B.mul_(10.0 ** (i / 2 - 6))
    return model.eval(), adapter


def test_layers_above_the_tolerance_stay_unmerged():
    """They go on as adapters, and the model computes what it did, to within what the others lost."""
    model, adapter = small_updates()
    before, state = logits_of(model, image_batch()), state_of(model)
    report = adapter.merge(tolerance=0.2, above="keep")
    assert 0 < len(report.kept) < 12
    assert all(site.merged == (site.rounding_loss <= 0.2) for site in report.sites)
    assert report.worst_rounding_loss <= 0.2 < max(site.rounding_loss for site in report.sites)
    kinds = {name: isinstance(model.get_submodule(name), CobraLinear) for name in (site.name for site in report.sites)}
    assert kinds == {site.name: not site.merged for site in report.sites}
    torch.testing.assert_close(logits_of(model, image_batch()), before, rtol=2e-2, atol=2e-2)
    assert f"{len(report.kept)} stay unmerged" in repr(report) and "stays unmerged" in report.table()
    adapter.unmerge()
    assert state_of(model) == state


def test_a_tolerance_that_raises_merges_nothing():
    model, adapter = small_updates()
    state = state_of(model)
    said = r"rounding to torch\.bfloat16 would lose \d+(\.\d)?% of the update, the tolerance is 20%"
    with pytest.raises(ValueError, match=said):
        adapter.merge(tolerance=0.2)
    assert state_of(model) == state
    assert not adapter.merge().kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"above": "skip"}, "above='skip' is not one of"),
        ({"tolerance": -1}, "at least 0"),
        ({"tolerance": 0.1, "reversible": False}, r"tolerance=0\.1 needs the original weights .* reversible=True"),
    ],
)
def test_unknown_options(options, message):
    _, adapter = attached()
    with pytest.raises(ValueError, match=message):
        adapter.merge(**options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_report_measures_the_rounding(dtype):
    """The loss is that of the weights as they are now, against the update in fp64."""
    model, adapter = small_updates(dtype)
    work = [(layer.weight.detach().double(), layer.folded()) for layer in layers_of(adapter)]
    report = adapter.merge()
    for (base, (lora_A, lora_B)), site in zip(work, report.sites, strict=True):
        delta = lora_B.double() @ lora_A.double()
        lost = ((model.get_submodule(site.name).weight.detach().double() - base) - delta).norm() / delta.norm()
        assert site.rounding_loss == pytest.approx(lost.item(), rel=1e-3)
        assert site.delta_norm == pytest.approx(delta.norm().item(), rel=1e-5)


def test_weights_that_are_slices_stay_slices():
    """A parameter that is part of a larger buffer is written in place, and comes back to the bit."""

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.buffer = torch.randn(8, 6)
            self.one, self.two = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
            self.one.weight.data, self.two.weight.data = self.buffer[:4], self.buffer[4:]

    model, adapter = attached(Fused, rank_budget=4, r_max=2)
    stir(adapter)
    before = model.buffer.clone()
    adapter.merge()
    assert torch.equal(model.buffer, torch.cat([model.one.weight, model.two.weight])) and not torch.equal(model.buffer, before)
    adapter.unmerge()
    assert torch.equal(model.buffer, before)


class Views(nn.Module):
    """Two layers whose weights are views of one buffer, (8, 12)."""

    def __init__(self, one, two):
        super().__init__()
        torch.manual_seed(0)
        self.buffer = torch.randn(8, 12)
        self.one, self.two = (nn.Linear(*view(self.buffer).shape[::-1], bias=False) for view in (one, two))
        self.one.weight, self.two.weight = nn.Parameter(one(self.buffer)), nn.Parameter(two(self.buffer))


SHARED = {
    "all": (lambda b: b, lambda b: b),
    "transposed": (lambda b: b, lambda b: b.t()),
    "some rows": (lambda b: b[:5], lambda b: b[4:]),
    "some columns": (lambda b: b[:, :7], lambda b: b[2:, 6:]),
}
APART = {
    "rows": (lambda b: b[:4], lambda b: b[4:]),
    "columns": (lambda b: b[:, :6], lambda b: b[:, 6:]),
    "columns, transposed": (lambda b: b[:, :6].t(), lambda b: b[:, 6:].t()),
    "every second column": (lambda b: b[:, ::2], lambda b: b[:, 1::2]),
}


@pytest.mark.parametrize("workspace", [2**28, 100], ids=["one launch", "chunks"])
@pytest.mark.parametrize("views", SHARED.values(), ids=SHARED)
def test_weights_in_the_same_memory_are_not_merged_in_place(views, workspace):
    """Each would get the updates of both, in whatever chunks they are merged. The model stays as it was."""
    model, adapter = attached(lambda: Views(*views), rank_budget=4, r_max=2)
    stir(adapter)
    before, buffer = state_of(model), model.buffer.clone()
    said = r"^one and two hold their weights in the same memory.* module\.weight\.data = module\.weight\.data\.clone\(\)$"
    with pytest.raises(ValueError, match=said):
        adapter.merge(reversible=False, workspace=workspace)
    assert state_of(model) == before and torch.equal(model.buffer, buffer)
    model.two.weight.data = model.two.weight.data.clone()
    report = adapter.merge(reversible=False, workspace=workspace)
    assert [site.name for site in report.sites] == ["one", "two"] and not torch.equal(model.buffer, buffer)


def merged_and_back(views):
    """Two layers and their adapter before a merge, merged, and after unmerge and detach: the buffers and the outputs."""
    model, adapter = attached(lambda: Views(*views), rank_budget=4, r_max=2)
    stir(adapter)
    inputs = [torch.randn(3, layer.in_features) for layer in (model.one, model.two)]
    found = []
    for act in (model.eval, adapter.merge, adapter.unmerge):
        act()
        outputs = [layer(x) for layer, x in zip((model.one, model.two), inputs, strict=True)]
        found.append((model.buffer.clone(), torch.cat([y.flatten() for y in outputs])))
    return found


@pytest.mark.parametrize("views", ["some rows", "some columns"])
def test_slices_in_the_same_memory_are_not_merged_with_a_way_back(views):
    """A slice is written where it lies: one update would overwrite the other. Nothing is written."""
    model, adapter = attached(lambda: Views(*SHARED[views]), rank_budget=4, r_max=2)
    stir(adapter)
    before, buffer = state_of(model), model.buffer.clone()
    with pytest.raises(ValueError, match=r"^one and two hold their weights in the same memory.*; nothing is merged: give one"):
        adapter.merge()
    assert state_of(model) == before and torch.equal(model.buffer, buffer)
    model.two.weight.data = model.two.weight.data.clone()
    assert len(adapter.merge().sites) == 2


@pytest.mark.parametrize("views", [SHARED["all"], SHARED["transposed"], *APART.values()], ids=["all", "transposed", *APART])
def test_weights_that_part_in_a_merge_come_back(views):
    """Aliases of a whole buffer get a tensor each when they are merged, slices that are apart are written where they lie."""
    (buffer, outputs), (_, merged), (restored, again) = merged_and_back(views)
    torch.testing.assert_close(merged, outputs)
    assert torch.equal(restored, buffer) and torch.equal(again, outputs)


@pytest.mark.parametrize("views", APART.values(), ids=APART)
def test_weights_side_by_side_in_a_buffer_are_merged_in_place(views):
    """Their memory may interleave as long as no element is of both."""
    merged = []
    for reversible in (True, False):
        model, adapter = attached(lambda: Views(*views), rank_budget=4, r_max=2)
        stir(adapter)
        adapter.merge(reversible=reversible, workspace=100)
        merged.append(model.buffer)
    assert torch.equal(*merged)


def test_the_model_may_move_between_merge_and_unmerge():
    """Another dtype, another device: the base weights come back as far as the new dtype holds them."""
    model, adapter = attached()
    stir(adapter)
    base = {name: p.clone() for name, p in model.named_parameters() if name.endswith("q_proj.weight")}
    adapter.merge()
    model.bfloat16()
    adapter.unmerge()
    assert all(torch.equal(model.get_parameter(name), p.bfloat16()) for name, p in base.items())


@pytest.mark.parametrize(
    "build",
    [pytest.param(vit, id="vit"), pytest.param(gpt2, id="gpt2"), pytest.param(smollm2, id="smollm2", marks=pytest.mark.slow)],
)
def test_a_merged_model_is_saved_by_its_own_class(build, tmp_path):
    """save_pretrained of the base class writes the merged weights, and from_pretrained reads them into plain layers."""
    model, adapter = attached(build)
    stir(adapter)
    adapter.merge()
    model.eval()
    batch = image_batch() if build is vit else token_batch()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert not any(isinstance(module, CobraLinear) for module in loaded.modules())
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))


def test_report_as_a_dataframe():
    _, adapter = attached()
    stir(adapter)
    frame = adapter.merge().to_dataframe()
    assert len(frame) == 12 and {"name", "rank", "delta_norm", "weight_norm", "rounding_loss", "merged"} == set(frame.columns)


def test_merge_of_a_search_state_and_of_combined_adapters_report_alike():
    """One adapter merged through the combination of itself is the same merge."""
    model, adapter = attached()
    stir(adapter)
    lora = adapter.to_lora()
    adapter.merge()
    other = vit()
    cobra.combine([(lora, 1.0)]).attach(other).merge()
    assert all(torch.equal(model.get_submodule(name).weight, other.get_submodule(name).weight) for name in lora.layers)


# the planner's schedule


def launches_of(monkeypatch, call) -> list[list[tuple[str, int, int]]]:
    """(site, rows, bytes of the sums) of each piece of each launch that a call makes."""
    module, found = sys.modules["cobra.merge"], []
    launch = module.merge_lora_group

    def seen(items, **options):
        found.append([(i.name, i.weight.shape[0], i.weight.numel() * max(4, i.weight.element_size())) for i in items])
        return launch(items, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "merge_lora_group", seen)
        call()
    return found


@pytest.mark.skipif(extension.load() is None, reason="the compiled extension was not built")
@pytest.mark.parametrize(
    "build", [minilm, smollm2, lambda: minilm().bfloat16(), gpt2], ids=["minilm", "smollm2", "bf16", "gpt2"]
)
def test_a_merge_makes_the_launches_of_its_plan(build, monkeypatch):
    """Chunk by chunk and row by row under the cap, with the bits of one launch."""
    model, adapter = attached(build)
    stir(adapter)
    lora = adapter.to_lora()
    adapter.merge()
    whole = {name: model.get_submodule(name).weight.clone() for name in lora.layers}
    adapter.unmerge()

    workspace = 500_000 if build is not gpt2 else 3_000
    sites = site_shapes(build(), [lora])
    plan = plan_deployment(sites, "CPU", Workload(1), workspace=workspace, fixed={site.name: "merged" for site in sites})
    planned = [[(p.site, p.row_stop - p.row_start) for p in chunk.pieces] for chunk in plan.merges.chunks]
    launches = launches_of(monkeypatch, lambda: adapter.merge(workspace=workspace))
    assert len(planned) > 3 and [[(name, rows) for name, rows, _ in launch] for launch in launches] == planned
    assert [sum(size for _, _, size in launch) for launch in launches] == [chunk.workspace for chunk in plan.merges.chunks]
    assert max(chunk.workspace for chunk in plan.merges.chunks) <= workspace
    merged = {name: model.get_submodule(name).weight for name in lora.layers}
    assert all(torch.equal(merged[name], weight) for name, weight in whole.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_merge_by_torch_follows_the_plan_too(dtype, monkeypatch):
    """Where nothing is compiled; torch's own product may sum fewer rows in another order."""
    monkeypatch.setattr(extension, "load", lambda: None)
    model, adapter = attached(lambda: vit().to(dtype))
    stir(adapter)
    merged = []
    for workspace in (2**28, 3_000):
        launches = launches_of(monkeypatch, lambda workspace=workspace: adapter.merge(workspace=workspace))
        assert all(sum(size for _, _, size in launch) <= workspace for launch in launches)
        merged.append([p.detach().clone() for p in model.parameters()])
        adapter.unmerge()
    torch.testing.assert_close(*merged)


def test_the_report_does_not_depend_on_the_workspace():
    """Norms and losses of a layer merged in pieces are those of the layer."""
    _, adapter = small_updates()
    reports = []
    for workspace in (2**28, 5_000):
        reports.append(adapter.merge(workspace=workspace))
        adapter.unmerge()
    for whole, pieces in zip(*(report.sites for report in reports), strict=True):
        assert (whole.name, whole.rank) == (pieces.name, pieces.rank)
        for key in ("delta_norm", "weight_norm", "rounding_loss"):
            assert getattr(pieces, key) == pytest.approx(getattr(whole, key), rel=1e-6)


def test_a_model_merges_in_one_launch_by_default(monkeypatch):
    _, adapter = attached(minilm)
    (launch,) = launches_of(monkeypatch, adapter.merge)
    assert len(launch) == 37


@pytest.mark.parametrize("workspace", [100, 0, -1, 1.5])
def test_a_workspace_that_cannot_be_changes_nothing(workspace):
    model, adapter = attached()
    stir(adapter)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"workspace=.*(give at least 256 bytes|expected an integer of at least 1)"):
        adapter.merge(workspace=workspace)
    assert state_of(model) == before


def test_a_diverged_layer_in_a_later_chunk_merges_nothing():
    model, adapter = attached()
    stir(adapter)
    with torch.no_grad():
        layers_of(adapter)[-1].lora_B[-1, 0] = float("inf")
    before, weights = state_of(model), {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="the merged weight is not finite"):
        adapter.merge(workspace=3_000)
    assert state_of(model) == before
    assert all(torch.equal(p.nan_to_num(), weights[name].nan_to_num()) for name, p in model.named_parameters())
