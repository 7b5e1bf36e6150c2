"""What a LoRA folder says of itself: adapter_config.json, and the header of its safetensors file (names, dtypes, shapes)."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from cobra.storage import FormatError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

# torch takes any name without a dot for a module; they are shown, and never paths
_NAME = re.compile(r"[^.\x00-\x1f\x7f-\x9f\u2028\u2029]+(\.[^.\x00-\x1f\x7f-\x9f\u2028\u2029]+)*")
_MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<which>[AB])(?(embedding)|\.weight)")
_MALFORMED = re.compile(r"(^|.*\.)lora_(embedding_)?[AB]($|\.(?!bias$))")


@dataclass(frozen=True)
class Shapes:
    """lora_A: (r, K), lora_B: (N, r), with two further dimensions each for a convolution."""

    lora_A: tuple[int, ...]
    lora_B: tuple[int, ...]

    @property
    def rank(self) -> int:
        return self.lora_A[0]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """config: adapter_config.json
    modules: full name in the base model -> shapes; {} for adapters other than LoRA
    others: names of all other tensors
    neighbours: names of all files in the folder
    """

    config: dict
    modules: dict[str, Shapes]
    others: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()

    @cached_property
    def rank_keys(self) -> dict[str, str | None]:
        """Module -> the key of rank_pattern that sets its rank."""
        return self._first_keys("rank_pattern")

    @cached_property
    def alpha_keys(self) -> dict[str, str | None]:
        return self._first_keys("alpha_pattern")

    def _first_keys(self, field: str) -> dict[str, str | None]:
        names = {name: self.settings_name(name) for name in self.modules}
        found = first_matches(list(self.pattern(field)), set(names.values()))
        return {name: found[settings_name] for name, settings_name in names.items()}

    @property
    def r(self) -> int:
        return self.config.get("r", 8)  # peft's default

    @property
    def alpha(self) -> float:
        return self.config.get("lora_alpha", 8)

    def pattern(self, field: str) -> dict:
        return self.config.get(field) or {}

    def rank(self, name: str) -> int:
        """As configured; the tensor's own rank is `modules[name].rank`."""
        return self.pattern("rank_pattern").get(self.rank_keys[name], self.r)

    def scale(self, name: str) -> float | None:
        """What peft multiplies lora_B @ lora_A with: alpha / r, or alpha / sqrt(r), with the module's own alpha and r.
        None where the rank is not positive."""
        rank, alpha = self.rank(name), self.pattern("alpha_pattern").get(self.alpha_keys[name], self.alpha)
        if rank <= 0:
            return None
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def is_fused_experts(self, name: str) -> bool:
        """All experts of a layer in one parameter (peft's target_parameters), whose lora_A holds r rows an expert."""
        return bool(self.config.get("target_parameters")) and name.endswith((".experts", ".experts.base_layer"))

    def settings_name(self, name: str) -> str:
        """The name that patterns are matched against: for fused experts that of the parameter."""
        if not self.is_fused_experts(name):
            return name
        down = name.removesuffix(".base_layer")
        return f"{down}.gate_up_proj" if down != name else f"{down}.down_proj"


