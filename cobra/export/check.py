"""Whether a LoRA folder, of this library or any other, loads in an engine with the right scale, and what to change if not.

Only adapter_config.json and the header of adapter_model.safetensors are read. The reference is peft: per module, the scale
alpha_i / r_i (or alpha_i / sqrt(r_i)) that it would use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cobra.export.engines import gguf_rules, peft_rules, vllm_rules
from cobra.export.folder import Checkpoint, read_checkpoint
from cobra.export.rules import MERGE, Finding
from cobra.export.sglang import sglang_rules

LEVELS = ("error", "warning", "note")
RULES: dict[str, tuple[str, Callable[[Checkpoint], Iterable[Finding]]]] = {
    "peft": ("0.21.2", peft_rules),
    "transformers": ("5.23.0", peft_rules),
    "vllm": ("0.33.0", vllm_rules),
    "sglang": ("0.5.23", sglang_rules),
    "gguf": ("llama.cpp 2026-07", gguf_rules),
}
ENGINES = tuple(RULES)


@dataclass(frozen=True)
class Verdict:
    """version: the release whose loader was read; findings: errors first"""

    engine: str
    version: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Loads with the right scale; warnings say under which conditions."""
        return all(finding.level != "error" for finding in self.findings)


@dataclass(frozen=True)
class AdapterCheck:
    """verdicts: engine -> verdict, in the order asked for"""

    folder: str
    verdicts: dict[str, Verdict]

    @property
    def ok(self) -> bool:
        return all(verdict.ok for verdict in self.verdicts.values())

    def table(self) -> str:
        """A line an engine, and under it what was found and what to do."""
        width = max([len(engine) for engine in self.verdicts] + [6])
        lines = [f"{'engine':<{width}}  loads  version"]
        for verdict in self.verdicts.values():
            lines.append(f"{verdict.engine:<{width}}  {'yes' if verdict.ok else 'no':<5}  {verdict.version}")
            for finding in verdict.findings:
                lines.append(f"  {finding.level}: {finding.message}")
                lines += [f"    fix: {finding.fix}"] if finding.fix else []
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        verdicts = {
            engine: {"ok": v.ok, "version": v.version, "findings": [asdict(f) for f in v.findings]}
            for engine, v in self.verdicts.items()
        }
        return {"folder": self.folder, "ok": self.ok, "verdicts": verdicts}

    def __repr__(self) -> str:
        said = ", ".join(f"{v.engine} {'yes' if v.ok else 'no'}" for v in self.verdicts.values())
        return f"AdapterCheck({self.folder}: {said})"


def check_adapter(folder: Path | str, engines: Sequence[str] = ENGINES) -> AdapterCheck:
    """What each engine makes of the folder.

    Raises ValueError for an unknown engine, FileNotFoundError, and FormatError for files that no engine could read right:
    truncated, hostile, pickled, or contradicting one another.
    """
    unknown = [engine for engine in engines if engine not in RULES]
    if isinstance(engines, str) or unknown:
        found = f"engines={engines!r}, a string" if isinstance(engines, str) else f"engine {unknown[0]!r} is unknown"
        raise ValueError(f"{found}; expected a list of some of {', '.join(ENGINES)}")
    checkpoint = read_checkpoint(folder)
    return AdapterCheck(str(folder), {engine: judge(engine, checkpoint) for engine in engines})


def judge(engine: str, checkpoint: Checkpoint) -> Verdict:
    version, rules = RULES[engine]
    kind = checkpoint.config["peft_type"]
    findings = rules(checkpoint) if kind == "LORA" else _other_type(engine, kind)
    return Verdict(engine, version, tuple(sorted(findings, key=lambda finding: LEVELS.index(finding.level))))


def _other_type(engine: str, kind: str) -> Iterator[Finding]:
    if engine in ("peft", "transformers"):
        yield Finding("warning", f"peft_type is {kind!r}, not LORA: rules for it were not checked", "load it once to be sure")
    else:
        fix = f"convert it with peft.convert_to_lora where peft can, or {MERGE}"
        yield Finding("error", f"peft_type is {kind!r}; only LORA loads", fix)
