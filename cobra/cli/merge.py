"""Adapter folders folded into a transformers model folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

import cobra
from cobra import storage

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

    architecture: a class of transformers; by default the one in the base's config.json

    Raises FileNotFoundError, ValueError for a base or an output folder that does not fit, OSError where the output cannot be
    written, and what loading and merging raise.
    """
    if len(weights) != len(adapters):
        raise ValueError(f"{len(weights)} weights for {len(adapters)} adapters; give one for each")
    if out.exists():
        raise ValueError(f"{out} exists; name a new folder")
    parts = [(cobra.load_adapter(folder), weight) for folder, weight in zip(adapters, weights, strict=True)]
    combined = cobra.combine(parts)
    model = load_base(base, architecture, head_tensors(combined))
    try:
        adapter = combined.attach(model)
    except ValueError as error:
        kind = type(model).__name__
        raise ValueError(
            f"{error} (the base was loaded as {kind}; if the adapter is of another class, name it: --architecture)"
        ) from error
    report = adapter.merge(tolerance=tolerance, reversible=tolerance is not None)
    with storage.new_folder(out) as fresh:
        model.save_pretrained(fresh)
        for path in sorted({path for pattern in BESIDE for path in base.glob(pattern) if path.is_file()}):
            if not (fresh / path.name).exists():
                shutil.copyfile(path, fresh / path.name)
    return report


def head_tensors(adapter: cobra.LoraAdapter) -> dict[str, Tensor]:
    """By the full name of the parameter."""
    return {f"{name}.{key}": value for name, head in adapter.heads.items() for key, value in head.items()}


def label_count(heads: Mapping[str, Tensor]) -> int | None:
    """Outputs of a classification head: the fewest rows of its tensors."""
    return min((tensor.shape[0] for tensor in heads.values() if tensor.ndim), default=None)


def load_base(base: Path, architecture: str | None, heads: Mapping[str, Tensor]) -> nn.Module:
    """The model of a transformers folder as the class asked for or as its own, in the dtype it was saved in.

    heads: parameters that come with an adapter, which the base may lack; a class that is asked for gets as many labels

    Raises FileNotFoundError, and ValueError for quantised bases, unknown classes, and weights that nobody has.
    """
    import transformers

    path = base / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a transformers model folder")
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
    names = [architecture] if architecture else config.get("architectures") or []
    found = getattr(transformers, names[0], None) if names else None
    if not hasattr(found, "from_pretrained"):
        raise ValueError(
            f"{path}: architectures is {names}, and transformers {transformers.__version__} has no such class; name one with "
            "--architecture"
        )
    transformers.utils.logging.disable_progress_bar()
    labels = label_count(heads) if architecture else None
    options = {} if labels is None else {"num_labels": labels}
    try:
        model, info = found.from_pretrained(base, dtype="auto", output_loading_info=True, **options)
    except RuntimeError as error:
        raise ValueError(f"{base}: the weights are not those of {path.name}: {error}") from error
    random = sorted(set(info["missing_keys"]) - heads.keys())
    if random:
        raise ValueError(
            f"{base}: has no {random[0]}, which {names[0]} needs, and no adapter brings it ({len(random)} are missing)"
        )
    return model