def first_matches(keys: list[str], names: Iterable[str]) -> dict[str, str | None]:
    """peft's rule: a key is an expression for a name or for its end after a dot, and the first key that matches wins.

    Most keys are plain names, thousands where experts have ranks of their own. A plain key matches the very same ending, or,
    since its dots stand for any character, one of equal length with fewer dots.
    """
    order = {key: i for i, key in enumerate(keys)}
    plain = {key for key in keys if re.fullmatch(r"[\w.-]+", key)}
    expressions = [key for key in keys if key not in plain]
    by_dots: dict[int, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key in plain:
        by_dots[len(key)][key.count(".")].append(key)
    found = {}
    for name in names:
        endings = endings_of(name)
        candidates = expressions + [ending for ending in endings if ending in plain]
        for ending in endings:
            dots = ending.count(".")
            candidates += [key for count, group in by_dots.get(len(ending), {}).items() if count > dots for key in group]
        found[name] = min((key for key in candidates if matches(key, name)), key=order.__getitem__, default=None)
    return found


def endings_of(name: str) -> list[str]:
    """The name, and what is left of it after each dot."""
    return [name, *(name[i + 1 :] for i, character in enumerate(name) if character == ".")]


def matches(key: str, name: str) -> bool:
    return _compiled(key).match(name) is not None


@lru_cache(maxsize=65536)
def _compiled(key: str) -> re.Pattern:
    return re.compile(rf"(.*\.)?({key})$")


def read_checkpoint(folder: Path | str) -> Checkpoint:
    """Reads the config and the tensors' header; no tensor is loaded and no pickle opened.

    Raises FileNotFoundError, and FormatError for files that are truncated or hostile or contradict one another, naming the
    file, the key, what was expected and what was found.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected that of an adapter, with {CONFIG} and {TENSORS}")
    config = _read_config(folder / CONFIG)
    header = _read_header(folder / TENSORS)
    neighbours = tuple(sorted(p.name for p in folder.iterdir()))
    if config["peft_type"] != "LORA":
        return Checkpoint(config, {}, tuple(header), neighbours)
    _check_settings(folder / CONFIG, config)
    matrices: dict[tuple[str, bool], dict[str, tuple[int, ...]]] = {}
    others = []
    for key, (dtype, shape) in header.items():
        name = _without_prefix(folder / TENSORS, key)
        match = _MATRIX.fullmatch(name)
        if not match:
            others.append(name)
            continue
        if dtype not in FLOATING:
            raise FormatError(f"{folder / TENSORS}: {key} is {dtype}; expected one of {', '.join(FLOATING)}")
        matrices.setdefault((match["module"], bool(match["embedding"])), {})[match["which"]] = shape
    if not matrices:
        raise FormatError(f"{folder / TENSORS}: expected lora_A and lora_B matrices, found none among {len(header)} tensors")
    modules = {name: _shapes(folder / TENSORS, name, pair) for (name, _), pair in matrices.items()}
    checkpoint = Checkpoint(config, modules, tuple(others), neighbours)
    _check_ranks(folder, checkpoint)
    return checkpoint


def _read_config(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the settings of a LoRA adapter, as peft writes them")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: expected JSON, found a truncated or foreign file: {error}") from error
    if not isinstance(config, dict):
        raise FormatError(f"{path}: expected an object of settings, found {type(config).__name__}")
    if not isinstance(config.get("peft_type"), str):
        raise FormatError(f"{path}: field 'peft_type': expected 'LORA', found {config.get('peft_type')!r}")
    return config


def _read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Key -> dtype and shape. safetensors itself holds offsets, sizes and shapes against the file's length."""
    if not path.is_file():
        pickled = path.with_suffix(".bin")
        if pickled.is_file():
            raise FormatError(
                f"{pickled}: expected {path.name}, found a pickle, which can run code and is never opened; where you trust it, "
                "load it with peft and call save_pretrained, which writes safetensors"
            )
        raise FileNotFoundError(f"{path}: no such file; expected the tensors of a LoRA adapter")
    try:
        with safe_open(path, framework="numpy") as f:
            slices = {key: f.get_slice(key) for key in f.keys()}  # noqa: SIM118 (safe_open is no mapping)
            return {key: (s.get_dtype(), tuple(s.get_shape())) for key, s in slices.items()}
    except SafetensorError as error:
        raise FormatError(f"{path}: expected safetensors, found a truncated or foreign file: {error}") from error


def _without_prefix(path: Path, key: str) -> str:
    name = key.removeprefix(PREFIX)
    if name == key or not _NAME.fullmatch(name) or (_MALFORMED.match(name) and not _MATRIX.fullmatch(name)):
        raise FormatError(f"{path}: expected keys {PREFIX}<module>.lora_A.weight, found {key[:120]!r}")
    return name


def _shapes(path: Path, name: str, pair: dict[str, tuple[int, ...]]) -> Shapes:
    if len(pair) == 1:
        found = next(iter(pair))
        raise FormatError(f"{path}: {name}: expected lora_A and lora_B, found lora_{found} alone")
    a, b = pair["A"], pair["B"]
    if len(a) < 2 or len(a) != len(b) or a[0] != b[1]:
        empty = "; an empty tensor was saved without being gathered (ZeRO-3, FSDP)" if 0 in (math.prod(a), math.prod(b)) else ""
        raise FormatError(f"{path}: {name}: expected lora_A (r, K) and lora_B (N, r), found {a} and {b}{empty}")
    return Shapes(a, b)


def _check_settings(path: Path, config: dict) -> None:
    """Types of the fields that rules read; what they say is the rules' business."""
    expected = {
        "r": ("an integer", _is_int),
        "lora_alpha": ("a number", _is_number),
        "rank_pattern": ("an object of integers", lambda v: v is None or _is_pattern(v, _is_int)),
        "alpha_pattern": ("an object of numbers", lambda v: v is None or _is_pattern(v, _is_number)),
        "target_modules": ("a list of names or an expression", lambda v: v is None or _is_expression(v) or _is_names(v)),
        "exclude_modules": ("a list of names or an expression", lambda v: v is None or _is_expression(v) or _is_names(v)),
        "modules_to_save": ("a list of names", lambda v: v is None or _is_names(v)),
        "task_type": ("a name", lambda v: v is None or isinstance(v, str)),
        "auto_mapping": ("an object of names", lambda v: v is None or (isinstance(v, dict) and _is_names([*v.values()]))),
    }
    for field, (what, holds) in expected.items():
        if field in config and not holds(config[field]):
            raise FormatError(f"{path}: field {field!r}: expected {what}, found {str(config[field])[:80]}")


def _check_ranks(folder: Path, checkpoint: Checkpoint) -> None:
    for name, shapes in checkpoint.modules.items():
        rank, key = checkpoint.rank(name), checkpoint.rank_keys[name]
        fits = shapes.rank % rank == 0 if rank > 0 and checkpoint.is_fused_experts(name) else shapes.rank == rank
        if not fits:
            source = "r" if key is None else f"rank_pattern[{key!r}], the first key that matches,"
            raise FormatError(
                f"{folder}: {name}: expected rank {rank}, as {source} in {CONFIG} says, found lora_A {shapes.lora_A} and "
                f"lora_B {shapes.lora_B} in {TENSORS}; list full module names in rank_pattern, longer ones first"
            )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _is_expression(value: object) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except (re.error, RecursionError, OverflowError):
        return False


def _is_pattern(value: object, holds: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and all(_is_expression(key) and holds(v) for key, v in value.items())
