"""The README.md of an exported adapter: what it is, where its ranks went and why, and how to load it.

Everything in it comes from the adapter and what its writer recorded; what is not known is left out. What it says of engines is
what `cobra.export.check` says.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict

from cobra.export.check import judge
from cobra.export.engines import vllm_max_lora_rank
from cobra.export.folder import Checkpoint, Shapes
from cobra.lora import LABELS, LoraAdapter

MOST_PRIORS = 12
_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def model_card(adapter: LoraAdapter, layout: str) -> str:
    """Markdown with the front matter of the Hub."""
    parts = [
        _front_matter(adapter),
        _what(adapter, layout),
        _budget(adapter, layout),
        "## Ranks\n\n" + "\n\n".join(rank_tables(adapter.ranks)),
        _calibration(adapter),
        _loading(adapter),
        _serving(adapter, layout),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def rank_tables(ranks: dict[str, int]) -> list[str]:
    """One Markdown table a stack of numbered blocks, blocks by modules; runs of equal blocks share a line. Modules outside such
    stacks get a line each. Numbers below a block (experts) become *, and their ranks a range."""
    stacks: dict[str, dict[int, dict[str, list[int]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    single = {}
    for name, rank in ranks.items():
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts[:-1]) if part.isdecimal()), None)
        if at is None:
            single[name] = rank
            continue
        module = ".".join("*" if part.isdecimal() else part for part in parts[at + 1 :])
        stacks[".".join(parts[:at])][int(parts[at])][module].append(rank)
    tables = [_stack_table(stack, blocks) for stack, blocks in stacks.items()]
    if single:
        tables.append(_table(["module", "rank"], [[f"`{name}`", str(rank)] for name, rank in single.items()]))
    return tables


def _stack_table(stack: str, blocks: dict[int, dict[str, list[int]]]) -> str:
    modules = list(dict.fromkeys(module for row in blocks.values() for module in row))
    short = [module.rsplit(".", 1)[-1] for module in modules]
    names = short if len(set(short)) == len(short) else modules
    rows: list[tuple[int, int, list[str]]] = []
    for block in sorted(blocks):
        cells = [_range(blocks[block].get(module, [])) for module in modules]
        if rows and rows[-1][1] == block - 1 and rows[-1][2] == cells:
            rows[-1] = (rows[-1][0], block, cells)
        else:
            rows.append((block, block, cells))
    lines = [[str(first) if first == last else f"{first}–{last}", *cells] for first, last, cells in rows]
    return _table([f"`{stack}`" if stack else "block", *names], lines)


def _range(ranks: list[int]) -> str:
    if not ranks:
        return "–"
    return str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)}–{max(ranks)}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [[cell.replace("|", "\\|") for cell in cells] for cells in [header, ["---"] * len(header), *rows]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _front_matter(adapter: LoraAdapter) -> str:
    lines = ["library_name: peft"]
    if adapter.base_model and _HUB_ID.fullmatch(
        adapter.base_model
    ):  # the Hub refuses anything else, and a path is nobody's matter
        lines.append(f"base_model: {json.dumps(adapter.base_model)}")
    return "\n".join(["---", *lines, "tags:", "- lora", "- cobra", "---"])


def _on_hub(name: str | None) -> bool:
    """The Hub refuses other names in the front matter, and a path says nothing to others."""
    return bool(name) and _HUB_ID.fullmatch(name) is not None


def _what(adapter: LoraAdapter, layout: str) -> str:
    kept = sum(rank > 0 for rank in adapter.ranks.values())
    if layout == "padded":
        how = f"Every layer is written at rank {max(adapter.ranks.values())}, padded with zeros"
    else:
        how = "Every layer is written at its own rank; layers of rank 0 are left out"
    title = f"# LoRA adapter for {adapter.base_model}" if _on_hub(adapter.base_model) else "# LoRA adapter"
    text = (
        f"{title}\n\nA plain LoRA adapter on {kept} of {len(adapter.ranks)} linear layers, written by COBRA (`cobra-peft`). "
        f"{how} (layout `{layout}`). Scaling is folded into `lora_B`: alpha / r is 1 everywhere."
    )
    if adapter.provenance.get("plan"):
        text += " The ranks were chosen layer by layer under one budget."
    if adapter.heads:
        text += f" Trained whole and part of the file: {', '.join(f'`{name}`' for name in adapter.heads)}."
    if isinstance(labels := adapter.provenance.get(LABELS), list):
        text += f" The outputs are, in this order: {', '.join(f'`{label}`' for label in labels)}."
    return text


def _budget(adapter: LoraAdapter, layout: str) -> str:
    ranks, plan, config = adapter.ranks, adapter.provenance.get("plan") or {}, adapter.provenance.get("config") or {}
    made = plan.get("provenance") or {}
    budget, rows = made.get("budget") or config.get("rank_budget"), []
    if isinstance(budget, dict) and "amount" in budget:
        spent = f", {made['spent']:,} spent" if "spent" in made else ""
        rows.append(["budget", f"{budget['amount']:,} {budget.get('unit', 'ranks')}{spent}"])
    elif isinstance(budget, int):
        rows.append(["budget", f"{budget:,} ranks"])
    if plan.get("sites"):
        rows.append(["ranks kept", f"{sum(len(site['kept']) for site in plan['sites']):,} in {len(plan['sites'])} groups"])
    rows.append(["rank of a layer", f"{min(ranks.values())} to {max(ranks.values())}"])
    rows.append(["adapter parameters", f"{adapter.parameters:,}"])
    if layout == "padded":
        written = sum(max(ranks.values()) * (layer.in_features + layer.out_features) for layer in adapter.layers.values())
        rows.append(["the same with padding", f"{written:,}"])
    return "## Budget\n\n" + _table(["", ""], rows)


def _calibration(adapter: LoraAdapter) -> str:
    calibration = adapter.provenance.get("calibration") or {}
    if not calibration:
        return ""
    settings = calibration.get("settings") or {}
    rows = [
        [key, str(value)] for key, value in {"base model's fingerprint": calibration.get("fingerprint"), **settings}.items()
    ]
    text = "## Calibration\n\n" + _table(["", ""], [row for row in rows if row[1] != "None"])
    prior = sorted((calibration.get("prior") or {}).items(), key=lambda item: -item[1])
    if prior:
        shown = [[f"`{group}`", f"{value:.3g}"] for group, value in prior[:MOST_PRIORS]]
        rest = f"\n\nThe other {len(prior) - MOST_PRIORS} are lower." if len(prior) > MOST_PRIORS else ""
        text += "\n\nPrior of the groups (contribution and gradient together, before training), the highest first:\n\n"
        text += _table(["group", "prior"], shown) + rest
    return text


def _loading(adapter: LoraAdapter) -> str:
    base = adapter.base_model if _on_hub(adapter.base_model) else "the base model"
    module, _, name = _architecture(adapter).rpartition(".")
    imported, made = "", f"...  # {base}, of the class that the adapter was trained on{name and f': {name}'}"
    warning = ""
    if module:
        labels = min((tensor.shape[0] for head in adapter.heads.values() for tensor in head.values() if tensor.ndim), default=2)
        imported = f"from {module} import {name}\n"
        made = f'{name}.from_pretrained("path/to/the/base/model", num_labels={labels})'
        warning = (
            f"\n\nIt was trained on `{module}.{name}`, which is no class of transformers. The Auto classes make another model "
            "of the same base, and the adapter loads into it without a word and with wrong outputs."
        )
    return f"""## Loading

