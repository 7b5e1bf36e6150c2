"""transformers' Trainer with checkpoints of a run's own: small, without pickle, and complete or not there."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from cobra import checkpoint, storage
from cobra.integrations.transformers import CHECKPOINT

SCHEDULE = "schedule.json"


class RunTrainer(Trainer):
    """Saves its own state, the schedule, and the configuration, which names the model's class; adapter, optimizer and random
    states follow in CobraCallback's file, the last one.

    The base model's weights are in no checkpoint: they never change.
    """

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        storage.write_json(folder / SCHEDULE, self.lr_scheduler.state_dict())
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: CobraCallback loads the adapter when training begins."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.lr_scheduler.load_state_dict(json.loads((Path(checkpoint) / SCHEDULE).read_bytes()))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_random_states(Path(checkpoint) / CHECKPOINT)


def load_random_states(path: Path) -> None:
    """torch's, as they were when the checkpoint was written."""
    tensors, _ = storage.read_tensors(path, checkpoint.KIND)
    torch.set_rng_state(tensors["rng"])
    for name, state in tensors.items():
        if name.startswith("rng.cuda:"):
            torch.cuda.set_rng_state(state, int(name.removeprefix("rng.cuda:")))
