"""What a search does around every step of an optimizer, hung on the optimizer itself.

However gradients were accumulated, scaled and clipped before, the KL arrives once a step; and a step that a GradScaler leaves
out because of an overflow moves neither gates nor temperature.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from cobra.adapter import Adapter
from cobra.integrations.checks import torch_optimizer


class StepHooks:
    """Before a step: refuses gradients that are not finite, adds the KL's gradient, gives gates and lora_B their learning
    rates. After it: `adapter.step()`. Layers without a gradient at the first step are named in a warning. Where a step is given
    a closure, what comes before a step comes behind the closure's backward.

    optimizer: torch's, or one that accelerate has prepared

    max_bad_steps: so many steps in a row with gradients that are not finite end the training with a FloatingPointError

    seen: steps the optimizer was asked for; taken: those it took; bad: those refused here; kl_added: those with a KL
    """

    def __init__(self, adapter: Adapter, optimizer: Optimizer, max_bad_steps: int = 5):
        optimizer = torch_optimizer(optimizer)
        self.adapter, self.optimizer, self.max_bad_steps = adapter, optimizer, max_bad_steps
        self.seen = self.taken = self.bad = self.kl_added = 0
        self._bad_in_a_row = 0
        self._skipping = False
        self._depth = 0  # of steps within steps: where a class calls its parent's, torch has hooks around both
        self._shared: list[tuple[dict, list[nn.Parameter]]] = []
        self._handles = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]
        self._followed: list[RemovableHandle] = []
        self.watch()

    def watch(self) -> None:
        """Follows the trainable parameters from now on; after a cut they are others."""
        self._named = [(name, p) for name, p in self.adapter.model.named_parameters() if p.requires_grad]
        self._norms: dict[str, Tensor] = {}
        for handle in self._followed:
            handle.remove()
        # a layer's lora_B speaks for it: whatever spoils lora_A and gate comes through the same x, z and dL/dy
        self._followed = [
            p.register_post_accumulate_grad_hook(partial(self._note, name))
            for name, p in self._named
            if not name.endswith((".lora_A", ".lora_gate"))
        ]

    def remove(self) -> None:
        self._unshare()
        for handle in self._handles + self._followed:
            handle.remove()
        self._handles, self._followed = [], []

    @torch.no_grad()
    def _note(self, name: str, p: Tensor) -> None:
        """The norm as the gradient arrives: clipping spreads one that is not finite over all the others."""
        self._depth = 0  # whatever became of the last step
        self._norms.pop(name, None)  # the order is that of the last backward
        self._norms[name] = torch.linalg.vector_norm(p.grad)

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self._depth += 1
        if self._depth > 1:
            return None
        self.seen += 1
        self._skipping = False
        _, *given = args  # the first is the optimizer
        if callable(closure := kwargs.get("closure", given[0] if given else None)):
            return (args[0],), kwargs | {"closure": partial(self._closed, closure)}
        self._prepare()
        return None

    def _closed(self, closure: Callable) -> object:
        """The closure, and what comes before a step."""
        depth = self._depth
        with torch.enable_grad():
            loss = closure()
        self._depth = depth  # `_note` takes a backward for the end of a step
        self._prepare()
        return loss

    def _prepare(self) -> None:
        optimizer = self.optimizer
        if self.seen == 1:
            self._warn_of_unreached()
        overflow = getattr(optimizer, "found_inf", None)  # a fused optimizer is called in spite of it, and does nothing
        self._skipping = overflow is not None and bool(overflow)
        if not self._skipping:
            self._skipping = self._refuse_bad_gradients()
        self._norms.clear()
        if not self._skipping:
            self._add_kl()
            self._give_rates()

    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth:
            return
        self._unshare()
        if not self._skipping:
            self.taken += 1
            self.adapter.step()

    def _warn_of_unreached(self) -> None:
        matrices = [(name.rpartition(".")[0], p) for name, p in self._named if name.endswith(".lora_B")]
        unreached = [layer for layer, p in matrices if p.grad is None]
        if unreached:
            warnings.warn(
                f"{len(unreached)} of {len(matrices)} adapted layers got no gradient in the first step, e.g. {unreached[0]}: "
                "the loss does not pass through them (a trainer that reads lm_head.weight itself, a layer that the model does "
                "not call, reentrant activation checkpointing); they will not train: leave them out with target_modules",
                stacklevel=3,
            )

    # gradients that are not finite

    def _refuse_bad_gradients(self) -> bool:
        """Whether any is; then none is left, so that the step changes nothing."""
        arrived = [(name, p.grad) for name, p in self._named if p.grad is not None]
        if not arrived:
            return False
        norms = _stacked(torch._foreach_norm([grad for _, grad in arrived]))
        if torch.isfinite(norms).all():
            self._bad_in_a_row = 0
            return False
        self.bad += 1
        self._bad_in_a_row += 1
        where = self._where(dict(zip([name for name, _ in arrived], norms, strict=True)))
        for _, p in self._named:
            p.grad = None
        if self._bad_in_a_row >= self.max_bad_steps:
            raise FloatingPointError(
                f"gradients were not finite in {self._bad_in_a_row} steps in a row (max_bad_steps), now those of "
                f"{where.removesuffix(',')}; lower the learning rate, train in bf16 or fp32 instead of fp16, or look at the "
                "batches of these steps"
            )
        warnings.warn(f"gradients of {where} are not finite: step skipped ({self.bad} so far)", stacklevel=2)
        return True

    def _where(self, norms: dict[str, Tensor]) -> str:
        """The layers concerned, in the order of their gradients' arrival where that is known."""
        if self._norms and not torch.isfinite(_stacked(self._norms.values())).all():
            norms = self._norms
        finite: dict[str, bool] = {}
        for name, ok in zip(norms, torch.isfinite(_stacked(norms.values())).tolist(), strict=True):
            layer = name.rpartition(".")[0]
            finite[layer] = finite.get(layer, True) and ok
        bad = [layer for layer, ok in finite.items() if not ok]
        return f"{len(bad)} of {len(finite)} layers, first {bad[0]},"

    # gates

    def _add_kl(self) -> None:
        """The KL's gradient, added to the logits' own: outside of the loss nothing can scale it."""
        gates = [group.gate for group in self.adapter.groups if group.gate is not None and group.gate.requires_grad]
        if not gates:
            return
        with torch.enable_grad():
            grads = torch.autograd.grad(self.adapter.kl_loss(), gates)
        scale = getattr(self.optimizer, "grad_scale", None)  # a fused optimizer divides by it itself
        for gate, grad in zip(gates, grads, strict=True):
            grad = grad if scale is None else grad * scale
            gate.grad = grad if gate.grad is None else gate.grad + grad
        self.kl_added += 1

    def _give_rates(self) -> None:
        """Gates and lora_B that share a parameter group with others get one of their own: the group's rate times
        gate_lr_scale, without decay, or times lora_B_lr_scale.

        It lasts for the step, so that schedulers and checkpoints see the groups they know.
        """
        config = self.adapter.config
        self._give_rate({id(group.gate) for group in self.adapter.groups}, config.gate_lr_scale, {"weight_decay": 0.0})
        if config.lora_B_lr_scale != 1:
            layers = [layer for group in self.adapter.groups for layer in group.all_layers]
            self._give_rate({id(layer.lora_B) for layer in layers}, config.lora_B_lr_scale, {})

    def _give_rate(self, members: set[int], scale: float, changes: dict) -> None:
        for group in list(self.optimizer.param_groups):
            own = [p for p in group["params"] if id(p) in members]
            if not own or len(own) == len(group["params"]):
                continue
            self._shared.append((group, group["params"]))
            group["params"] = [p for p in group["params"] if id(p) not in members]
            rate = {} if group["lr"] is None else {"lr": group["lr"] * scale}
            known = {key: value for key, value in changes.items() if key in group}
            self.optimizer.param_groups.append({**group, "params": own, **rate, **known})

    def _unshare(self) -> None:
        for group, params in reversed(self._shared):
            group["params"] = params
        if self._shared:
            del self.optimizer.param_groups[-len(self._shared) :]
        self._shared = []


def _stacked(norms: Iterable[Tensor]) -> Tensor:
    """(n,) on the first one's device."""
    norms = list(norms)
    return torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms])
