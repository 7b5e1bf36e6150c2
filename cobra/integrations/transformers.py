"""COBRA in transformers' Trainer, and in those that build on it (trl's SFTTrainer)."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import warnings

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler, ExportableState

from cobra.adapter import Adapter
from cobra.integrations.hooks import StepHooks
from cobra.linear import adapters_of
from cobra.plan import RankPlan

UNDECIDED = (0.1, 0.9)


class CobraCallback(TrainerCallback, ExportableState):
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
        self.progress: dict | None = None
        self._hooks: StepHooks | None = None

    @property
    def plan(self) -> RankPlan | None:
        return None if self.adapter is None else self.adapter.plan

    def state(self) -> dict:
        """What the Trainer writes into trainer_state.json at every checkpoint; gates need no more than the step."""
        if self.adapter is not None:
            self.progress = {
                "search_steps": self.search_steps,
                "step": self.adapter.current_step,
                "fingerprint": self.adapter.base_fingerprint,
                "config": self.adapter.config.to_dict(),
                "priors": [group.prior for group in self.adapter.groups],
                "plan": None if self.adapter.plan is None else self.adapter.plan.to_dict(),
            }
        args = {"search_share": self.search_share, "max_bad_steps": self.max_bad_steps}
        return {"args": args, "attributes": {"progress": self.progress}}

    # events

    def on_init_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        for adapter in adapters_of(model) if isinstance(model, nn.Module) else []:
            adapter.loading_optimizer = optimizer

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self._release()
        if self._is_second():
            warnings.warn("CobraCallback was given twice: this one does nothing", stacklevel=2)
            return
        self.adapter = _find_adapter(model)
        _check_devices(args, self.search_share)
        self._optimizer = _torch_optimizer(optimizer)
        _check_trained(model, self.adapter, self._optimizer)
        if state.global_step:
            self._resume(state)
        else:
            self.search_steps = max(1, round(self.search_share * state.max_steps))
        self._set_length()
        if not state.global_step and self.plan is None:
            self.adapter.move_to_step(0)
        self._hooks = StepHooks(self.adapter, self._optimizer, self.max_bad_steps)

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

    def on_train_end(self, args, state, control, **kwargs):
        if self._hooks is None:
            return
        if self.plan is None:
            if state.global_step < self.search_steps:
                warnings.warn(
                    f"training stopped at step {state.global_step} of a search of {self.search_steps}: the ranks are cut as "
                    "the gates are now",
                    stacklevel=2,
                )
            self._cut(state)
        self._release()

    # parts

    def _release(self) -> None:
        if self._hooks is not None:
            self._hooks.remove()
        self._hooks = None

    def _is_second(self) -> bool:
        """Whether another CobraCallback comes before; the first one goes to the front, so that all loggers get what it logs."""
        callbacks = _calling_handler().callbacks
        if next(c for c in callbacks if isinstance(c, CobraCallback)) is not self:
            return True
        callbacks.remove(self)
        callbacks.insert(0, self)
        return False

    def _set_length(self) -> None:
        self.adapter.config = dataclasses.replace(self.adapter.config, total_steps=self.search_steps)
        self.adapter.move_to_step(self.adapter.current_step)

    def _resume(self, state) -> None:
        """Model, optimizer and scheduler are loaded; the rest is in the Trainer's state."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        saved = saved[0] if isinstance(saved, list) else saved
        progress = saved["attributes"]["progress"] if saved else None
        if progress is None:
            raise ValueError(f"the checkpoint at step {state.global_step} was written without CobraCallback: start anew")
        adapter = self.adapter
        if progress["fingerprint"] != adapter.base_fingerprint:
            raise ValueError(
                f"the checkpoint is of another model: fingerprint {progress['fingerprint']}, this adapter's is "
                f"{adapter.base_fingerprint}"
            )
        ours = json.loads(json.dumps(adapter.config.to_dict()))
        for field in ours.keys() - {"total_steps"}:
            if progress["config"].get(field) != ours[field]:
                raise ValueError(
                    f"the checkpoint was trained with {field}={progress['config'].get(field)!r}, this adapter has "
                    f"{field}={ours[field]!r}"
                )
        plan = None if progress["plan"] is None else RankPlan.from_dict(progress["plan"])
        ranks = {g.name: g.rank for g in adapter.groups}
        if (plan is None) != (adapter.plan is None) or (plan and ranks != {s.name: s.rank for s in plan.sites if s.rank}):
            raise ValueError(
                "the checkpoint's ranks are not the adapter's; attach a fresh one to the base model, and make a new Trainer"
            )
        adapter.plan = plan
        for group, prior in zip(adapter.groups, progress["priors"], strict=True):
            group.prior = prior
        self.search_steps = progress["search_steps"]
        adapter.move_to_step(progress["step"])

    def _cut(self, state) -> None:
        gates = [(g.gate, g.prior) for g in self.adapter.groups if g.gate is not None]
        if gates and not self._hooks.kl_added and self.adapter.config.beta:
            warnings.warn("the KL never arrived at the gates: they are frozen, or no step was taken", stacklevel=3)
        if gates and all(bool((gate == torch.tensor(prior).to(gate)).all()) for gate, prior in gates):
            warnings.warn(
                f"the gates never moved in {self._hooks.taken} steps: the prior alone decides the ranks; check gate_lr_scale, "
                "and that the optimizer holds the gate logits",
                stacklevel=3,
            )
        self.adapter.apply(self.adapter.extract(), self._optimizer)
        self._hooks.watch()
        # models from before the cut are above the budget: none of them can be the best
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def _calling_handler() -> CallbackHandler:
    """The Trainer's list of callbacks, from the frame that calls: no event is given it, and loggers are asked in its order."""
    frame = inspect.currentframe()
    while not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
        if frame is None:
            raise RuntimeError("CobraCallback is driven by a transformers Trainer; in a loop of your own call adapter.step()")
    return frame.f_locals["self"]


