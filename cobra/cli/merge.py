"""Adapter folders folded into a transformers model folder."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

import cobra
from cobra import storage
from cobra.cli.base import head_tensors, is_named, load_base, name_labels, recorded_class
from cobra.cli.outputs import check_new_folder
from cobra.cli.subject import find_model
from cobra.lora import class_name

# what stands beside a model's weights and is not written by its save_pretrained
BESIDE = ("tokenizer*", "vocab.*", "merges.txt", "*.model", "*tokens*.json", "chat_template*", "*processor_config.json")


def merge_folders(
    base: Path,
    adapters: Sequence[Path],
    weights: Sequence[float],
    out: Path,
    tolerance: float | None = None,
    architecture: str | None = None,
) -> cobra.MergeReport:
    """Writes the merged model and its tokenizer, whole or not at all.

    base: the model's folder, minilm or smollm2
    architecture: a class, of transformers or MeanPoolClassifier; by default the one that the adapters say they were trained as,
        else the one in the base's config.json

    Raises FileNotFoundError, ValueError for a base or an output folder that does not fit and adapters of another class, OSError
    where the output cannot be written, and what loading and merging raise. Warns of a class that no adapter confirms.
    """
    if len(weights) != len(adapters):
        raise ValueError(f"{len(weights)} weights for {len(adapters)} adapters; give one for each")
    check_new_folder(out)
    loaded = [cobra.load_adapter(folder) for folder in adapters]
    classes = dict(zip(adapters, map(recorded_class, loaded), strict=True))
    combined = cobra.combine(list(zip(loaded, weights, strict=True)))
    wanted = architecture or next(filter(None, classes.values()), None)
    model = load_base(base, wanted, head_tensors(combined))
    _check_class(classes, model, chosen=architecture is not None or is_named(base))
    try:
        adapter = combined.attach(model)
    except ValueError as error:
        kind = type(model).__name__
        raise ValueError(
            f"{error} (the base was loaded as {kind}; if the adapter is of another class, name it: --architecture)"
        ) from error
    name_labels(model, combined)
    report = adapter.merge(tolerance=tolerance, reversible=tolerance is not None)
    with storage.new_folder(out) as fresh:
        model.save_pretrained(fresh)
        _copy_tokenizer(base, fresh)
    return report


def _check_class(classes: Mapping[Path, str | None], model: nn.Module, chosen: bool) -> None:
    """chosen: whether the class is another than config.json's by somebody's word"""
    built = class_name(type(model))
    for folder, recorded in classes.items():
        if recorded not in (None, built):
            raise ValueError(
                f"{folder} was trained as {recorded}, and the base was loaded as {built}, in which its outputs are others: "
                f"leave --architecture out, and merge adapters of one class"
            )
        if recorded is None and chosen:
            warnings.warn(f"{folder} does not say which class it was trained as: right only if that was {built}", stacklevel=3)


def _copy_tokenizer(base: Path, out: Path) -> None:
    if is_named(base):
        find_model(str(base)).tokenizer().save_pretrained(out)
        return
    for path in sorted({path for pattern in BESIDE for path in base.glob(pattern) if path.is_file()}):
        if not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)
