"""CobraCallback in a real Trainer: the custom loop's bits, one KL a step, resuming, logging, precision, compilation."""

import copy
import types

import pytest
import torch
from models import attached, gpt2, image_batch, same, token_batch, vit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import cobra
from cobra.integrations.checks import check_devices
from cobra.integrations.transformers import CHECKPOINT, CobraCallback

SEARCH, STEPS, RATE = 5, 8, 1e-2
CONFIG = {"rank_budget": 10, "r_max": 4, "total_steps": 1, "beta": 0.5, "gate_lr_scale": 20.0}
ARGUMENTS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": RATE,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
PLAIN = {"optim": "adamw_torch", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}


def rows(build, count: int = 16) -> list[dict[str, torch.Tensor]]:
    """Examples of different lengths for language models."""
    batch = image_batch(count) if build is vit else token_batch(count, tokens=20)
    return [{key: value[i] for key, value in batch.items()} for i in range(count)]


def batches(data, size: int, count: int) -> list[dict[str, torch.Tensor]]:
    """As a sequential sampler deals them."""
    dealt = [[data[i % len(data)] for i in range(start, start + size)] for start in range(0, size * count, size)]
    return [{key: torch.stack([row[key] for row in each]) for key in each[0]} for each in dealt]


def trainer_of(folder, model, data=None, callbacks=(), optimizers=(None, None), eval_dataset=None, **changes) -> Trainer:
    data = rows(gpt2 if hasattr(model, "transformer") else vit) if data is None else data
    arguments = TrainingArguments(str(folder), **ARGUMENTS | changes)
    return Trainer(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=eval_dataset,
        callbacks=list(callbacks) or [CobraCallback()],
        optimizers=optimizers,
    )


def trained(folder, build=vit, config=None, resume=None, **changes):
    """The Trainer after training, and the adapter."""
    model, adapter = attached(build, **CONFIG | (config or {}))
    trainer = trainer_of(folder, model, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, adapter


def tensors(adapter) -> list[torch.Tensor]:
    return [tensor.detach() for tensor in adapter.state_dict().values()]


def logged(trainer, key: str) -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


def by_hand(model, adapter, data, size: int, steps: int, clip: float | None = None) -> list[float]:
    """README's loop over search, cut and the steps after it; the losses. Where gradients are clipped, the KL follows."""
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=RATE))
    losses = []
    for step, batch in enumerate(batches(data, size, steps)):
        if step == adapter.config.total_steps:
            adapter.apply(adapter.extract(), optimizer)
        # as the Trainer does: its count of tokens takes in the first of each text, which has no prediction
        items = {} if "input_ids" not in batch else {"num_items_in_batch": (batch["labels"] != -100).sum()}
        loss = model(**batch, **items).loss
        losses.append(loss.item())
        if clip is None:
            (loss + adapter.kl_loss()).backward()
        else:
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            if adapter.plan is None:
                adapter.kl_loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.step()
    return losses


@pytest.mark.parametrize("config", [{}, {"lora_B_lr_scale": 4.0}], ids=["one rate", "lora_B faster"])
def test_matches_the_custom_loop(config, tmp_path):
    """Losses, plan and parameters bit for bit; gates and lora_B at rates of their own."""
    trainer, adapter = trained(tmp_path, config=config, **PLAIN)
    model, own = attached(vit, **CONFIG | {"total_steps": SEARCH} | config)
    losses = by_hand(model, own, rows(vit), 4, STEPS)
    assert logged(trainer, "nll") == logged(trainer, "loss") == losses
    assert adapter.plan == own.plan and adapter.plan.total == CONFIG["rank_budget"]
    assert adapter.config == own.config and adapter.current_step == STEPS
    assert same(tensors(adapter), tensors(own))


