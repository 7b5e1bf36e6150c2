"""What each engine makes of a LoRA checkpoint: the rules of its own loader, as findings.

Read from these sources, and held against them by the tests (SGLang's rules are in `cobra.export.sglang`):

peft 0.21.2          tuners/tuners_utils.py check_target_module_exists, utils/other.py get_pattern_key, tuners/lora/layer.py
                     update_layer, utils/transformers_weight_conversion.py
transformers 5.23.0  integrations/peft.py load_adapter, which injects through peft
vLLM 0.33.0          config/lora.py MaxLoRARanks, lora/peft_helper.py PEFTHelper, lora/utils.py parse_fine_tuned_lora_name,
                     lora/lora_model.py from_lora_tensors, lora/lora_weights.py pack_moe
llama.cpp 2026-07    convert_lora_to_gguf.py, conversion/gpt2.py, src/llama-adapter.cpp, src/llama-adapter.h get_scale

What depends on the base model (whether it has the modules, whether the engine knows its architecture) is not looked at.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator

from cobra.export.folder import PREFIX, Checkpoint, endings_of, matches
from cobra.export.rules import (
    BASE_CHANGING_INITS,
    MERGE,
    PADDED,
    PLAIN_INITS,
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

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16


def peft_rules(c: Checkpoint) -> Iterator[Finding]:
    yield from rank_zero(c)
    yield from _zero_settings(c, "warning")
    targets = c.config.get("target_modules")
    if targets is None and not c.config.get("target_parameters"):
        message = "target_modules is missing: peft guesses it from the model's type, or raises"
        yield Finding("warning", message, "list the modules' names")
    dropped = _dropped(c) if targets is not None else []
    if dropped:
        yield Finding(
            "error",
            f"target_modules does not name {few(dropped)}: no layer is made for the tensors, which are dropped in silence",
            "add the full names to target_modules (and take them out of exclude_modules and modules_to_save)",
        )
    init = c.config.get("init_lora_weights")
    if isinstance(init, str) and not re.fullmatch("|".join([*PLAIN_INITS, *BASE_CHANGING_INITS]), init.lower()):
        yield Finding("error", f"init_lora_weights={init!r} is not known", "set it to true: weights are loaded anyway")
    if init == "lora_ga":  # what the others change peft changes again
        yield from changed_base(c)
    ignored = [name for name in c.others if not _peft_reads(c, name)]
    if ignored:
        yield Finding("warning", f"{few(ignored)}: keys of no LoRA layer, ignored in silence", "leave them out of the file")
    yield from _unused_patterns(c)
    experts = [name for name in c.modules if ".experts." in name and c.rank(name) != c.r]
    if experts:
        yield Finding(
            "warning",
            f"{few(experts)}: experts of a rank other than r={c.r}; transformers >= 5 keeps some models' experts in one "
            "parameter, which takes no rank of their own",
            PADDED,
        )


def vllm_rules(c: Checkpoint) -> Iterator[Finding]:
    yield from rank_zero(c)
    yield from _zero_settings(c, "error")
    yield from missing_settings(c, ("r", "lora_alpha", "target_modules"))
    yield from variants(c, VARIANTS)
    if c.config.get("bias", "none") != "none":
        yield Finding("error", f"bias={c.config['bias']!r}: biases of the base model do not load", MERGE)
    yield from changed_base(c)
    yield from convolutions(c)
    largest = max([c.r, *c.pattern("rank_pattern").values()])
    allowed = vllm_max_lora_rank(largest)
    if allowed is None:
        yield Finding("error", f"rank {largest} is above {VLLM_RANKS[-1]}, the largest --max-lora-rank", MERGE)
    elif allowed > VLLM_DEFAULT_RANK:
        message = f"rank {largest} is above {VLLM_DEFAULT_RANK}, the default of --max-lora-rank"
        yield Finding("warning", message, f"start the server with --max-lora-rank {allowed}")
    heads = [name for name in c.config.get("modules_to_save") or [] if name not in ("classifier", "score")]
    if heads:
        yield Finding("error", f"modules_to_save names {few(heads)}; only classifier and score load", MERGE)
    strange = [name for name in c.others if not _vllm_reads(c, name)]
    if strange:
        yield Finding("error", f"{few(strange)}: unsupported LoRA weight", f"leave such keys out of the file, or {MERGE}")
    yield from _uneven_experts(c)
    scales = {c.scale(name) for name in c.modules}
    if len(scales - {None, global_scale(c)}):
        yield Finding("note", "vLLM <= 0.31 knows no rank_pattern and scales every module with lora_alpha / r", PADDED)


def gguf_rules(c: Checkpoint) -> Iterator[Finding]:
    yield from rank_zero(c)
    yield from variants(c, {field: what for field, what in VARIANTS.items() if field != "alora_invocation_tokens"})
    yield from changed_base(c)
    yield from convolutions(c)
    yield from fused_experts(c)
    if c.config.get("fan_in_fan_out"):
        yield Finding(
            "error",
            "fan_in_fan_out is set: the converter transposes the update of GPT-2's layers as if it were their weight",
            "merge it with peft (merge_and_unload) and convert the merged model",
        )
    yield from missing_settings(c, ("lora_alpha",))
    rule = "lora_alpha / the tensor's rank, alpha_pattern and use_rslora are not read"
    yield from wrong_scale(c, rule, lambda name: c.alpha / c.modules[name].rank if c.alpha else 1.0)
    others = [name for name in c.others if ".base_layer.weight" not in name]
    norms, strange = partition(others, lambda name: "_layernorm" in name or ".norm" in name)
    if norms:
        yield Finding("error", f"{few(norms)}: weights of norms are converted, and dropped in silence on loading", MERGE)
    if strange:
        yield Finding("error", f"{few(strange)}: the converter stops at keys other than lora_A and lora_B", MERGE)
    if not c.config.get("base_model_name_or_path"):
        yield Finding("warning", "base_model_name_or_path is not set", "pass --base FOLDER of the base model to the converter")


def vllm_max_lora_rank(rank: int) -> int | None:
    """The smallest --max-lora-rank that vLLM allows for this rank; None above its largest."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def _zero_settings(c: Checkpoint, level: str) -> Iterator[Finding]:
    fields = ["r"] if c.r <= 0 else []
    fields += [f"rank_pattern[{key!r}]" for key, rank in c.pattern("rank_pattern").items() if rank <= 0]
    if fields:
        yield Finding(level, f"{few(fields)}: 0 or less", "ranks are positive; leave such layers out of target_modules")


