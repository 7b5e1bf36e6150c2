"""Base models in half precision and quantised ones, which train fp32 adapters."""

import copy
import dataclasses
import warnings
from functools import partial

import pytest
import torch
from models import Mlp, logits_of, minilm, minilm_folder, prose_batch, review_batch, smollm2, train
from torch import nn

import cobra
from cobra.sites import find_sites, fingerprint

calibrate = partial(cobra.calibrate, steps=6, quadrature="lobatto", progress=False)
# relative L2 distance of the scores from those in fp32: two to three times what was measured on either model
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
HALVES = pytest.mark.parametrize("dtype", TOLERANCES, ids=["bf16", "fp16"])

pytestmark = pytest.mark.filterwarnings("ignore:the path integral misses")


def two_layers() -> nn.Module:
    """MiniLM's first layers and head: without instructions for it a CPU multiplies half precision in a plain loop."""
    model = minilm()
    model.bert.encoder.layer, model.config.num_hidden_layers = model.bert.encoder.layer[:2], 2
    return model


@pytest.fixture(scope="module")
def scores():
    return calibrate(minilm(), [review_batch()])


@pytest.fixture(scope="module")
def few_scores():
    return calibrate(minilm(), [review_batch(2)])


def trained(dtype: torch.dtype, autocast: bool = False, steps: int = 4, build=minilm):
    """A model in a dtype after the README's loop, its adapter, the losses, and its weights before. The head is frozen."""
    model = build().to(dtype)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = cobra.CobraConfig(
        rank_budget=24, r_max=4, total_steps=steps, gate_lr_scale=30.0, modules_to_save=(), basis="gates"
    )
    adapter = cobra.attach(model, config)
    optimizer, losses = torch.optim.AdamW(adapter.parameter_groups(lr=3e-3)), []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            nll = model(**review_batch(2)).loss
        (nll + adapter.kl_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.step()
        losses.append(nll.item())
    return model, adapter, losses, weights


@pytest.fixture(scope="module")
def reference():
    return trained(torch.float32)


# half precision


def assert_scores_agree(found: cobra.LayerScores, expected: cobra.LayerScores, tolerance: float) -> None:
    assert found.sites == expected.sites
    for name in ("conductance", "gradient", "prior"):
        a, b = getattr(found, name).double(), getattr(expected, name).double()
        assert (a - b).norm() <= tolerance * b.norm(), (name, ((a - b).norm() / b.norm()).item())
    assert (found.attributions - expected.attributions).norm() <= 2 * tolerance * expected.attributions.norm()


@HALVES
def test_calibration_agrees_with_fp32(few_scores, dtype):
    assert_scores_agree(calibrate(minilm().to(dtype), [review_batch(2)]), few_scores, TOLERANCES[dtype])


@pytest.mark.slow
@HALVES
def test_calibration_of_a_language_model_agrees_with_fp32(dtype):
    expected = calibrate(smollm2(2), [prose_batch()], baseline="mean")
    assert_scores_agree(calibrate(smollm2(2).to(dtype), [prose_batch()], baseline="mean"), expected, TOLERANCES[dtype])


def test_scores_serve_the_bf16_copy_of_their_model(scores):
    """Sampled weights are compared in bf16; fp16 keeps other bits of them, and is calibrated itself."""
    config = cobra.CobraConfig(rank_budget=36, r_max=2, total_steps=2)
    adapter = cobra.attach(minilm().bfloat16(), config, scores)
    assert adapter.base_fingerprint == scores.fingerprint
    with pytest.raises(ValueError, match=r"the scores are of another model: their fingerprint is .* calibrate this model"):
        cobra.attach(minilm().half(), config, scores)


@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [(torch.bfloat16, False, 2e-2), (torch.bfloat16, True, 2e-2), (torch.float16, False, 5e-3), (torch.float32, True, 1e-2)],
    ids=["bf16", "bf16-autocast", "fp16", "fp32-autocast"],
)
def test_training_follows_fp32(reference, dtype, autocast, tolerance):
    """fp32 matrices and gates on a frozen base that keeps its bits."""
    _, _, expected, _ = reference
    model, adapter, losses, before = trained(dtype, autocast)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=tolerance, atol=0)
    assert losses[-1] < 0.9 * losses[0]
    assert {tensor.dtype for tensor in adapter.state_dict().values()} == {torch.float32}
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in before.items())
    assert adapter.extract().total == 24


