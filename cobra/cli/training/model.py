"""The model of a run: its own head where the task has one, else a new one fitted on the frozen model's features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from cobra.cli.encoder import fit_linear, load_encoder
from cobra.cli.subject import Source, as_plain, quiet_bars
from cobra.cli.training.data import Targets
from cobra.progress import Progress

HEAD_EXAMPLES = 2000
HEAD_DECAY = 3e-3  # a head that knows its rows by heart leaves the adapter nothing to learn from them


def load_model(name: str, source: Source, targets: Targets, seed: int) -> nn.Module:
    """In fp32, evaluation mode. minilm has mean pooling, as it was trained; others the head that transformers gives them.

    Raises ValueError for weights that do not load.
    """
    if targets.task in ("causal-lm", source.task):
        return source.load(seed)
    torch.manual_seed(seed)
    outputs = 1 if targets.classes is None else len(targets.classes)
    model = load_encoder(outputs)[0] if name == "minilm" else _with_new_head(source, outputs)
    if targets.classes is not None:
        model.config.id2label = dict(enumerate(targets.classes))
        model.config.label2id = {label: i for i, label in enumerate(targets.classes)}
    model.config.problem_type = "regression" if targets.classes is None else "single_label_classification"
    as_plain(model)
    return model.eval()


def _with_new_head(source: Source, outputs: int) -> nn.Module:
    options = {"gguf_file": source.gguf} if source.gguf else {}
    try:
        with quiet_bars():
            return AutoModelForSequenceClassification.from_pretrained(
                source.folder, num_labels=outputs, dtype=torch.float32, local_files_only=True, **options
            )
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"{source.words}: transformers {transformers.__version__} gives it no classification head: {first}"
        ) from error


def fit_new_head(model: nn.Module, outputs: int, batches: Sequence[dict[str, Tensor]]) -> bool:
    """Fits the last linear layer on its inputs, all else frozen; whether it could: not where it sees every token."""
    head = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == outputs][-1]
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    labels = []
    try:
        with torch.no_grad(), Progress("fit the head", len(batches)) as bar:
            for batch in batches:
                batch = {key: value.to(head.weight.device) for key, value in batch.items()}
                labels.append(batch.pop("labels"))
                model(**batch)
                bar.advance()
                if seen[-1].ndim != 2:
                    return False
    finally:
        handle.remove()
    fit_linear(head, torch.cat(seen), torch.cat(labels), HEAD_DECAY)
    return True