def exact(build):
    """A model in fp64 without dropout, its adapter, and data: what differs then is no rounding."""
    model = build().double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    adapter = cobra.attach(model, cobra.CobraConfig(**CONFIG | {"total_steps": 3}))
    return model, adapter, [{k: v.double() if v.is_floating_point() else v for k, v in row.items()} for row in rows(build)]


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("build", [vit, gpt2])
def test_accumulation_changes_nothing(build, clip, tmp_path):
    """1, 4 and 8 micro-batches of 8 examples against full batches by hand; gpt2's loss the Trainer does not divide."""
    model, own, data = exact(build)
    by_hand(model, own, data, 8, 5, clip)
    for parts in (1, 4, 8):
        model, adapter, data = exact(build)
        changes = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts, "max_steps": 5}
        trainer_of(tmp_path, model, data, **PLAIN | changes | {"max_grad_norm": clip or 0.0}).train()
        assert adapter.plan.ranks == own.plan.ranks
        for found, expected in zip(adapter.plan.sites, own.plan.sites, strict=True):
            assert found.posterior == pytest.approx(expected.posterior, rel=0, abs=1e-8)
        for found, expected in zip(tensors(adapter), tensors(own), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("parts", [1, 4])
def test_a_custom_loss_leaves_the_kl_alone(parts, tmp_path):
    """A loss of zero, however it is scaled: the gates then move by the KL alone, which draws them to the prior."""
    model, adapter = attached(vit, **CONFIG | {"beta": 2.0})
    with torch.no_grad():
        for group in adapter.groups:
            group.gate.add_(1.0)
    optimizer = torch.optim.SGD(adapter.parameter_groups(lr=RATE))
    expected = torch.autograd.grad(adapter.kl_loss(), [group.gate for group in adapter.groups])
    before = [group.gate.detach().clone() for group in adapter.groups]
    trainer = trainer_of(
        tmp_path,
        model,
        callbacks=[CobraCallback(search_share=1.0)],
        optimizers=(optimizer, None),
        gradient_accumulation_steps=parts,
        max_steps=1,
        lr_scheduler_type="constant",
    )
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: 0.0 * outputs.logits.sum()
    gates = [group.gate for group in adapter.groups]
    trainer.train()
    for gate, start, gradient in zip(gates, before, expected, strict=True):
        torch.testing.assert_close(gate.detach(), start - RATE * CONFIG["gate_lr_scale"] * gradient)


@pytest.mark.parametrize("saved_at", [3, SEARCH, 7], ids=["in the search", "at the cut", "after the cut"])
@pytest.mark.parametrize(
    ("build", "grouped"), [(vit, {}), (gpt2, {"granularity": "block", "rank_budget": 4})], ids=["vit-site", "gpt2-block"]
)
def test_resumed_run_ends_with_the_same_bits(build, grouped, saved_at, tmp_path):
    """With dropout, decay, clipping, a schedule and accumulation. ViT's parameters have other names in the Trainer's own
    checkpoint, which loads none of them; GPT-2's are loaded from it, each block's gates among them."""
    changes = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2, "weight_decay": 0.1}
    config = {"dropout": 0.1, **grouped}
    straight, adapter = trained(tmp_path / "straight", build, config, **changes)
    path = tmp_path / "straight" / f"checkpoint-{saved_at}"
    torch.manual_seed(1)
    resumed, other = trained(tmp_path / "resumed", build, config, resume=str(path), **changes)
    assert other.plan == adapter.plan and other.current_step == adapter.current_step == STEPS
    assert other.state_dict().keys() == adapter.state_dict().keys()
    assert same(tensors(other), tensors(adapter))
    assert logged(resumed, "loss")[-(STEPS - saved_at) :] == logged(straight, "loss")[saved_at:]
    last = [torch.load(run / f"checkpoint-{STEPS}" / "scheduler.pt") for run in (tmp_path / "straight", tmp_path / "resumed")]
    assert last[0] == last[1]