@HALVES
def test_merge_reports_what_half_precision_loses(dtype):
    """The merged model is plain and in its dtype, the report's loss is the true one, and undoing it restores the bits."""
    model, adapter, _, before = trained(dtype, build=two_layers)
    adapter.apply(adapter.extract())
    updates = {name: (layer.lora_B @ layer.lora_A).double() for name, layer in adapter.to_lora().layers.items() if layer.rank}
    outputs = logits_of(model.eval(), review_batch())
    report = adapter.merge(probe=review_batch())
    weights = dict(model.named_parameters())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not any(isinstance(module, cobra.CobraLinear) for module in model.modules())
    for site in report.sites:
        moved = weights[f"{site.name}.weight"].double() - before[f"{site.name}.weight"].double()
        lost = ((moved - updates[site.name]).norm() / updates[site.name].norm()).item()
        assert site.rounding_loss == pytest.approx(lost, rel=1e-3) and 0 < lost < 1
    assert report.logit_difference == (logits_of(model, review_batch()) - outputs).abs().max().item()
    adapter.unmerge()
    assert torch.equal(adapter.groups[0].sites[0].weight, before[f"{adapter.groups[0].sites[0].name}.weight"])


def test_a_head_in_fp16_is_told_of():
    """AdamW takes it to NaN in its first step; bf16 keeps the range of fp32, and the head trains."""
    for dtype, finite in ((torch.float16, False), (torch.bfloat16, True)):
        model = minilm().to(dtype)
        adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=72, r_max=4, total_steps=2))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            groups = adapter.parameter_groups(lr=1e-3)
        assert [("classifier trains in fp16" in str(each.message)) for each in told] == ([] if finite else [True])
        train(model, adapter, torch.optim.AdamW(groups), [review_batch()])
        assert torch.isfinite(model.classifier.bias).all().item() is finite


def test_lossy_merges_can_be_refused():
    _, adapter, _, before = trained(torch.bfloat16, steps=1, build=two_layers)
    with pytest.raises(ValueError, match=r"rounding to torch.bfloat16 would lose .* into an fp32 copy"):
        adapter.merge(tolerance=1e-6)
    assert torch.equal(adapter.groups[0].sites[0].weight, before[f"{adapter.groups[0].sites[0].name}.weight"])


# quantised


def bitsandbytes_4bit():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["classifier"])


def bitsandbytes_8bit():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["classifier"])


def torchao_int8():
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["classifier"])


ENGINES = pytest.mark.parametrize(
    ("engine", "kind"),
    [
        (bitsandbytes_4bit, "torch.uint8 in a Linear4bit"),
        (bitsandbytes_8bit, "torch.int8 in a Linear8bitLt"),
        (torchao_int8, "Int8Tensor in a Linear"),
    ],
    ids=["bitsandbytes-4bit", "bitsandbytes-8bit", "torchao-int8"],
)


