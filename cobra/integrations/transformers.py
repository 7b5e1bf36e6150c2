"""COBRA in transformers' Trainer, and in those that build on it (trl's SFTTrainer)."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from cobra import checkpoint, storage
from cobra.adapter import Adapter
from cobra.integrations.checks import check_devices, check_trained, find_adapter, refuse_peft, torch_optimizer
from cobra.integrations.ddp import rewrap
from cobra.integrations.hooks import StepHooks
from cobra.integrations.resuming import CHECKPOINT, follow_resuming
from cobra.optimizer_state import to_parts
from cobra.plan import RankPlan

UNDECIDED = (0.1, 0.9)


class CobraCallback(TrainerCallback):
    """Searches, cuts and trains on the adapter attached to the model that a Trainer trains.

    The first `search_share` of the optimizer steps is the search, over which the temperature anneals; then the plan of the
    config's budget is applied, and the rest of the steps trains the ranks that are left. The KL's gradient is added to that of
    the gates once an optimizer step, after clipping; it is no part of the loss that the Trainer sees.

    search_share: above 0 and up to 1; at 1 the cut follows the last step
    max_bad_steps: so many steps in a row with gradients that are not finite end the training with a FloatingPointError

    adapter: the adapter found when training begins; plan: what was applied, None before
    """

    def __init__(self, search_share: float = 0.6, max_bad_steps: int = 5):
        if not 0 < search_share <= 1:
            raise ValueError(f"search_share={search_share!r}: expected a share of the steps, above 0 and up to 1")
        if not max_bad_steps >= 1:
            raise ValueError(f"max_bad_steps={max_bad_steps!r}: expected a number of steps, at least 1")
        self.search_share, self.max_bad_steps = search_share, max_bad_steps
        self.adapter: Adapter | None = None
        self.search_steps: int | None = None
        self._optimizer: Optimizer | None = None
        self._layout: list[int] = []
        self._hooks: StepHooks | None = None
        self._handles: list[RemovableHandle] = []
        follow_resuming(CobraCallback)

    @property
    def plan(self) -> RankPlan | None:
        return None if self.adapter is None else self.adapter.plan

    # events

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if isinstance(model, nn.Module):
            refuse_peft(model)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self._release()
        if self._is_second():
            warnings.warn("CobraCallback was given twice: this one does nothing", stacklevel=2)
            return
        refuse_peft(model)
        self.adapter = find_adapter(model)
        check_devices(args, self.search_share)
        self._optimizer = torch_optimizer(optimizer)
        check_trained(model, self.adapter, self._optimizer)
        self._layout = [len(group["params"]) for group in self._optimizer.param_groups]
        self.search_steps = max(1, round(self.search_share * state.max_steps))
        if state.global_step:
            self._resume(Path(_calling("resume_from_checkpoint")) / CHECKPOINT)
        else:
            self._set_length()
            self.adapter.move_to_step(0)
        self._check_saving(args)
        if args.load_best_model_at_end and self.plan is None and self.search_steps >= state.max_steps:
            warnings.warn(
                "load_best_model_at_end has no effect: the cut follows the last step, and models from before it are above the "
                "budget; to choose among models after the cut, pass a search_share below 1",
                stacklevel=2,
            )
        self._hooks = StepHooks(self.adapter, self._optimizer, self.max_bad_steps)
        self._handles.append(self._optimizer.register_state_dict_post_hook(self._as_before_the_cut))

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        if self._hooks is None:
            return
        if not self._hooks.seen and not getattr(optimizer, "step_was_skipped", False):
            warnings.warn(
                f"the KL never arrived: {type(self._optimizer).__name__}.step ran without its hooks, and gates and temperature "
                "stand still; pass the Trainer an optimizer that calls torch.optim.Optimizer.__init__",
                stacklevel=2,
            )
            self._hooks.seen = 1  # said once
        if self._hooks.taken == 1:
            self._check_saving(args)  # the optimizer has its state now
        if self.plan is None and state.global_step >= self.search_steps:
            self._cut(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._hooks is None or not logs or "loss" not in logs:
            return
        values = {"nll": logs["loss"], **_gate_metrics(self.adapter)}
        if self._hooks.bad:
            values["bad_steps"] = self._hooks.bad
        for target in (logs, state.log_history[-1]):
            for key, value in values.items():
                target.setdefault(key, value)

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self._hooks is None or not args.should_save or args.save_only_model or not folder.is_dir():
            return
        self._handles.pop().remove()
        self.adapter.save_checkpoint(folder / CHECKPOINT, self._optimizer)
        self._handles.append(self._optimizer.register_state_dict_post_hook(self._as_before_the_cut))

    def on_train_end(self, args, state, control, **kwargs):
        if self._hooks is None:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint:
            best = Path(state.best_model_checkpoint) / CHECKPOINT
            if best.is_file():  # the Trainer loads by names, and some models save under others than they have
                self._load(best)
        if self.plan is None:
            if state.global_step < self.search_steps:
                warnings.warn(
                    f"training stopped at step {state.global_step} of a search of {self.search_steps}: the ranks are cut as "
                    "gates and updates are now",
                    stacklevel=2,
                )
            self._cut(state)
        self._release()

    # parts

    def _release(self) -> None:
        if self._hooks is not None:
            self._hooks.remove()
        for handle in self._handles:
            handle.remove()
        self._hooks, self._handles = None, []

    def _check_saving(self, args) -> None:
        """Before time is spent on a run whose first checkpoint would end it."""
        if args.save_strategy != "no" and not args.save_only_model:
            to_parts(self._optimizer)  # raises for what no checkpoint can keep

    def _is_second(self) -> bool:
        """Whether another CobraCallback comes before; the first one goes to the front, so that all loggers get what it logs."""
        callbacks = _calling("self", CallbackHandler).callbacks
        if next(c for c in callbacks if isinstance(c, CobraCallback)) is not self:
            return True
        callbacks.remove(self)
        callbacks.insert(0, self)
        return False

    def _set_length(self) -> None:
        self.adapter.config = dataclasses.replace(self.adapter.config, total_steps=self.search_steps)

    def _resume(self, path: Path) -> None:
        """Adapter and optimizer from COBRA's file; the scheduler and the random states are the Trainer's to load."""
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: the checkpoint was written without CobraCallback, or the run died while it was written; "
                "resume from the checkpoint before"
            )
        planned, config = self.search_steps, storage.read_tensors(path, checkpoint.KIND)[1]["config"]
        self.search_steps = config["total_steps"]
        if self.search_steps != planned:
            warnings.warn(
                f"the search goes on as it began, over {self.search_steps} steps: search_share and the number of steps would "
                f"make it {planned} now",
                stacklevel=3,
            )
        self._set_length()
        self._load(path, self._optimizer)
        if self.plan is not None:
            _rewrap_model()

    def _load(self, path: Path, optimizer: Optimizer | None = None) -> None:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            self.adapter.load_checkpoint(path, optimizer)

    def _as_before_the_cut(self, optimizer: Optimizer, state: dict) -> dict:
        """The Trainer loads its optimizer.pt before any callback could cut; the state itself is in COBRA's file."""
        if [len(group["params"]) for group in state["param_groups"]] == self._layout:
            return state
        numbers = iter(range(sum(self._layout)))
        sizes = zip(state["param_groups"], self._layout, strict=True)
        return {"state": {}, "param_groups": [{**g, "params": [next(numbers) for _ in range(n)]} for g, n in sizes]}

    def _cut(self, state) -> None:
        gates = [(g.gate, g.prior) for g in self.adapter.groups if g.gate is not None]
        if gates and not self._hooks.kl_added and self.adapter.config.beta:
            warnings.warn("the KL never arrived at the gates: they are frozen, or no step was taken", stacklevel=3)
        if gates and all(bool((gate == gate.new_tensor(prior)).all()) for gate, prior in gates):
            warnings.warn(
                f"the gates never moved in {self._hooks.taken} steps and are as the prior has them; check gate_lr_scale, "
                "and that the optimizer holds the gate logits",
                stacklevel=3,
            )
        self.adapter.apply(self.adapter.extract(), self._optimizer)
        self._hooks.watch()
        _rewrap_model()
        # models from before the cut are above the budget: none of them can be the best
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def _calling(name: str, kind: type | tuple[type, ...] = (str, os.PathLike)):
    """A variable of the Trainer that calls, by name and type.

    No event is given the list of callbacks, the order in which loggers are asked, or the checkpoint that is resumed from.
    """
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get(name), kind):
        frame = frame.f_back
    if frame is None:
        raise RuntimeError(f"no Trainer calls, or one without {name!r}: CobraCallback is for transformers' Trainer")
    return frame.f_locals[name]


