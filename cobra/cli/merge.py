"""Adapter folders folded into a transformers model folder."""

from __future__ import annotations

import json
from pathlib import Path

import cobra
from cobra import storage


def merge_folders(
    base: Path, adapters: list[Path], weights: list[float], out: Path, tolerance: float | None
) -> cobra.MergeReport:
    """Writes the merged model and its tokenizer, whole or not at all.

    Raises FileNotFoundError, ValueError for a base or an output folder that does not fit, and what loading and merging raise.
    """
    if len(weights) != len(adapters):
        raise ValueError(f"{len(weights)} weights for {len(adapters)} adapters; give one for each")
    if out.exists():
        raise ValueError(f"{out} exists; name a new folder")
    parts = [(cobra.load_adapter(folder), weight) for folder, weight in zip(adapters, weights, strict=True)]
    model = _load(base)
    report = cobra.combine(parts).attach(model).merge(tolerance=tolerance)
    with storage.new_folder(out) as fresh:
        model.save_pretrained(fresh)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "chat_template.jinja"):
            if (base / name).is_file():
                (fresh / name).write_bytes((base / name).read_bytes())
    return report


def _load(base: Path):
    """The model as its own architecture, heads included, in the dtype it was saved in."""
    import transformers

    path = base / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a transformers model folder")
    names = json.loads(path.read_bytes()).get("architectures") or []
    architecture = getattr(transformers, names[0], None) if names else None
    if architecture is None:
        raise ValueError(f"{path}: architectures is {names}, and transformers {transformers.__version__} has no such class")
    return architecture.from_pretrained(base, dtype="auto")
