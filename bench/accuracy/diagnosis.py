"""python -m bench.accuracy.diagnosis [NAME ...]: where gradient and contribution disagree in ten architectures, a row each.

Real weights where a package ships them, small random ones otherwise: rows of random weights say what an architecture does
before it has learnt anything, and nothing about its published checkpoints. Rows are replaced by name in rows/diagnosis.jsonl;
nothing is downloaded. Every layer is measured; sums over transformer blocks, the poster's layers, come from the same
calibration.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from transformers.utils import logging as transformers_logging

from cobra import storage
from cobra.cli.diagnose import IMAGES, DiagnosisSettings, measure
from cobra.diagnosis import Diagnosis, by_block, diagnose

ROWS = Path(__file__).parent / "rows" / "diagnosis.jsonl"
_SHARED = DiagnosisSettings("", "reviews", examples=32, steps=20, longest=48)
_RANDOM = replace(_SHARED, random_init=True)
# a language head costs more than all layers: fewer examples and points keep these to minutes on a CPU core
_LANGUAGE = replace(_SHARED, examples=16, steps=10, longest=32, points=(2, 5))

SUBJECTS: dict[str, DiagnosisSettings] = {
    "minilm": replace(_SHARED, model="minilm"),
    "smollm2": replace(_LANGUAGE, model="smollm2", baseline="mean", draws=2, points=(5,)),
    # its path integral converges from neither baseline, not at 90 points either: two rows say what hangs on the choice
    "smollm2-zero": replace(_LANGUAGE, model="smollm2", draws=2, points=(5,)),
    "bert": replace(_RANDOM, model="bert"),
    "roberta": replace(_RANDOM, model="roberta"),
    "deberta-v2": replace(_RANDOM, model="deberta-v2"),
    "mpnet": replace(_RANDOM, model="mpnet"),
    "gpt2": replace(_LANGUAGE, model="gpt2", random_init=True),
    # no position embeddings before the first normalisation, and random embeddings average zero: a token's is no singular point
    "llama": replace(_LANGUAGE, model="llama", random_init=True, baseline="token:[MASK]"),
    "t5": replace(_RANDOM, model="t5", baseline="token:[MASK]"),
    "vit": replace(_RANDOM, model="vit", data=IMAGES, steps=60),
}


def row_of(name: str, settings: DiagnosisSettings) -> dict:
    """Measures one subject."""
    start = time.perf_counter()
    found = measure(settings)
    row = {"architecture": name, "weights": "random" if settings.random_init else "pretrained", "model": found.model}
    for granularity, prepare in (("site", lambda scores: scores), ("block", by_block)):
        diagnosis = diagnose(
            prepare(found.scores),
            [prepare(scores) for scores in found.draws],
            [prepare(scores) for scores in found.paths],
            model=found.model,
            data=found.data,
            notes=found.notes,
            seed=settings.seed,
        )
        row[granularity] = _compact(diagnosis)
    settings = {k: v for k, v in diagnosis.settings.items() if k != "granularity"}
    return row | {
        "data": found.data,
        "settings": settings,
        "path_residual": diagnosis.path_residual,
        "notes": found.notes,
        "seconds": round(time.perf_counter() - start, 1),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _compact(diagnosis: Diagnosis) -> dict:
    """The diagnosis without its words; a layer is (name, contribution share, gradient share, zone, certainty of the zone)."""
    full = diagnosis.to_dict()
    kept = {k: full[k] for k in ("pearson", "spearman", "contribution_range", "gradient_range", "stability")}
    fields = ("name", "contribution", "gradient", "zone", "certainty")
    return _rounded({**kept, "layers": [[layer[f] for f in fields] for layer in full["layers"]]})


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def read_rows(path: Path = ROWS) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def write_row(row: dict, path: Path = ROWS) -> None:
    """In the order of SUBJECTS, in place of an earlier row of the same name."""
    rows = {old["architecture"]: old for old in read_rows(path)} | {row["architecture"]: row}
    order = [*SUBJECTS, *(name for name in rows if name not in SUBJECTS)]
    lines = [json.dumps(rows[name], ensure_ascii=False) for name in order if name in rows]
    storage.write_bytes(path, ("\n".join(lines) + "\n").encode())


def markdown(rows: list[dict]) -> str:
    """One line an architecture; intervals are over examples, then over layers."""
    lines = [
        "| model | layers | Pearson | Spearman | range φ | range Γ | red / under-served | blocks: Pearson | "
        "order kept, other examples: φ / Γ / π | path residual (from) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        site, block = row["site"], row["block"]
        zones = [sum(layer[3] == zone for layer in site["layers"]) for zone in ("red", "under")]
        seeds = next((s for s in site["stability"] if s["what"] == "seeds"), None)
        kept = " / ".join(_two(seeds[f][0]) for f in ("contribution", "gradient", "prior")) if seeds else "–"
        cells = [
            row["model"],
            str(len(site["layers"])),
            _agreement(site["pearson"]),
            _agreement(site["spearman"]),
            _ratio(site["contribution_range"]),
            _ratio(site["gradient_range"]),
            f"{zones[0]} / {zones[1]}",
            f"{_agreement(block['pearson'])}, {len(block['layers'])} blocks",
            kept,
            f"{row['path_residual']:.1%} ({row['settings']['baseline']})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _agreement(found: dict) -> str:
    intervals = [f"[{_two(low)}, {_two(high)}]" for low, high in (found["over_examples"], found["over_layers"])]
    return " ".join([_two(found["value"]), *intervals])


def _two(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _ratio(value: float | None) -> str:
    return "∞" if value is None else f"{value:,.0f}×"


def main(names: list[str]) -> None:
    unknown = set(names) - set(SUBJECTS)
    if unknown:
        sys.exit(f"no subject {', '.join(sorted(unknown))}; there are {', '.join(SUBJECTS)}")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in names or SUBJECTS:
        row = row_of(name, SUBJECTS[name])
        write_row(row)
        print(f"{name}: {row['seconds']} s", flush=True)
    print(markdown(read_rows()))


if __name__ == "__main__":
    main(sys.argv[1:])