def quantised_minilm(engine) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=2, quantization_config=engine())


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_head_is_refused():
    """It would be trained whole, and its weight has no gradient; the model stays as it is, and without the head it attaches."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = Mlp()
    quantize_(model, Int8WeightOnlyConfig())
    config = cobra.CobraConfig(rank_budget=2, r_max=2, gate="mean", modules_to_save=("classifier",))
    with pytest.raises(ValueError, match=r"modules_to_save: classifier is trained whole and its weight is Int8Tensor in a Lin"):
        cobra.attach(model, config)
    assert cobra.attach(model, dataclasses.replace(config, modules_to_save=())).groups


@ENGINES
@pytest.mark.filterwarnings("ignore")
def test_a_quantised_base_is_calibrated_trained_and_saved(scores, engine, kind, tmp_path):
    """Scores near those of the whole-precision model, a first loss equal to the base's, gates and ranks as ever, evaluation in
    between; the adapter goes on on the same base, and merges into the unquantised one."""
    model = quantised_minilm(engine).eval()
    found = calibrate(model, [review_batch()])
    both = torch.corrcoef(torch.stack([found.prior, scores.prior[: len(found.prior)]]).double())
    assert both[0, 1] > 0.9
    config = cobra.CobraConfig(rank_budget=72, r_max=4, total_steps=4, gate_lr_scale=30.0)
    with pytest.raises(ValueError, match=r"backend='triton' reads the weight itself, and \d+ target layers are quantised"):
        cobra.attach(model, dataclasses.replace(config, backend="triton"), found)
    adapter = cobra.attach(model, config, found)
    optimizer, losses = torch.optim.AdamW(adapter.parameter_groups(lr=3e-3)), []
    for _ in range(4):
        model.train()
        loss = model(**review_batch()).loss
        (loss + adapter.kl_loss()).backward()
        assert all(layer.lora_B.grad.abs().sum() > 0 for group in adapter.groups for layer in group.all_layers)
        optimizer.step()
        optimizer.zero_grad()
        adapter.step()
        losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            model(**review_batch())
    assert losses[-1] < losses[0] - 0.02
    adapter.apply(adapter.extract(), optimizer)
    assert adapter.plan.total == 72
    expected = logits_of(model, review_batch())
    with pytest.raises(ValueError, match=rf"weight is {kind}, and a sum cannot be rounded .* load the base unquantised"):
        adapter.merge()
    adapter.save_pretrained(tmp_path / "a")

    again = quantised_minilm(engine).eval()
    cobra.load_adapter(tmp_path / "a").attach(again)
    torch.testing.assert_close(logits_of(again, review_batch()), expected)
    unquantised = minilm().eval()
    cobra.load_adapter(tmp_path / "a").attach(unquantised).merge()
    assert (logits_of(unquantised, review_batch()) - expected).abs().max() < 0.1


@pytest.mark.filterwarnings("ignore")
def test_weights_packed_for_inference_are_refused():
    """bitsandbytes packs 4-bit weights at the first evaluation on CPUs with AVX512-BF16; that form has no backward."""
    model = quantised_minilm(bitsandbytes_4bit).eval()
    with torch.no_grad():
        model(**review_batch())
    layer = model.get_submodule("bert.encoder.layer.0.attention.self.query")
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no AVX512-BF16")
    config = cobra.CobraConfig(rank_budget=72, total_steps=2)
    for use in (lambda: calibrate(model, [review_batch()]), lambda: cobra.attach(model, config)):
        with pytest.raises(ValueError, match=r"packed for inference by bitsandbytes .* before the first evaluation"):
            use()


@ENGINES
@pytest.mark.filterwarnings("ignore")
def test_a_plan_trains_on_the_quantised_base_with_peft(scores, engine, kind):
    """Its plan, from scores of the whole-precision copy, trains there with peft."""
    import peft

    model = quantised_minilm(engine)
    plan = cobra.plan_ranks(scores, 72, r_max=8)
    adapted = peft.get_peft_model(model, plan.to_peft_config(task_type="SEQ_CLS"))
    ranks = {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in adapted.named_modules()
        if isinstance(getattr(module, "r", None), dict)
    }
    assert ranks == {name: rank for name, rank in plan.ranks.items() if rank} and len(set(ranks.values())) > 1
    optimizer, losses = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-3), []
    for _ in range(3):
        loss = adapted(**review_batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02


class Packed(nn.Module):
    """Linear in name and shape, its weight packed into integers under another name, as GPTQ and AWQ keep it."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("qweight", torch.zeros(in_features // 2, out_features, dtype=torch.int32))


@pytest.mark.parametrize(
    "layer",
    [
        Packed(10, 10),
        nn.Linear(10, 10).to(torch.float8_e4m3fn),
    ],
    ids=["packed", "fp8"],
)
def test_quantised_layers_are_not_left_out_in_silence(layer):
    model = Mlp()
    model.mid = layer
    for targets in ("all-linear", "mid", ("up", "mid"), lambda name, module: True):
        with pytest.raises(ValueError, match=r"mid\.weight is torch\.\w+ in a \w+ \(1 such layers\).*leave the layer out"):
            find_sites(model, targets)
    assert [site.name for site in find_sites(model, ("up",))] == ["up"]


def test_a_head_left_in_full_precision_is_no_matter():
    """And a quantised one does not concern all-linear, which leaves heads out."""
    model = Mlp()
    plain = fingerprint(find_sites(model))
    model.classifier = nn.Linear(10, 3).to(torch.float8_e4m3fn)
    assert fingerprint(find_sites(model)) == plain


def test_layers_that_are_like_linear_ones_are_no_quantised_layers():
    """Factors in floating point, containers, lazy layers."""

    class Factors(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 6, 6
            self.left, self.right = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 6))

    class Container(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 6, 6
            self.inner = nn.Linear(6, 6)
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    model = nn.Sequential(Factors(), Container(), nn.Linear(6, 6))
    assert [site.name for site in find_sites(model)] == ["1.inner", "2"]


def test_mixed_training_is_the_same_from_a_copy():
    """A bf16 model and its deep copy train alike to the bit: nothing is kept outside the model and the adapter."""
    model = two_layers().bfloat16()
    config = cobra.CobraConfig(rank_budget=12, r_max=2, total_steps=3)
    states = []
    for each in (copy.deepcopy(model), model):
        adapter = cobra.attach(each, config)
        train(each, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-3)), [review_batch()] * 2)
        states.append(adapter.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