def _find_adapter(model: nn.Module) -> Adapter:
    found = adapters_of(model)
    if len(found) != 1 or found[0]._merged is not None:
        raise ValueError(
            f"CobraCallback trains one adapter, and this {type(model).__name__} has "
            f"{'a merged one' if len(found) == 1 else len(found)}: before the Trainer is made, call cobra.attach(model, "
            "config, scores), or adapter.unmerge() where it is merged; a copy of an adapted model has none"
        )
    return found[0]


def _check_devices(args, search_share: float) -> None:
    if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
        raise ValueError("CobraCallback works on one device or under DDP: take deepspeed= and fsdp= out of the arguments")
    if args.world_size > 1 and search_share < 1:
        raise ValueError(
            f"{args.world_size} processes and search_share={search_share}: DDP cannot follow a cut in the middle of training; "
            "search to the end (search_share=1.0)"
        )


def _torch_optimizer(optimizer) -> Optimizer:
    """Without accelerate's wrappers."""
    while not isinstance(optimizer, Optimizer) or hasattr(optimizer, "optimizer"):
        if not hasattr(optimizer, "optimizer"):
            raise ValueError(f"CobraCallback needs a torch.optim.Optimizer, found {type(optimizer).__name__}")
        optimizer = optimizer.optimizer
    return optimizer


def _check_trained(model: nn.Module, adapter: Adapter, optimizer: Optimizer) -> None:
    """Raises ValueError where matrices or heads are not trained; warns of gates that are not, and of others that are."""
    names = {id(p): name for name, p in model.named_parameters()}
    ours = {id(p): p for group in adapter.parameter_groups(1.0) for p in group["params"]}
    gates = {id(group.gate) for group in adapter.groups}
    frozen = [names[i] for i, p in ours.items() if not p.requires_grad]
    if frozen:
        raise ValueError(
            f"{len(frozen)} of the adapter's {len(ours)} parameters are frozen, e.g. {frozen[0]}: something called "
            "requires_grad_(False) after attach(); attach last, and let nothing else prepare the model for training"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [i for i in ours if i not in held]
    if any(i not in gates for i in missing):
        raise ValueError(
            f"the optimizer lacks {len(missing)} of the adapter's {len(ours)} parameters, e.g. {names[missing[0]]}: make it "
            "from adapter.parameter_groups(lr), or let the Trainer make it; after attach() in both cases"
        )
    if missing:
        warnings.warn(
            f"the optimizer lacks the gate logits, e.g. {names[missing[0]]}: they will not move, and the prior alone decides "
            "the ranks; make it from adapter.parameter_groups(lr), or let the Trainer make it",
            stacklevel=3,
        )
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
    if others:
        warnings.warn(
            f"{len(others)} parameters outside the adapter are trained too, e.g. {others[0]}: they are no part of what the "
            "adapter saves; freeze them, or name their modules in modules_to_save",
            stacklevel=3,
        )


def _gate_metrics(adapter: Adapter) -> dict[str, float]:
    """kl: as it enters the ELBO, beta included. gate_entropy: mean over the gates, in bits. undecided: share of the gates whose
    posterior is between 0.1 and 0.9. layers_at_budget, max_rank_at_budget: as the cut would leave them now."""
    ranks = (adapter.extract() if adapter.plan is None else adapter.plan).ranks.values()
    values = {
        "kl": adapter.kl_loss().item(),
        "expected_rank": math.fsum(adapter.expected_ranks().values()),
        "layers_at_budget": sum(rank > 0 for rank in ranks),
        "max_rank_at_budget": max(ranks),
    }
    if adapter.config.gate == "concrete" and adapter.plan is None:
        values["temperature"] = adapter.config.temperature_at(adapter.current_step)
    gates = [group.gate.detach().double().cpu() for group in adapter.groups if group.gate is not None]
    if not gates:
        return values | {"gate_entropy": 0.0, "undecided": 0.0}
    p = torch.cat(gates).sigmoid()
    entropy = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).mean() / math.log(2)
    undecided = ((p > UNDECIDED[0]) & (p < UNDECIDED[1])).double().mean()
    return values | {"gate_entropy": entropy.item(), "undecided": undecided.item()}
