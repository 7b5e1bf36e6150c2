"""What a Trainer loads of a checkpoint by itself, before any event tells a callback of it."""

from __future__ import annotations

import functools
from pathlib import Path

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from cobra import checkpoint, storage
from cobra.linear import adapters_of
from cobra.plan import RankPlan

CHECKPOINT = "cobra.safetensors"
WRAPPED = "_follows_cobra"  # what says so on a method of the Trainer


def follow_resuming(callback: type[TrainerCallback]) -> None:
    """From now on Trainers that have such a callback load checkpoints from before the cut and from after it, and refuse to into
    an adapter that is cut already, where the checkpoint's run began before that.

    Methods of the Trainer are wrapped, once: a callback that is added to one that is made already misses the event of its
    making, and none has an event before a checkpoint is loaded.
    """
    if getattr(Trainer._load_from_checkpoint, WRAPPED, False):
        return
    load, load_state = Trainer._load_from_checkpoint, Trainer._load_optimizer_and_scheduler

    def follows(trainer: Trainer) -> bool:
        return any(isinstance(each, callback) for each in trainer.callback_handler.callbacks)

    @functools.wraps(load)
    def load_cut_ranks(self: Trainer, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not follows(self):
            return load(self, resume_from_checkpoint, model)
        adapted = self.model if model is None else model
        _refuse_another_plan(adapted, Path(resume_from_checkpoint))
        handle = adapted.register_load_state_dict_pre_hook(_leave_out_cut_ranks)
        try:
            return load(self, resume_from_checkpoint, model)
        finally:
            handle.remove()

    @functools.wraps(load_state)
    def load_optimizer(self: Trainer, checkpoint: str | None) -> None:
        try:
            return load_state(self, checkpoint)
        except ValueError as error:  # optimizer.pt is laid out as before the cut where the run made that itself
            if "parameter group" in str(error) and follows(self) and any(a.plan is not None for a in adapters_of(self.model)):
                raise _cut_already(checkpoint) from error
            raise

    setattr(load_cut_ranks, WRAPPED, True)
    Trainer._load_from_checkpoint, Trainer._load_optimizer_and_scheduler = load_cut_ranks, load_optimizer


def _refuse_another_plan(model: nn.Module, folder: Path) -> None:
    plans = [adapter.plan for adapter in adapters_of(model) if adapter.plan is not None]
    if plans and (folder / CHECKPOINT).is_file():
        plan = storage.read_tensors(folder / CHECKPOINT, checkpoint.KIND)[1].get("plan")
        if plan is None or RankPlan.from_dict(plan) != plans[0]:
            raise _cut_already(folder)


def _cut_already(folder: Path | str) -> ValueError:
    return ValueError(
        f"this adapter is cut already, and the run of {folder} began before the cut: attach anew to the base model, make a new "
        "Trainer, and resume with that one; it cuts by itself where the run did"
    )


def _leave_out_cut_ranks(model: nn.Module, state: dict[str, Tensor], prefix: str, *_) -> None:
    """Before the Trainer loads a checkpoint into the model: matrices cut there and not yet here are COBRA's to load."""
    for name, p in model.named_parameters(remove_duplicate=False):
        key = prefix + name
        if name.endswith((".lora_A", ".lora_B")) and key in state and state[key].shape != p.shape:
            del state[key]