```python
{imported}from peft import PeftModel

base = {made}
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

A transformers model also takes it directly: `base.load_adapter("path/to/this/folder")`.{warning}"""


def _architecture(adapter: LoraAdapter) -> str:
    """The class it was trained as, of transformers or with its module; "" where that is not known, or no name."""
    found = adapter.provenance.get("architecture")
    return found if isinstance(found, str) and _CLASS.fullmatch(found) else ""


def _serving(adapter: LoraAdapter, layout: str) -> str:
    """The checker's verdicts on this layout, and flags where they are yes."""
    largest = max(adapter.ranks.values())
    how = {
        "vllm": f"`--enable-lora --max-lora-rank {vllm_max_lora_rank(largest)}`",
        "sglang": f"`--enable-lora --lora-paths NAME=FOLDER --max-lora-rank {largest}`",
        "gguf": "`convert_lora_to_gguf.py --base BASE FOLDER`, then `--lora FILE.gguf`",
    }
    rows = []
    for engine, command in how.items():
        verdict = judge(engine, _described(adapter, layout))
        other = "padded" if layout == "compact" else "compact"
        if verdict.ok:
            rows.append([f"{engine} ({verdict.version})", "yes", command])
        elif judge(engine, _described(adapter, other)).ok:
            rows.append([f"{engine} ({verdict.version})", f"layout `{other}` only", command])
        else:
            rows.append([f"{engine} ({verdict.version})", "no", verdict.findings[0].message])
    text = _table(["engine", "takes this file", "with"], rows)
    return f"## Serving\n\n{text}\n\nWhether an engine knows the base model is another matter. `cobra check FOLDER` says more."


def _described(adapter: LoraAdapter, layout: str) -> Checkpoint:
    """The checkpoint that this layout is, without its tensors."""
    ranks = {name: rank for name, rank in adapter.ranks.items() if rank or layout == "padded"}
    largest = max(ranks.values())
    written = {name: largest if layout == "padded" else rank for name, rank in ranks.items()}
    pattern = {} if layout == "padded" else {re.escape(name): rank for name, rank in written.items()}
    layers = adapter.layers
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.base_model,
        "r": largest,
        "lora_alpha": largest,
        "fan_in_fan_out": adapter.transposed,
        "target_modules": "|".join(map(re.escape, ranks)) if adapter.ambiguous else list(ranks),
        "modules_to_save": list(adapter.heads),
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }
    modules = {
        name: Shapes((rank, layers[name].in_features), (layers[name].out_features, rank)) for name, rank in written.items()
    }
    others = sorted(f"{name}.{key}" for name, head in adapter.heads.items() for key in head)  # as a file lists them
    return Checkpoint(config, modules, tuple(others))