def test_resumed_run_with_an_optimizer_of_ones_own(tmp_path):
    """Its groups stay as parameter_groups made them, through the cut and past it."""

    def run(folder, resume=None):
        model, adapter = attached(vit, **CONFIG)
        optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=RATE, weight_decay=0.1))
        trainer_of(folder, model, optimizers=(optimizer, None), save_strategy="steps", save_steps=6).train(resume)
        return adapter, optimizer

    adapter, optimizer = run(tmp_path)
    other, resumed = run(tmp_path / "resumed", str(tmp_path / "checkpoint-6"))
    assert same(tensors(other), tensors(adapter))
    assert [len(group["params"]) for group in optimizer.param_groups] == [
        len(group["params"]) for group in resumed.param_groups
    ]
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in resumed.param_groups]


def test_resuming_refuses(tmp_path):
    """Another config, a checkpoint without COBRA's file; and a search of another length goes on as it began."""
    changes = {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, max_steps=4, **changes)
    path = tmp_path / "checkpoint-2"
    with pytest.raises(ValueError, match=r"cobra\.safetensors was trained with beta=0\.5, this adapter has beta=0\.1"):
        trained(tmp_path / "other", config={"beta": 0.1}, resume=str(path), max_steps=4)
    with pytest.warns(UserWarning, match="goes on as it began, over 2 steps: search_share .* would make it 4 now"):
        _, adapter = trained(tmp_path / "longer", resume=str(path), max_steps=6)
    assert adapter.plan.provenance["step"] == 2
    (path / CHECKPOINT).unlink()
    with pytest.raises(ValueError, match=r"cobra\.safetensors is missing: the checkpoint was written without CobraCallback"):
        trained(tmp_path / "missing", resume=str(path), max_steps=4)


def test_temperature_follows_the_real_number_of_steps(tmp_path):
    """Epochs and accumulation count, not the config's guess."""
    trainer, adapter = trained(tmp_path, max_steps=-1, num_train_epochs=5, gradient_accumulation_steps=2)
    assert trainer.state.max_steps == 10 and adapter.config.total_steps == 6
    expected = [adapter.config.temperature_at(step) for step in range(1, 6)]
    assert logged(trainer, "temperature") == expected
    assert expected[0] == pytest.approx(10 ** (-1 / 6)) and adapter.config.temperature_at(6) == pytest.approx(0.1)


