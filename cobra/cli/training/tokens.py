"""Rows as the tokens that a model takes, and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

from cobra.cli.textfile import Example

MASKED = -100
Row = dict[str, list[int] | int | float]
Collator = Callable[[list[Row]], dict[str, Tensor]]


def padded_tokenizer(tokenizer: PreTrainedTokenizerBase, side: str = "right") -> PreTrainedTokenizerBase:
    """The tokenizer, padding on this side, with whatever token where it has none to pad with: the mask covers it."""
    tokenizer.padding_side = side
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def labelled_rows(
    examples: Sequence[Example], labels: Sequence[int] | Sequence[float], tokenizer: PreTrainedTokenizerBase, longest: int
) -> list[Row]:
    """Texts, or pairs of them, with their labels."""
    if not examples:
        return []
    texts = [example.text for example in examples]
    pairs = [example.second for example in examples] if examples[0].second is not None else None
    found = tokenizer(texts, pairs, truncation=True, max_length=longest)
    columns = {key: values for key, values in found.items() if key in ("input_ids", "attention_mask", "token_type_ids")}
    return [{**{key: values[i] for key, values in columns.items()}, "labels": label} for i, label in enumerate(labels)]


def language_rows(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, longest: int, chat: bool) -> list[Row]:
    """Texts whose every token is learnt, or responses behind prompts that are not. Rows with nothing to learn are left out.

    Raises ValueError where that is all of them, and for a chat template that is missing or does not keep its turns apart.
    """
    if chat and not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: leave chat out")
    rows = [_language_row(*_parts(example, tokenizer, chat), tokenizer, longest, closed=chat) for example in examples]
    kept = [row for row in rows if any(label != MASKED for label in row["labels"][1:])]
    if rows and not kept:
        raise ValueError(f"within {longest} tokens no row has a token to learn: all are prompt, or too short; raise longest")
    return kept


def cut_rows(rows: Sequence[Row], longest: int) -> int:
    """How many are as long as allowed, and so perhaps cut."""
    return sum(len(row["input_ids"]) >= longest for row in rows)


def collator_of(task: str, tokenizer: PreTrainedTokenizerBase) -> Collator:
    if task == "causal-lm":
        return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=MASKED)
    return DataCollatorWithPadding(tokenizer)


def batches_of(rows: Sequence[Row], collator: Collator, size: int) -> list[dict[str, Tensor]]:
    """Rows of like length together, so that little is padding."""
    order = sorted(rows, key=lambda row: len(row["input_ids"]))
    return [collator(order[start : start + size]) for start in range(0, len(order), size)]


def _parts(example: Example, tokenizer: PreTrainedTokenizerBase, chat: bool) -> tuple[str | None, str]:
    """(prompt, what is learnt)"""
    if example.second is None:
        return None, example.text
    if not chat:
        return f"{example.text.removesuffix(chr(10))}\n", example.second
    turns = [{"role": "user", "content": example.text}, {"role": "assistant", "content": example.second}]
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError("the tokenizer's chat template does not put the response behind the prompt: leave chat out")
    return prompt, whole.removeprefix(prompt)


def _language_row(prompt: str | None, learnt: str, tokenizer: PreTrainedTokenizerBase, longest: int, closed: bool) -> Row:
    """closed: the text brings its special tokens itself"""
    before = [] if prompt is None else tokenizer(prompt, add_special_tokens=not closed)["input_ids"]
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None, tokenizer.bos_token_id}
    if not closed and before[-1:] and before[-1] in ends:  # of tokenizers that close every text: the response goes on
        before = before[:-1]
    after = tokenizer(learnt, add_special_tokens=prompt is None)["input_ids"]
    if not closed and tokenizer.eos_token_id is not None and after[-1:] != [tokenizer.eos_token_id]:
        after = [*after, tokenizer.eos_token_id]
    ids = (before + after)[:longest]
    labels = ([MASKED] * len(before) + after)[:longest]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