def _unused_patterns(c: Checkpoint) -> Iterator[Finding]:
    """Keys of patterns that match no module, or another key's value for all of theirs."""
    for field, firsts in (("rank_pattern", c.rank_keys), ("alpha_pattern", c.alpha_keys)):
        pattern, used = c.pattern(field), set(firsts.values())
        for key in (key for key in pattern if key not in used):
            names = [name for name in c.modules if matches(key, c.settings_name(name))]
            if not names:
                message = f"{field}[{key!r}] matches no module of the file"
                yield Finding("warning", message, f"keys are names of the base model, without {PREFIX}")
            elif pattern[firsts[names[0]]] != pattern[key]:
                message = f"{field}[{key!r}] never applies: {names[0]} matches {firsts[names[0]]!r} first"
                yield Finding("warning", message, "list full names, longer ones first")


def _dropped(c: Checkpoint) -> list[str]:
    """Modules of the file that peft gives no layer."""

    def named(field: str) -> Callable[[str], bool]:
        names = c.config.get(field) or []
        if isinstance(names, str):
            return lambda name: names == "all-linear" or re.fullmatch(names, name) is not None
        listed = set(names)
        return lambda name: any(ending in listed for ending in endings_of(name))

    targeted, excluded = named("target_modules"), named("exclude_modules")
    names = [name for name in c.modules if not c.is_fused_experts(name)]
    return [name for name in names if not targeted(name) or excluded(name) or _in_head(c, name)]


def _in_head(c: Checkpoint, name: str) -> bool:
    """Or is one. To peft a name in modules_to_save is any ending of a module's, even within a word."""
    heads = tuple(c.config.get("modules_to_save") or ())
    return any(name[: end.start()].endswith(heads) for end in re.finditer(r"\.|$", name))


def _peft_reads(c: Checkpoint, name: str) -> bool:
    return (
        _in_head(c, name)
        or (".lora_magnitude_vector" in name and bool(c.config.get("use_dora")))
        or (name.endswith(".lora_B.bias") and bool(c.config.get("lora_bias")))
        or (name.endswith(".bias") and c.config.get("bias", "none") != "none")
        or name.endswith((".base_layer.weight", "embed_tokens.weight", "lm_head.weight", "trainable_tokens_delta"))
    )


def _vllm_reads(c: Checkpoint, name: str) -> bool:
    *_, module, parameter = ["", *name.split(".")]
    head = module in ("classifier", "score") and parameter in ("weight", "bias") and _in_head(c, name)
    return head or name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight"))


def _uneven_experts(c: Checkpoint) -> Iterator[Finding]:
    """vLLM stacks one projection of all experts of a layer into one tensor."""
    layers: dict[str, dict[str, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
    for name, shapes in c.modules.items():
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(.+)", name)
        if match:
            layers[match[1]][match[3]][int(match[2])] = shapes.rank
    everywhere = sorted({projection for projections in layers.values() for projection in projections})
    missing, uneven = [], []
    for layer, projections in layers.items():
        experts = sorted(set().union(*projections.values()))
        missing += [f"{layer}.{e}.{p}" for p in everywhere for e in experts if e not in projections[p]]
        ranks = {f"{layer}.*.{p}": sorted(set(of_experts.values())) for p, of_experts in projections.items()}
        uneven += [f"{name} has ranks {', '.join(map(str, found))}" for name, found in ranks.items() if len(found) > 1]
    if missing:
        yield Finding("error", f"{missing[0]} has no adapter{more(missing)}: experts are stacked, and need one each", PADDED)
    if uneven:
        yield Finding("error", f"{uneven[0]}{more(uneven)}: experts are stacked, and must have one", PADDED)
