"""What a run writes while it trains: history, gates, checkpoints; and the bar that shows it."""

from __future__ import annotations

import math

from transformers import TrainerCallback

from cobra.cli.training.folder import RunFolder
from cobra.cli.training.signals import Interruption
from cobra.integrations.transformers import CobraCallback
from cobra.progress import Progress
from cobra.report.run import append_gates, append_step

GATE_ROWS = 100
# in a row of history -> in the Trainer's log
NAMES = {"nll": "nll", "kl": "kl", "lr": "learning_rate", "grad_norm": "grad_norm"}
GATE_NAMES = ("temperature", "expected_rank", "undecided", "gate_entropy", "layers_at_budget", "max_rank_at_budget")


class Recorder(TrainerCallback):
    """Says when the Trainer logs and saves; raises `Interrupted` once the step that a signal met is saved.

    bad_steps: skipped because of gradients that are not finite, since the run began
    """

    def __init__(self, folder: RunFolder, cobra: CobraCallback, interruption: Interruption, log_every: int, save_every: int):
        self.folder, self.cobra, self.interruption = folder, cobra, interruption
        self.log_every, self.save_every = log_every, save_every
        self._bad_before = max((int(row.get("bad_steps", 0)) for row in folder.history()), default=0)
        self.bad_steps = self._bad_before
        self._bar: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._bar = Progress("train", state.max_steps - state.global_step)
        if state.global_step == 0:
            append_gates(self.folder.path, 0, self.cobra.adapter.extract())

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.advance()
        step, last = state.global_step, state.global_step >= state.max_steps
        stopping = self.interruption.number is not None
        control.should_log = last or stopping or step == 1 or step % self.log_every == 0 or step == self.cobra.search_steps
        control.should_save = last or stopping or step % self.save_every == 0
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        step = state.global_step
        searching = step <= self.cobra.search_steps
        self.bad_steps = self._bad_before + int(logs.get("bad_steps", 0))
        row = {name: logs[key] for name, key in NAMES.items() if key in logs}
        row |= {name: logs[name] for name in GATE_NAMES if name in logs}
        row |= {"loss": logs["loss"] + logs.get("kl", 0.0), "bad_steps": self.bad_steps}
        row = {name: value for name, value in row.items() if math.isfinite(value)}
        append_step(self.folder.path, step, **row, phase="search" if searching else "cut")
        if step == self.cobra.search_steps and self.cobra.plan is not None:
            append_gates(self.folder.path, step, self.cobra.plan)
        elif searching and step % self._gates_every() == 0:
            append_gates(self.folder.path, step, self.cobra.adapter.extract())
        self._bar.note(loss=f"{logs['loss']:.3f}", step=step)

    def on_save(self, args, state, control, **kwargs):
        self.folder.prune()
        self.interruption.raise_if_any()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__()

    def _gates_every(self) -> int:
        """A multiple of `log_every`, so that the file stays small."""
        return self.log_every * max(1, math.ceil(self.cobra.search_steps / self.log_every / GATE_ROWS))
