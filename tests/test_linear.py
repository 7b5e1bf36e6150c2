"""The layer itself: its gates in training and evaluation, dropout, ranks and precision."""

import pytest
import torch
from models import Mlp, attached, gates_of, gpt2, image_batch, layers_of, logits_of, same, stir, token_batch, train, vit
from torch import nn
from torch.nn import functional as F

import cobra
from cobra import CobraLinear
from cobra_kernels import ConcreteSample

BATCH = image_batch()


def test_evaluation_has_no_noise():
    """Evaluation uses the mean gate, whatever the step and temperature."""
    model, adapter = attached()
    stir(adapter)
    model.eval()
    assert same(gates_of(adapter), [layer.lora_gate.detach().sigmoid() for layer in layers_of(adapter)])
    first = logits_of(model, BATCH)
    adapter.step()
    assert torch.equal(logits_of(model, BATCH), first)
    model.train()
    assert not torch.equal(logits_of(model, BATCH), first)


def test_called_as_a_linear_layer_is():
    """By name too, and with a temperature in fp32 whatever torch's default dtype is."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        model, adapter = attached(Mlp)
    finally:
        torch.set_default_dtype(before)
    adapter.move_to_step(1)
    assert all(layer.gate_temperature.dtype == torch.float32 for layer in layers_of(adapter))
    x = torch.randn(2, 6, dtype=torch.float64)
    assert torch.equal(model.up(input=x), model.up(x))


def test_mean_gates_train_without_noise():
    model, adapter = attached(gate="mean", total_steps=None)
    stir(adapter)
    assert all(layer.training and layer.gate_noise is None for layer in layers_of(adapter))
    training = logits_of(model, BATCH)
    assert torch.equal(logits_of(model.eval(), BATCH), training)
    (model(**BATCH).loss + adapter.kl_loss()).backward()
    assert all(layer.lora_gate.grad.abs().max() > 0 for layer in layers_of(adapter))


@pytest.mark.parametrize(("build", "batch"), [(vit, BATCH), (gpt2, token_batch())], ids=["linear", "conv1d"])
def test_open_gates_are_plain_lora(build, batch):
    """gate="open" is LoRA itself: peft, given the same matrices, takes the same steps."""
    from peft import LoraConfig, get_peft_model

    model, adapter = attached(build, gate="open", r_max=8, alpha=None)
    names = [group.name for group in adapter.groups]
    settings = {"modules_to_save": list(adapter.heads) or None, "fan_in_fan_out": build is gpt2}
    theirs = get_peft_model(build(), LoraConfig(r=8, lora_alpha=16, target_modules=names, **settings)).eval()
    with torch.no_grad():
        for name, layer in zip(names, layers_of(adapter), strict=True):
            theirs.base_model.model.get_submodule(name).lora_A["default"].weight.copy_(layer.lora_A)
    ours_optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=5e-3))
    theirs_optimizer = torch.optim.AdamW((p for p in theirs.parameters() if p.requires_grad), lr=5e-3, weight_decay=0.0)
    before = logits_of(model, batch)
    for _ in range(5):
        for each, optimizer in ((model, ours_optimizer), (theirs, theirs_optimizer)):
            each(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        adapter.step()
    assert adapter.kl_loss().item() == 0
    assert (logits_of(model, batch) - before).abs().max() > 0.05
    torch.testing.assert_close(logits_of(model, batch), logits_of(theirs, batch), rtol=0, atol=1e-5)


def test_dropout_is_on_the_branch_alone():
    """The frozen path sees the whole input, and so does the branch outside of training."""
    linear, x = nn.Linear(6, 5), torch.randn(7, 6)
    layer = CobraLinear.from_linear(linear, 3, scaling=2.0, dropout=0.5, gate_logit=0.4)
    nn.init.normal_(layer.lora_B)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(5)
    torch.testing.assert_close(layer(x), linear(x) + dropped @ layer.folded()[0].T @ layer.folded()[1].T)
    torch.testing.assert_close(layer.eval()(x), linear(x) + x @ layer.folded()[0].T @ layer.folded()[1].T)


@pytest.mark.parametrize("rank", [0, 6])
def test_a_layer_holds_no_more_ranks_than_its_smaller_side(rank):
    with pytest.raises(ValueError, match=rf"rank={rank} for a layer of 7 -> 5 features: expected 1 to 5"):
        CobraLinear.from_linear(nn.Linear(7, 5), rank)
    adapter = cobra.attach(Mlp(hidden=2), cobra.CobraConfig(rank_budget=4, r_max=16, gate="mean"))
    assert [group.rank for group in adapter.groups] == [2, 2]


# backends


def mlp():
    torch.manual_seed(0)
    return Mlp()


def test_an_explicit_backend_never_falls_back():
    """What has no Triton kernel says so: the device, dropout, a quantised weight."""
    model, _ = attached(mlp, backend="triton")
    with pytest.raises(RuntimeError, match=r"backend='triton' needs (a CUDA device, and x is on cpu|the package triton)"):
        model(torch.randn(3, 6))
    layer = CobraLinear.from_linear(nn.Linear(6, 5), 3, dropout=0.5)
    layer.backend = "triton"
    with pytest.raises(RuntimeError, match=r"backend='triton' has no kernel for dropout=0\.5; use backend='auto'"):
        layer(torch.randn(3, 6))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_backends_of_a_cpu_are_one(backend):
    found, expected = (attached(mlp, **options)[0](torch.ones(3, 6)) for options in ({"backend": backend}, {}))
    assert torch.equal(found, expected)


def test_words_of_a_step_draw_its_noise():
    """What a kernel draws from is what the layer's noise was made of, at every step and in every group."""
    model, adapter = attached(mlp, seed=2**40 + 3)
    for _ in range(3):
        for layer in layers_of(adapter):
            sample = ConcreteSample(layer.lora_gate, layer.gate_draw, layer.gate_temperature)
            assert torch.equal(sample.gates(), layer.gates())
        adapter.step()
    assert len({tuple(layer.gate_draw.tolist()) for layer in layers_of(adapter)}) == len(layers_of(adapter)) == 2
    assert not any("gate_draw" in name for name in model.state_dict())


