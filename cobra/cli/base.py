"""The model that an adapter belongs on: a folder or a named one, as the class that the adapter was trained as."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from cobra.cli.encoder import MeanPoolClassifier
from cobra.cli.subject import NAMED_MODELS, as_plain, find_model, quiet_bars
from cobra.lora import ARCHITECTURE, LABELS, LoraAdapter, class_name


def find_class(name: str) -> type[nn.Module] | None:
    """A class of transformers, or the one of `cobra train --model minilm`; None for others."""
    if name in (MeanPoolClassifier.__name__, class_name(MeanPoolClassifier)):
        return MeanPoolClassifier
    found = getattr(transformers, name, None)
    return found if hasattr(found, "from_pretrained") else None


def recorded_class(adapter: LoraAdapter) -> str | None:
    """The class it was trained as, in the words of `class_name`; None for adapters that do not say it."""
    found = adapter.provenance.get(ARCHITECTURE)
    return found if isinstance(found, str) else None


def with_class(adapter: LoraAdapter, name: str, config: transformers.PreTrainedConfig | None = None) -> LoraAdapter:
    """The adapter with the class it was trained as on record, and the names that a configuration gives its outputs. Where the
    class is not of transformers, the base's path is left out: from there transformers' Auto classes would put the adapter on
    another class, without a word."""
    base = None if "." in name else adapter.base_model
    labels = {LABELS: [config.id2label[i] for i in range(config.num_labels)]} if config and _names_labels(config) else {}
    return replace(adapter, base_model=base, provenance=adapter.provenance | {ARCHITECTURE: name} | labels)


def name_labels(model: nn.Module, adapter: LoraAdapter) -> None:
    """Gives a model's outputs the names on record, where it has none of its own for them."""
    labels = adapter.provenance.get(LABELS)
    if isinstance(labels, list) and len(labels) == model.config.num_labels and not _names_labels(model.config):
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: i for i, label in enumerate(labels)}


def _names_labels(config: transformers.PreTrainedConfig) -> bool:
    """Whether they are others than those that transformers makes up."""
    return config.id2label != {i: f"LABEL_{i}" for i in range(config.num_labels)}


def is_named(base: Path) -> bool:
    return str(base) in NAMED_MODELS and not base.exists()


def head_tensors(adapter: LoraAdapter) -> dict[str, Tensor]:
    """By the full name of the parameter."""
    return {f"{name}.{key}": value for name, head in adapter.heads.items() for key, value in head.items()}


def in_saved_dtype(model: nn.Module, heads: Mapping[str, Tensor]) -> nn.Module:
    """The model with its heads in the dtypes of these tensors: what trained in fp32 is not rounded to a base in bf16."""
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for name, tensor in heads.items():
        if name in held:
            held[name].data = held[name].data.to(tensor.dtype)
    return model


def label_count(heads: Mapping[str, Tensor]) -> int | None:
    """Outputs of a classification head: the fewest rows of its tensors."""
    return min((tensor.shape[0] for tensor in heads.values() if tensor.ndim), default=None)


def load_base(base: Path, architecture: str | None, heads: Mapping[str, Tensor]) -> nn.Module:
    """The model of a transformers folder, minilm or smollm2, in the dtype it was saved in, or fp32 from a GGUF file.

    architecture: a class, as `find_class` takes it; by default the one in config.json, for minilm that of `cobra train`
    heads: parameters that come with an adapter, which the base may lack or have for other labels: it gets as many as they have

    Raises FileNotFoundError, and ValueError for quantised bases, unknown classes, and weights that nobody has.
    """
    source = find_model(str(base)) if is_named(base) else None
    if source is None:
        folder, own, options = base, _own_class(base, architecture), {"dtype": "auto"}
    elif source.gguf:
        folder, own, options = source.folder, source.architecture, {"dtype": torch.float32, "gguf_file": source.gguf}
    else:
        folder, own, options = source.folder, source.architecture, {"dtype": "auto"}
        architecture = architecture or MeanPoolClassifier.__name__
    name = architecture or own
    found = find_class(name)
    if found is None:
        raise ValueError(
            f"{name} is no class of transformers {transformers.__version__}, nor {MeanPoolClassifier.__name__}: load the model "
            "in Python, and cobra.load_adapter(FOLDER).attach(model).merge()"
        )
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    load = partial(_loaded, base, found, folder, heads, options)
    model, info = load(None if name == own else label_count(heads))
    if name == own and (other := _of_other_labels(model, heads)):
        model, info = load(label_count(other))
    random = sorted(set(info["missing_keys"]) - heads.keys())
    if random:
        raise ValueError(
            f"{base}: has no {random[0]}, which {name} needs, and no adapter brings it ({len(random)} are missing)"
        )
    as_plain(model)
    return model


def _loaded(
    base: Path, kind: type[nn.Module], folder: Path, heads: Mapping[str, Tensor], options: dict, labels: int | None
) -> tuple[nn.Module, dict]:
    """The model and what transformers says of its loading. labels: other outputs than config.json's, None for its own"""
    options = options if labels is None else {**options, "num_labels": labels, "ignore_mismatched_sizes": True}
    try:
        with quiet_bars():
            model, info = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True, **options)
    except RuntimeError as error:
        raise ValueError(f"{base}: the weights are not those of config.json: {error}") from error
    for name, found, expected in sorted(info.get("mismatched_keys") or ()):
        if name not in heads:
            shapes = f"{tuple(found)} and not {tuple(expected)}"
            raise ValueError(f"{base}: the weights are not those of config.json: {name} has the shape {shapes}")
    return model, info


def _of_other_labels(model: nn.Module, heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the heads that have another number of rows than the model, which has one a label there."""
    own, labels = model.state_dict(), model.config.num_labels
    shared = [name for name in heads if name in own and own[name].ndim == heads[name].ndim > 0]
    return {name: heads[name] for name in shared if len(own[name]) == labels != len(heads[name])}


def _own_class(base: Path, architecture: str | None) -> str | None:
    """The class in a folder's config.json. Raises ValueError where neither it nor `architecture` is of use."""
    path = base / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; expected a transformers model folder, or of the named models {', '.join(NAMED_MODELS)}"
        )
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path}: expected a model's configuration (JSON), found a truncated or foreign file: {error}"
        ) from error
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "an unknown method")
        raise ValueError(
            f"{path}: the base is quantised ({method}), and a sum cannot be rounded back into it: merge into the model it was "
            "made from, or load it, model.dequantize(), save_pretrained, and merge into that"
        )
    names = config.get("architectures") or []
    if architecture is None and not (names and find_class(names[0])):
        raise ValueError(
            f"{path}: architectures is {names}, and transformers {transformers.__version__} has no such class; name one with "
            "--architecture"
        )
    return names[0] if names else None
