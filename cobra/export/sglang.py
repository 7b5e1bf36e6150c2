"""The rules of SGLang 0.5.23, from srt/lora/ of its wheel.

lora_config.py, lora.py LoRAAdapter: one r and one lora_alpha, scale lora_alpha / r; tensors are kept where get_layer_id finds a
layer; normalize_qkv_proj and normalize_gate_up_proj stack what one matrix product serves.
utils.py: get_normalized_target_modules takes a list, get_target_module_name raises for names outside it.
mem_pool.py load_lora_weight_to_buffer: asserts that every tensor has r rows; whatever is no lora_A is a lora_B.
lora_manager.py: init_lora_shapes, validate_new_adapter (DoRA, added tokens, --max-lora-rank).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from cobra.export.folder import TENSORS, Checkpoint
from cobra.export.rules import (
    MERGE,
    PADDED,
    VARIANTS,
    Finding,
    changed_base,
    convolutions,
    few,
    fused_experts,
    global_scale,
    missing_settings,
    more,
    partition,
    rank_zero,
    variants,
    wrong_scale,
)

# a module that SGLang knows -> the modules of base models that it stands for
STACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "embed_tokens": ("vocab_emb", "embeddings", "word_embeddings"),
    "lm_head": ("output", "unembed_tokens"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
    "indexer.wq_b": ("wq_b",),
    "indexer.wk": ("wk",),
    "indexer.weights_proj": ("weights_proj",),
}
NORMALIZED = {part: whole for whole, parts in STACKED.items() for part in parts}
MODULES = frozenset(STACKED) | {"o_proj", "out_proj", "down_proj", "in_proj", "in_proj_qkvz", "q_b_proj", "kv_b_proj"}
MODULES |= {"qkvr", "wo_ud", "fc1_latent_proj", "fc2_latent_proj"}


def sglang_rules(c: Checkpoint) -> Iterator[Finding]:
    yield from rank_zero(c)
    yield from missing_settings(c, ("r", "lora_alpha", "target_modules"))
    targets = c.config.get("target_modules")
    if not isinstance(targets, list) and targets not in (None, "all", "all-linear"):
        yield Finding("error", f"target_modules is {repr(targets)[:60]}; only a list of names loads", "list the modules' names")
    yield from variants(c, VARIANTS)
    yield from changed_base(c)
    yield from convolutions(c)
    yield from fused_experts(c)
    uneven = [name for name, shapes in c.modules.items() if shapes.rank != c.r and not c.is_fused_experts(name)]
    if uneven:
        name = uneven[0]
        yield Finding(
            "error",
            f"{name}: rank {c.modules[name].rank}{more(uneven)}; every tensor must have rank r={c.r}, rank_pattern is not read",
            PADDED,
        )
    rule = "lora_alpha / r for every module, patterns and use_rslora are not read"
    yield from wrong_scale(c, rule, lambda name: global_scale(c))
    yield from _names(c)
    yield from _groups(c)
    heads, strange = partition(c.others, lambda name: not _in_layer(name))
    if heads:
        yield Finding("error", f"{few(heads)}: whole modules beside the adapter are dropped in silence", MERGE)
    if strange:
        yield Finding("error", f"{few(strange)}: taken for a lora_B", "leave such keys out of the file")
    files = [name for name in c.neighbours if name.endswith(".safetensors") and name != TENSORS]
    if files:
        yield Finding("warning", f"{few(files)}: every safetensors file of the folder is read", "move it elsewhere")
    if "added_tokens.json" in c.neighbours:
        yield Finding("warning", "added_tokens.json: adapters that add tokens are refused", "remove the file if it adds none")
    yield Finding(
        "note",
        "ranks and modules of later adapters must fit those of --lora-paths",
        f"to load it into a running server, start that with --max-lora-rank {c.r} or more and --lora-target-modules",
    )


def _names(c: Checkpoint) -> Iterator[Finding]:
    lost, inside = partition(c.modules, lambda n: not _in_layer(n) and not re.search(r"embed_tokens|lm_head", n))
    if lost:
        message = f'{few(lost)}: dropped in silence, only names with "layers.<number>." are loaded'
        yield Finding("error", message, "SGLang has no LoRA for this model; merge it with peft (merge_and_unload)")
    targets = c.config.get("target_modules")
    if isinstance(targets, list):
        known = {_name(target) for target in targets}
        undeclared = [name for name in inside if _name(name) not in known]
        if undeclared:
            yield Finding("error", f"{few(undeclared)}: in the file, but not in target_modules", "add them to target_modules")
    foreign = sorted({_name(name) for name in inside} - MODULES)
    if foreign:
        message = f"{few(foreign)}: modules that load only where the model's class in SGLang names them"
        yield Finding("warning", message, "try it, or target other modules")


def _name(name: str) -> str:
    last = name.rsplit(".", 1)[-1]
    return NORMALIZED.get(last, last)


def _groups(c: Checkpoint) -> Iterator[Finding]:
    """q, k and v are stacked into one tensor, gate and up into another: a layer has all of them or none, but for k and up."""
    layers: dict[int, set[str]] = defaultdict(set)
    for name in c.modules:
        if _in_layer(name):
            layers[int(_in_layer(name)[1])].add(name)
    gated = any(name.endswith(".gate_proj") for name in c.modules)
    if not gated and any(_in_layer(name) and name.endswith(".up_proj") for name in c.modules):
        message = "up_proj without gate_proj loads only in models that have no gate"
        yield Finding("warning", message, "start the server with --lora-target-modules all")
    broken = []
    for names in layers.values():
        has_k = any(name.endswith(".k_proj") for name in names)
        needs = {
            "q_proj": ["v_proj", "k_proj"] if has_k else ["v_proj"],
            "k_proj": ["q_proj"],
            "v_proj": ["q_proj"],
            "up_proj": ["gate_proj"] if gated else [],
            "kv_a_proj_with_mqa": ["q_a_proj"],
        }
        for name in sorted(names):
            parent, _, last = name.rpartition(".")
            broken += [(name, needed) for needed in needs.get(last, ()) if f"{parent}.{needed}" not in names]
    if broken:
        name, needed = broken[0]
        message = f"{name} has no {needed} beside it{more(broken)}: SGLang stacks them"
        yield Finding("error", message, f"{PADDED}, which keeps layers of rank 0; or target them together")


def _in_layer(name: str) -> re.Match | None:
    return re.search(r"layers\.(\d+)\.", name)
