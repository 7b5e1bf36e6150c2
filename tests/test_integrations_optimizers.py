"""CobraCallback beside optimizers of 8 bits, and Trainers that resume, whatever was made before the callback."""

import warnings
from pathlib import Path

import pytest
import torch
from models import attached, gpt2, same, state_of, token_batch, vit
from test_integrations_transformers import CONFIG, RATE, SEARCH, STEPS, logged, rows, tensors, trainer_of
from torch import nn
from transformers import TrainerCallback

from cobra.integrations.transformers import CHECKPOINT, CobraCallback

SAVING = {"save_strategy": "steps", "save_steps": 1}


def wide() -> nn.Module:
    """Moments of fewer than 4,096 elements stay as they are in every optimizer of 8 bits."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=256, n_layer=1, n_head=4)).eval()


def cut_warnings(caught) -> list[str]:
    return [str(each.message) for each in caught if "cannot be cut rank by rank" in str(each.message)]


@pytest.mark.parametrize(
    ("optim", "name"),
    [
        ("adamw_8bit", "bitsandbytes.AdamW keeps 'state1'"),
        ("lion_8bit", "bitsandbytes.Lion keeps 'state1'"),
        ("ademamix", "bitsandbytes.AdEMAMix keeps 'state1'"),
        ("adamw_torch_8bit", "torchao.AdamW8bit keeps 'exp_avg'"),
        ("adamw_torch_4bit", "torchao.AdamW4bit keeps 'exp_avg'"),
    ],
)
def test_optimizers_with_state_that_cannot_be_cut(optim, name, tmp_path):
    """Search, cut with one warning, the steps after it, and resuming before and after the cut with the same bits."""

    def run(folder, resume=None):
        model, adapter = attached(wide, **CONFIG | {"r_max": 16, "rank_budget": 20})
        trainer = trainer_of(folder, model, data, optim=optim, **SAVING | {"save_steps": 3})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train(resume_from_checkpoint=resume)
        return adapter, cut_warnings(caught)

    batch = token_batch(16, tokens=20)
    data = [{key: value[i] for key, value in batch.items()} for i in range(16)]
    with torch.compiler.set_stance("force_eager"):  # torchao's steps take a minute to compile
        straight, said = run(tmp_path / "straight")
        assert len(said) == 1 and said[0].startswith(name) and straight.plan.total == 20 and straight.current_step == STEPS
        for step, repeated in ((3, 1), (6, 0)):
            resumed, said = run(tmp_path / "resumed", str(tmp_path / "straight" / f"checkpoint-{step}"))
            assert len(said) == repeated and resumed.plan == straight.plan
            assert same(tensors(resumed), tensors(straight))


def test_an_optimizer_that_no_checkpoint_can_keep(tmp_path):
    """It is refused after the first step, when its state is there, and not where the first checkpoint would have been."""

    def projected(optimizer, *_):
        for values in optimizer.state.values():
            values["projector"] = object()

    def run(**changes):
        model, adapter = attached(vit, **CONFIG)
        optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=RATE))
        optimizer.register_step_post_hook(projected)
        trainer_of(tmp_path, model, optimizers=(optimizer, None), **changes).train()
        return adapter

    with pytest.raises(ValueError, match=r"the state 'projector' of torch\.AdamW holds a object, which no checkpoint can keep"):
        run(save_strategy="steps", save_steps=4)
    assert not list(tmp_path.glob("checkpoint-*"))
    with pytest.warns(UserWarning, match=r"torch\.AdamW keeps 'projector' as object \(no tensor\)"):
        adapter = run(save_strategy="no")
    assert adapter.current_step == STEPS and adapter.plan.total == CONFIG["rank_budget"]


def test_a_step_within_a_step(tmp_path):
    """A class that calls its parent's step has torch's hooks around both, once the parent has been made: one step even so."""

    class Own(torch.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    def run(kind):
        model, adapter = attached(vit, **CONFIG)
        optimizer = kind(adapter.parameter_groups(lr=RATE))
        trainer_of(tmp_path, model, optimizers=(optimizer, None), save_strategy="no").train()
        return adapter

    expected, found = run(torch.optim.AdamW), run(Own)
    assert found.current_step == expected.current_step == STEPS
    assert same(tensors(found), tensors(expected))


# resuming


def started(folder, model=None):
    """A Trainer to which the callback was added when it was made already."""
    model = attached(gpt2, **CONFIG)[0] if model is None else model
    trainer = trainer_of(folder, model, rows(gpt2), callbacks=[TrainerCallback()], **SAVING)
    trainer.add_callback(CobraCallback())
    return trainer


@pytest.mark.parametrize("saved_at", [3, SEARCH, 7], ids=["in the search", "at the cut", "after the cut"])
def test_a_callback_that_is_added_later_resumes(saved_at, tmp_path):
    """GPT-2's matrices have the same names in the Trainer's checkpoint, and other shapes after the cut."""
    straight = started(tmp_path / "straight")
    straight.train()
    resumed = started(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{saved_at}"))
    assert same(list(resumed.model.state_dict().values()), list(straight.model.state_dict().values()))
    assert logged(resumed, "loss")[-1] == logged(straight, "loss")[-1]


class _Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            raise KeyboardInterrupt


@pytest.mark.parametrize("again", ["the same Trainer", "another Trainer"])
def test_a_cut_adapter_is_not_resumed_into(again, tmp_path):
    """In a notebook the interrupted model is still there; it is refused, one of another plan untouched."""
    trainer = started(tmp_path)
    trainer.add_callback(_Interrupt(7))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    model = trainer.model
    if again == "another Trainer":
        trainer = started(tmp_path, model=model)
    before = state_of(model), [tensor.clone() for tensor in model.state_dict().values()]
    for step in (3, 6):
        with pytest.raises(ValueError, match=r"cut already, and the run of .*-\d began before the cut: attach anew"):
            trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert state_of(model) == before[0]
        assert step == 6 or same(list(model.state_dict().values()), before[1])
    fresh = started(tmp_path / "fresh")
    fresh.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert fresh.state.global_step == STEPS


def test_an_interrupted_search_is_resumed_in_place(tmp_path):
    straight = started(tmp_path / "straight")
    straight.train()
    trainer = started(tmp_path)
    trainer.add_callback(_Interrupt(4))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(list(trainer.model.state_dict().values()), list(straight.model.state_dict().values()))


def test_a_training_that_began_after_the_cut_is_resumed(tmp_path):
    """Its checkpoints have the adapter's own shapes, in the Trainer's files too."""
    first = started(tmp_path / "first")
    first.train()

    def run(folder, resume=None):
        model, adapter = attached(gpt2, **CONFIG | {"total_steps": SEARCH})
        adapter.load_checkpoint(tmp_path / "first" / f"checkpoint-{STEPS}" / CHECKPOINT)
        started(folder, model=model).train(resume_from_checkpoint=resume)
        return adapter

    straight = run(tmp_path / "straight")
    resumed = run(tmp_path / "resumed", str(tmp_path / "straight" / "checkpoint-4"))
    assert same(tensors(resumed), tensors(straight))


def test_a_trainer_without_the_callback_loads_as_ever(tmp_path):
    """An adapter that is none of COBRA's business there: torch's own error for other shapes."""
    started(tmp_path).train()
    other = started(tmp_path / "other")
    other.remove_callback(CobraCallback)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))


@pytest.mark.parametrize(("share", "warned"), [(1.0, True), (0.6, False)])
def test_the_best_model_of_a_search_to_the_end(share, warned, tmp_path):
    """Models from before the cut are above the budget, so that the last one is the only one to choose from."""
    model, _ = attached(vit, **CONFIG)
    changes = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = trainer_of(tmp_path, model, callbacks=[CobraCallback(share)], eval_dataset=rows(vit), **SAVING | changes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(each.message) for each in caught if "load_best_model_at_end has no effect" in str(each.message)]
    assert len(said) == warned and (not said or "pass a search_share below 1" in said[0])
    assert not warned or trainer.state.best_global_step == STEPS
    assert Path(trainer.state.best_model_checkpoint).is_dir()