# precision


def test_half_precision_weights_train_in_fp32():
    """Steps of 1e-4 vanish in bf16; the adapter keeps them, and the merge rounds the sum once."""
    model, adapter = attached(lambda: vit().bfloat16(), dropout=0.1)
    batch = BATCH | {"pixel_values": BATCH["pixel_values"].bfloat16()}
    assert {p.dtype for layer in layers_of(adapter) for p in (layer.lora_A, layer.lora_B, layer.lora_gate)} == {torch.float32}
    before = layers_of(adapter)[0].lora_A.detach().clone()
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-5))
    train(model, adapter, optimizer, [batch] * 3)
    assert 0 < (layers_of(adapter)[0].lora_A - before).abs().max() < 1e-4
    stir(adapter)
    model.eval()
    adapted = logits_of(model, batch)
    exact = {
        group.name: layer.weight.double() + torch.matmul(*(m.double() for m in reversed(layer.folded())))
        for group, layer in zip(adapter.groups, layers_of(adapter), strict=True)
    }
    report = adapter.merge()
    for name, weight in exact.items():
        merged = model.get_submodule(name).weight
        assert merged.dtype == torch.bfloat16
        assert ((merged - weight).abs() <= weight.abs() * 2**-8 + 1e-6).all()  # half a unit in the last place
    assert 1e-4 < report.worst_rounding_loss < 1e-1
    torch.testing.assert_close(logits_of(model, batch), adapted, rtol=0.1, atol=0.1)
    adapter.unmerge()
    assert torch.equal(logits_of(model, batch), adapted)


def test_autocast():
    """Mixed precision runs the products in bf16 and leaves gradients in fp32."""
    model, adapter = attached()
    stir(adapter)
    exact = logits_of(model, BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**BATCH)
        (outputs.loss + adapter.kl_loss()).backward()
    assert not torch.equal(outputs.logits, exact)
    torch.testing.assert_close(outputs.logits.float(), exact, rtol=0.1, atol=0.1)
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_straight_through_gates_are_hard_with_the_samples_gradient():
    """The forward sees 0 or 1, the logits the gradient of the concrete sample."""
    _, soft = attached()
    _, hard = attached(gate="straight_through")
    stir(soft), stir(hard)
    for ours, theirs in zip(layers_of(hard), layers_of(soft), strict=True):
        z, sample = ours.gates(), theirs.gates()
        torch.testing.assert_close(z, (sample > 0.5).to(z.dtype), rtol=0, atol=1e-6)
        weights = torch.arange(1.0, len(z) + 1)
        (gradient,) = torch.autograd.grad(z @ weights, ours.lora_gate)
        (expected,) = torch.autograd.grad(sample @ weights, theirs.lora_gate)
        torch.testing.assert_close(gradient, expected)
    assert {0.0, 1.0} == {round(value, 6) for layer in layers_of(hard) for value in layer.gates().tolist()}


def test_hard_gates_are_the_stretched_sample():
    """Training sees the cut sample, evaluation and the merge the cut mean; a gate that was cut has no gradient."""
    model, adapter = attached(gate="hard_concrete")
    stir(adapter)
    with torch.no_grad():
        for layer in layers_of(adapter):
            layer.lora_gate.mul_(4)  # some far from 0, where the cut is
    for layer in layers_of(adapter):
        sample = torch.sigmoid((layer.lora_gate + layer.gate_noise) / layer.gate_temperature)
        stretched = -0.1 + 1.2 * sample
        torch.testing.assert_close(layer.gates(), stretched.clamp(0, 1), rtol=1e-6, atol=1e-6)
        (gradient,) = torch.autograd.grad(layer.gates().sum(), layer.lora_gate)
        within = (stretched > 0) & (stretched < 1)
        slope = 1.2 * sample * (1 - sample) / layer.gate_temperature
        torch.testing.assert_close(gradient, torch.where(within, slope, 0.0), rtol=1e-4, atol=1e-6)
    assert {0.0, 1.0} < {value for layer in layers_of(adapter) for value in layer.gates().tolist()}
    model.eval()
    for layer in layers_of(adapter):
        torch.testing.assert_close(layer.gates(), (-0.1 + 1.2 * layer.lora_gate.sigmoid()).clamp(0, 1))
    evaluated = logits_of(model, BATCH)
    adapter.merge()
    torch.testing.assert_close(logits_of(model, BATCH), evaluated, rtol=1e-4, atol=1e-5)


def test_lora_B_takes_its_own_rate():
    """Every trained parameter is in one group, lora_B's at its ratio (LoRA+)."""
    _, adapter = attached(lora_B_lr_scale=16.0)
    rates = {id(p): group["lr"] for group in adapter.parameter_groups(lr=1e-3) for p in group["params"]}
    assert {rates[id(layer.lora_B)] for layer in layers_of(adapter)} == {1.6e-2}
    assert {rates[id(layer.lora_A)] for layer in layers_of(adapter)} == {1e-3}
    plain = [group["lr"] for group in attached()[1].parameter_groups(lr=1e-3)]
    assert plain == [1e-3] * len(plain)
