"""The language tasks' model, SmolLM2-135M-Instruct (4-bit weights, dequantised), and its loss on every text.

Dictionary text counts with every token but the first; a worked answer with its own tokens and the end of text, given its
question.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from bench.accuracy.encoder import Encoded
from bench.accuracy.tasks import Example
from cobra.cli.subject import find_model
from cobra.objective import IGNORED

BATCH = 4  # texts of an evaluation batch, and of a calibration batch: the logits of one have 49,152 columns a token


@cache
def _loaded() -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Once in a process: to dequantise takes longer than some runs."""
    source = find_model("smollm2")
    return source.load(seed=0), source.tokenizer()


def load_language_model() -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A copy in fp32, on the CPU, and its tokenizer. Raises FileNotFoundError where the package is not installed."""
    model, tokenizer = _loaded()
    return copy.deepcopy(model), tokenizer


def encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """At most `max_length` tokens of every text, from its start; of a question the end, in half of them at most.

    labels: (n, longest) tokens that count, -100 for the others
    """
    pairs = [_tokens(example, tokenizer, max_length) for example in examples]
    ids = [prompt + text for prompt, text in pairs]
    labels = torch.full((len(ids), max(map(len, ids))), IGNORED)
    for row, (prompt, text) in zip(labels, pairs, strict=True):
        row[len(prompt) : len(prompt) + len(text)] = torch.tensor(text)
    return Encoded({"input_ids": ids}, labels, tokenizer.pad_token_id)


def _tokens(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[int], list[int]]:
    """Prompt, which may be empty, and what follows it."""
    if example.text2 is None:
        return [], tokenizer(example.text, add_special_tokens=False)["input_ids"][:max_length]
    prompt = tokenizer(f"{example.text}\n", add_special_tokens=False)["input_ids"][-(max_length // 2) :]
    answer = [*tokenizer(example.text2, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return prompt, answer[: max_length - len(prompt)]


@torch.no_grad()
def losses(model: nn.Module, data: Encoded) -> tuple[Tensor, Tensor]:
    """(n,) summed NLL of every text in fp64, and how many tokens count, on the CPU in the order of the texts."""
    model.eval()
    sums, tokens = torch.zeros(len(data), dtype=torch.float64), torch.zeros(len(data), dtype=torch.long)
    for rows, batch in data.ordered(BATCH):
        labels = batch.pop("labels")[:, 1:]
        counted = labels != IGNORED
        logits = model(**batch).logits[:, :-1][counted].float()
        each = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
        each[counted] = F.cross_entropy(logits, labels[counted], reduction="none").double()
        sums[rows], tokens[rows] = each.sum(1).cpu(), counted.sum(1).cpu()
    return sums, tokens
