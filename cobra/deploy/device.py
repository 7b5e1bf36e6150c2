"""What a device can do, as numbers: the only thing a deployment plan knows of it."""

from __future__ import annotations

import dataclasses
import difflib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class DeviceSpec:
    """SI units: FLOP/s, B/s, s, B.

    bfloat16, float16, float32, float64: FLOP/s of a large dense matrix product in this dtype
    bandwidth: of the main memory
    launch: one small operation, from call to call
    cache: the last level that is not shared with strangers, a CPU's second; activations that fill at most half of it do not go
        to memory between two operations
    grouped: whether one launch multiplies segments of different ranks; torch's own operations launch one each
    """

    name: str
    bfloat16: float
    float16: float
    float32: float
    float64: float
    bandwidth: float
    launch: float
    cache: int
    grouped: bool = False

    def __post_init__(self):
        if not self.name or not isinstance(self.name, str):
            raise ValueError(f"name={self.name!r} of a device: expected some text")
        for field in (*ITEMSIZE, "bandwidth"):
            if not is_number(getattr(self, field)) or getattr(self, field) == 0:
                raise ValueError(f"{self.name}: {field}={getattr(self, field)!r}: expected a finite number greater than 0")
        for field in ("launch", "cache"):
            if not is_number(getattr(self, field)):
                raise ValueError(f"{self.name}: {field}={getattr(self, field)!r}: expected a finite number of at least 0")

    def flops(self, dtype: str) -> float:
        """FLOP/s in a dtype."""
        return getattr(self, one_of("dtype", dtype, ITEMSIZE))

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: dict) -> DeviceSpec:
        """From `to_dict` or by hand. Raises ValueError for unknown keys (with the nearest), missing ones and bad numbers."""
        return cls(**checked_fields(cls, value))


def is_number(value: object) -> bool:
    """Whether a value is a finite number of at least 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def nearest(name: object, known: Iterable[str]) -> str:
    """' (did you mean …?)', or nothing where no name is near."""
    close = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def one_of(what: str, value: object, known: Iterable[str]) -> str:
    """The value. Raises ValueError where it is not one of the known."""
    if value not in tuple(known):
        raise ValueError(f"{what}={value!r} is not one of {', '.join(map(repr, known))}{nearest(value, known)}")
    return value


def checked_fields(cls: type, value: object) -> dict:
    """The value, a mapping with every field of a dataclass and no other. Raises ValueError naming the first that is wrong."""
    what = f"a {cls.__name__}"
    if not isinstance(value, dict):
        raise ValueError(f"{what} is a mapping of its fields, found {type(value).__name__}")
    fields = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(cls)}
    for key in value:
        if key not in fields:
            raise ValueError(f"{what} has no field {key!r}{nearest(key, fields)}; it has {', '.join(fields)}")
    missing = [key for key, needed in fields.items() if needed and key not in value]
    if missing:
        raise ValueError(f"{what} needs {', '.join(missing)}")
    return value


# Vendors' figures for dense products: tensor cores but for float32, which torch keeps out of TF32. `launch` is what eager
# PyTorch reaches back to back, not a vendor's figure. The CPU stands for 16 cores with AVX2; `measure_cpu` knows this one.
DEVICES = {
    spec.name: spec
    for spec in (
        DeviceSpec("A100-40", 312e12, 312e12, 19.5e12, 19.5e12, 1.555e12, 4e-6, 40 * 2**20),
        DeviceSpec("A100-80", 312e12, 312e12, 19.5e12, 19.5e12, 2.039e12, 4e-6, 40 * 2**20),
        DeviceSpec("H100", 989e12, 989e12, 67e12, 67e12, 3.35e12, 4e-6, 50 * 2**20),
        DeviceSpec("H200", 989e12, 989e12, 67e12, 67e12, 4.8e12, 4e-6, 50 * 2**20),
        DeviceSpec("L4", 121e12, 121e12, 30.3e12, 0.47e12, 0.3e12, 4e-6, 48 * 2**20),
        DeviceSpec("CPU", 1e12, 1e12, 1e12, 0.5e12, 0.1e12, 3e-6, 16 * 2**20),
    )
}


def device_spec(name: str) -> DeviceSpec:
    """The committed spec of this name, in any case. Raises ValueError with close names."""
    upper = str(name).upper()
    if upper not in DEVICES:
        raise ValueError(
            f"device {name!r} is unknown{nearest(upper, DEVICES)}; there are {', '.join(DEVICES)}, "
            "and DeviceSpec.from_dict for others"
        )
    return DEVICES[upper]


def measure_cpu(name: str = "CPU, measured") -> DeviceSpec:
    """This CPU under torch's present number of threads: products, a pass over memory and a small operation, measured.

    Takes about a second. The best of each: peaks, which what else the machine does does not lower.
    """
    with torch.inference_mode():
        flops = {}
        for dtype in ITEMSIZE:
            square = torch.ones(384, 384, dtype=getattr(torch, dtype))
            flops[dtype] = 2 * 384**3 / _best_seconds(lambda square=square: square @ square)
        buffer = torch.ones(2**24)  # 64 MiB; in place, as an output is updated: a copy would also fetch what it overwrites
        passed = _best_seconds(lambda: buffer.mul_(1.0))
        launch = _best_seconds(_small_operations(torch.ones(1, 8), torch.ones(8, 8))) / 2
    cache = _second_cache() * torch.get_num_threads()
    return DeviceSpec(name, **flops, bandwidth=2 * 4 * len(buffer) / passed, launch=launch, cache=cache)


def _small_operations(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.addmm(x, x @ weight.t(), weight.t())


def _best_seconds(run: Callable[[], object], budget: float = 0.12) -> float:
    run()
    seconds: list[float] = []
    end = time.perf_counter() + budget
    while len(seconds) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _second_cache() -> int:
    """Bytes of a core's second-level cache as Linux reports it; 1 MiB elsewhere."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        size = (index / "size").read_text().strip()
        if (index / "level").read_text().strip() == "2" and size.endswith("K"):
            return int(size[:-1]) * 1024
    return 2**20