def test_logs_reach_tensorboard(tmp_path, monkeypatch):
    """Every value that the search is watched by, in the Trainer's own events and in its history."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer, adapter = trained(tmp_path, report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    watched = ["nll", "kl", "expected_rank", "layers_at_budget", "max_rank_at_budget", "gate_entropy", "undecided"]
    for key in watched:
        found = [event.value for event in events.Scalars(f"train/{key}")]
        assert found == pytest.approx(logged(trainer, key)) and len(found) == STEPS
    assert len(events.Scalars("train/temperature")) == SEARCH - 1
    assert logged(trainer, "kl")[0] == 0 < logged(trainer, "kl")[2]
    assert logged(trainer, "expected_rank")[-1] == adapter.plan.total
    assert logged(trainer, "max_rank_at_budget")[-1] == max(adapter.plan.ranks.values())
    assert logged(trainer, "gate_entropy")[0] == pytest.approx(1.0) and logged(trainer, "undecided")[0] == 1.0


# what a Trainer may be told to do


def test_activation_checkpointing_recomputes_with_the_same_gates(tmp_path):
    _, plain = trained(tmp_path, gpt2, **PLAIN)
    _, recomputed = trained(tmp_path, gpt2, **PLAIN, activation_checkpointing=True)
    assert recomputed.plan == plain.plan
    for found, expected in zip(tensors(recomputed), tensors(plain), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled(backend, tmp_path):
    """The compiled model follows gates, temperature and the cut."""
    some = {"config": {"target_modules": ("fc1",), "rank_budget": 3}, **PLAIN, "max_steps": 5}
    _, plain = trained(tmp_path, **some)
    torch.compiler.reset()
    trainer, compiled = trained(tmp_path, **some, torch_compile=True, torch_compile_backend=backend)
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    assert compiled.plan.ranks == plain.plan.ranks
    for found, expected in zip(tensors(compiled), tensors(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("build", [vit, gpt2])
def test_bf16(build, tmp_path):
    """Autocast leaves matrices, gates and their gradients in fp32."""
    trainer, adapter = trained(tmp_path, build, bf16=True, use_cpu=True)
    _, exact = trained(tmp_path, build)
    assert {t.dtype for t in tensors(adapter)} == {torch.float32}
    assert logged(trainer, "kl")[SEARCH - 2] > 0 and adapter.plan.total == CONFIG["rank_budget"]
    assert not same([group.layers[0][0].lora_B for group in adapter.groups[:1]], [exact.groups[0].layers[0][0].lora_B])


def test_evaluation_in_the_search_has_no_noise(tmp_path):
    """Mean gates: the same loss twice, and the one of the model in evaluation mode."""
    model, _ = attached(vit, **CONFIG)
    trainer = trainer_of(tmp_path, model, eval_dataset=rows(vit), eval_strategy="steps", eval_steps=2, max_steps=3)
    found = []
    trainer.add_callback(
        _AtEvaluation(lambda: found.append((model.training, model(**batches(rows(vit), 16, 1)[0]).loss.item())))
    )
    trainer.train()
    first = logged(trainer, "eval_loss")[0]
    assert found[0][0] is False and first == pytest.approx(found[0][1], rel=1e-5)


class _AtEvaluation(TrainerCallback):
    def __init__(self, look):
        self.look = look

    def on_evaluate(self, args, state, control, **kwargs):
        with torch.no_grad():
            self.look()


def test_early_stopping_and_the_best_model(tmp_path):
    """A model from before the cut is above the budget: the best is one of those after it, and loads into the cut model."""
    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.3}
    model, _ = attached(vit, **CONFIG)
    callbacks = [EarlyStoppingCallback(early_stopping_patience=2), CobraCallback(search_share=0.25)]
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_total_limit": 8}
    trainer = trainer_of(tmp_path, model, callbacks=callbacks, eval_dataset=rows(vit), **changes | best | {"max_steps": 12})
    trainer.train()
    assert 3 <= trainer.state.best_global_step < trainer.state.global_step < 12
    after = logged(trainer, "eval_loss")[2:]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(after), rel=1e-5)


def test_stopped_in_the_search(tmp_path):
    """Then the ranks are cut as the gates are."""
    model, adapter = attached(vit, **CONFIG)
    trainer = trainer_of(tmp_path, model, callbacks=[CobraCallback(), _StopAt(3)])
    with pytest.warns(
        UserWarning, match="training stopped at step 3 of a search of 5: the ranks are cut as gates and updates are"
    ):
        trainer.train()
    assert adapter.plan.total == CONFIG["rank_budget"]


class _StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step
        return control


def test_plain_lora_and_a_second_training(tmp_path):
    """Open gates: no KL, no temperature, every rank kept. Training again goes on at the ranks that are left."""
    config = {"gate": "open", "rank_budget": 12 * 4}
    trainer, adapter = trained(tmp_path, config=config, max_steps=4)
    assert adapter.plan.total == 48 and set(logged(trainer, "kl")) == {0.0} and not logged(trainer, "temperature")
    before = [tensor.clone() for tensor in tensors(adapter)]
    trainer.train()
    assert not same(tensors(adapter), before) and trainer.state.global_step == 4


# faults


def test_no_adapter_or_a_merged_one(tmp_path):
    with pytest.raises(
        ValueError, match=r"this ViTForImageClassification has 0: before the Trainer is made, call cobra\.attach"
    ):
        trainer_of(tmp_path, vit()).train()
    model, adapter = attached(vit, **CONFIG)
    adapter.merge()
    model.classifier.requires_grad_(True)
    with pytest.raises(ValueError, match=r"has 0: .* or adapter\.unmerge\(\) where it is merged"):
        trainer_of(tmp_path, model).train()
    twin = copy.deepcopy(attached(vit, **CONFIG)[0])
    with pytest.raises(ValueError, match="a copy of an adapted model has none"):
        trainer_of(tmp_path, twin).train()


def test_given_twice(tmp_path):
    """The second one does nothing: one KL, one step a step."""
    _, alone = trained(tmp_path, **PLAIN)
    with pytest.warns(UserWarning, match="CobraCallback was given twice: this one does nothing"):
        _, adapter = trained(tmp_path, callbacks=[CobraCallback(), CobraCallback()], **PLAIN)
    assert adapter.current_step == STEPS and same(tensors(adapter), tensors(alone))


def test_frozen_parameters(tmp_path):
    """As trl did to models it was given."""
    model, _ = attached(vit, **CONFIG)
    for name, p in model.named_parameters():
        if name.endswith("lora_A"):
            p.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"12 of the adapter's 38 parameters are frozen, e\.g\. vit\..*lora_A: something called"
    ):
        trainer_of(tmp_path, model).train()


def test_an_optimizer_without_the_gates(tmp_path):
    model, adapter = attached(vit, **CONFIG)
    matrices = torch.optim.AdamW([p for name, p in model.named_parameters() if p.requires_grad and "lora_gate" not in name])
    with (
        pytest.warns(UserWarning, match=r"the optimizer lacks the gate logits, e\.g\. .*lora_gate: they will not move"),
        pytest.warns(UserWarning, match="the gates never moved in 5 steps and are as the prior has them"),
    ):
        trainer_of(tmp_path, model, optimizers=(matrices, None)).train()
    assert adapter.plan.total == CONFIG["rank_budget"]
    model, adapter = attached(vit, **CONFIG)
    foreign = torch.optim.AdamW(vit().parameters())
    with pytest.raises(ValueError, match=r"the optimizer lacks 38 of the adapter's 38 parameters, e\.g\. vit"):
        trainer_of(tmp_path, model, optimizers=(foreign, None)).train()


def test_layers_that_the_loss_does_not_reach(tmp_path):
    """Named after the first backward; the others train."""
    model, _ = attached(vit, **CONFIG)
    layer = model.vit.layers[0].mlp.fc2
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias)
    with pytest.warns(UserWarning, match=r"1 of 12 adapted layers got no gradient in the first step, e\.g\. .*fc2: the loss"):
        trainer_of(tmp_path, model, max_steps=2).train()


def test_others_that_are_trained(tmp_path):
    model, _ = attached(vit, **CONFIG)
    model.vit.layernorm.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"2 parameters outside the adapter are trained too, e\.g\. vit\.layernorm\.weight"):
        trainer_of(tmp_path, model, max_steps=2).train()


def test_an_optimizer_whose_steps_are_not_seen(tmp_path):
    """Its step goes past torch's hooks: no KL, no gates."""

    model, adapter = attached(vit, **CONFIG)
    optimizer = torch.optim.SGD(adapter.parameter_groups(lr=RATE))
    optimizer.step = types.MethodType(type(optimizer).step.__wrapped__, optimizer)
    with (
        pytest.warns(UserWarning, match=r"the KL never arrived: SGD\.step ran without its hooks"),
        pytest.warns(UserWarning, match="the KL never arrived at the gates"),
    ):
        trainer_of(tmp_path, model, optimizers=(optimizer, None)).train()
    assert adapter.current_step == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"deepspeed": "zero3.json"}, r"take deepspeed= and fsdp= out of the arguments"),
        ({"fsdp": "full_shard"}, r"take deepspeed= and fsdp= out of the arguments"),
        (
            {"world_size": 2, "torch_compile": True},
            r"2 processes, torch_compile and search_share=0\.6: .* \(search_share=1\.0\)",
        ),
    ],
)
def test_devices_that_are_refused(arguments, words):
    given = types.SimpleNamespace(**{"deepspeed": None, "fsdp": None, "world_size": 1} | arguments)
    with pytest.raises(ValueError, match=words):
        check_devices(given, 0.6)


@pytest.mark.parametrize("changes", [{"search_share": 0.0}, {"search_share": 1.5}, {"max_bad_steps": 0}])
def test_rejects(changes):
    name, value = next(iter(changes.items()))
    with pytest.raises(ValueError, match=f"{name}={value}: expected"):
        CobraCallback(**changes)
