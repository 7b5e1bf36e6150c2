"""The models every method starts from: MiniLM or MPNet with mean pooling and a linear head fitted on its frozen features."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from bench.accuracy.mpnet import load_mpnet
from bench.accuracy.tasks import Example, Task
from cobra.cli.encoder import load_encoder

Batch = dict[str, Tensor]
LOADERS = {"minilm": load_encoder, "mpnet": load_mpnet}


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples.

    columns: what the model takes, by name, one list of ints an example
    labels: (n,), or of texts (n, longest)
    device: of the batches
    """

    columns: dict[str, list[list[int]]]
    labels: Tensor
    pad: int
    device: str = "cpu"

    @classmethod
    def of(cls, examples: Sequence[Example], tokenizer, kind: str, max_length: int) -> Encoded:
        pairs = examples[0].text2 is not None
        segments = pairs and "token_type_ids" in tokenizer.model_input_names
        second = [e.text2 for e in examples] if pairs else None
        encoded = tokenizer([e.text for e in examples], second, truncation=True, max_length=max_length)
        names = ("input_ids", "token_type_ids") if segments else ("input_ids",)
        dtype = torch.float32 if kind == "regression" else torch.long
        labels = torch.tensor([e.label for e in examples], dtype=dtype)
        return cls({name: encoded[name] for name in names}, labels, tokenizer.pad_token_id)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows, padded to the longest of them."""
        width = max(len(self.columns["input_ids"][i]) for i in rows)
        batch = {name: torch.zeros(len(rows), width, dtype=torch.long) for name in (*self.columns, "attention_mask")}
        batch["input_ids"].fill_(self.pad)
        for at, i in enumerate(rows):
            for name, column in self.columns.items():
                batch[name][at, : len(column[i])] = torch.tensor(column[i])
            batch["attention_mask"][at, : len(self.columns["input_ids"][i])] = 1
        labels = self.labels[list(rows)]
        batch["labels"] = labels[:, :width] if labels.ndim == 2 else labels
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def ordered(self, size: int) -> Iterator[tuple[list[int], Batch]]:
        """Every example once, by length, with its indices."""
        order = sorted(range(len(self)), key=lambda i: len(self.columns["input_ids"][i]))
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            yield rows, self.batch(rows)

    def shuffled(self, size: int, steps: int, seed: int) -> Iterator[Batch]:
        """`steps` training batches, reshuffled every epoch; neighbours in length share a batch, which spares padding.

        Raises ValueError where the examples do not fill a batch.
        """
        if size > len(self):
            raise ValueError(
                f"batch_size={size}: there are {len(self)} training examples; take more examples or smaller batches"
            )
        drawn, batches = random.Random(seed), []
        while len(batches) < steps:
            order = drawn.sample(range(len(self)), len(self))
            epoch = []
            for start in range(0, len(order) - size + 1, 8 * size):
                near = sorted(order[start : start + 8 * size], key=lambda i: len(self.columns["input_ids"][i]))
                epoch += [near[i : i + size] for i in range(0, len(near) - size + 1, size)]
            drawn.shuffle(epoch)
            batches += epoch
        for rows in batches[:steps]:
            yield self.batch(rows)


def load_model(task: Task, dropout: float = 0.0, name: str = "minilm") -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The encoder with a zero head of the task's size, on the CPU, and its tokenizer."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, tokenizer = LOADERS[name]()
    if name == "minilm":
        model.set_attn_implementation("eager")  # torch's fused attention is slower in its backward on a CPU at these lengths
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    if task.classes != 2:
        model.classifier = nn.Linear(model.config.hidden_size, task.classes)
        model.config.num_labels = task.classes
        nn.init.zeros_(model.classifier.weight)
        nn.init.zeros_(model.classifier.bias)
    return model, tokenizer


@torch.no_grad()
def predict(model: nn.Module, data: Encoded) -> Tensor:
    """(n, classes) fp32 logits, or (n,) predictions of a regression, on the CPU in the order of the examples."""
    model.eval()
    out: Tensor | None = None
    for rows, batch in data.ordered(32):  # a sixth faster than 64 on one core
        batch.pop("labels")
        logits = model(**batch).logits.float().cpu()
        out = logits.new_empty(len(data), logits.shape[1]) if out is None else out
        out[rows] = logits
    return out[:, 0] if data.labels.is_floating_point() else out


def fit_head(model: nn.Module, data: Encoded, weight_decay: float = 3e-3) -> None:
    """A linear head on the frozen features of the training examples: every method starts from the same one.

    weight_decay: near the best on validation for every task; a head that fits the examples exactly leaves an adapter no loss
    """
    features = _features(model, data)
    regression = data.labels.is_floating_point()
    head, labels = model.classifier, data.labels.to(features.device)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    @torch.autocast(features.device.type, enabled=False)
    def closure() -> Tensor:
        optimizer.zero_grad()
        out = head(features)
        loss = F.mse_loss(out[:, 0], labels) if regression else F.cross_entropy(out, labels)
        loss = loss + weight_decay * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()


@torch.no_grad()
def _features(model: nn.Module, data: Encoded) -> Tensor:
    model.eval()
    features = torch.empty(len(data), model.config.hidden_size, device=data.device)
    for rows, batch in data.ordered(64):
        batch.pop("labels")
        features[rows] = model.features(**batch).float()
    return features