def _rewrap_model() -> None:
    """After a cut: the Trainer's DistributedDataParallel holds the parameters from before it."""
    wrapped = _calling("self", Trainer).model_wrapped
    if isinstance(wrapped, DistributedDataParallel):
        rewrap(wrapped)


def _gate_metrics(adapter: Adapter) -> dict[str, float]:
    """kl: as it enters the ELBO, beta included. gate_entropy: mean over the gates, in bits. undecided: share of the gates whose
    posterior is between 0.1 and 0.9. layers_at_budget, max_rank_at_budget: as the cut would leave them now."""
    ranks = (adapter.extract() if adapter.plan is None else adapter.plan).ranks.values()
    values = {
        "kl": adapter.kl_loss().item(),
        "expected_rank": math.fsum(adapter.expected_ranks().values()),
        "layers_at_budget": sum(rank > 0 for rank in ranks),
        "max_rank_at_budget": max(ranks, default=0),
    }
    if adapter.config.samples and adapter.plan is None:
        values["temperature"] = adapter.config.temperature_at(adapter.current_step)
    gates = [group.gate.detach().double().cpu() for group in adapter.groups if group.gate is not None]
    if not gates:
        return values | {"gate_entropy": 0.0, "undecided": 0.0}
    p = torch.cat(gates).sigmoid()
    entropy = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).mean() / math.log(2)
    undecided = ((p > UNDECIDED[0]) & (p < UNDECIDED[1])).double().mean()
    return values | {"gate_entropy": entropy.item(), "undecided": undecided.item()}
