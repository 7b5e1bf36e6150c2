"""Reads data frames from an R package's lazy-load database (`data/Rdata.rdx` and `Rdata.rdb`) without R.

Only what such data frames hold: vectors of integers, logicals, doubles and strings, factors, lists and their attributes, in R's
XDR serialisation. https://cran.r-project.org/doc/manuals/r-release/R-ints.html#Serialization-Formats
"""

from __future__ import annotations

import gzip
import lzma
import struct
from dataclasses import dataclass, field

SYMBOL, PAIRLIST, CHAR, LOGICAL, INTEGER, REAL, STRING, LIST = 1, 2, 9, 10, 13, 14, 16, 19
NIL, REFERENCE = 254, 255
HAS_ATTRIBUTES, HAS_TAG = 0x200, 0x400


@dataclass(frozen=True)
class Vector:
    values: list
    attributes: dict[str, Vector] = field(default_factory=dict)

    def named(self) -> dict[str, Vector]:
        """The elements of a list by name."""
        return dict(zip(self.attributes["names"].values, self.values, strict=True))

    def strings(self) -> list[str | None]:
        """The values of a string vector or of a factor."""
        levels = self.attributes.get("levels")
        if levels is None:
            return self.values
        return [None if code < 1 else levels.values[code - 1] for code in self.values]


def read_data_frame(rdx: bytes, rdb: bytes, name: str) -> dict[str, Vector]:
    """Columns by name. Raises ValueError where there is no such data frame, or where it holds what this cannot read."""
    index = parse(gzip.decompress(rdx)).named()["variables"].named()
    if name not in index:
        raise ValueError(f"no data frame {name!r} in the database, only {', '.join(sorted(index))}")
    start, length = index[name].values
    method = rdb[start + 4 : start + 5]  # after four bytes with the length of what is compressed
    if method != b"Z":
        raise ValueError(f"{name} is compressed by method {method!r}: only raw LZMA (b'Z') is read")
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}])
    return parse(decompressor.decompress(rdb[start + 5 : start + length])).named()


def parse(data: bytes) -> Vector:
    """One serialised R object. Raises ValueError for a format or an object that this cannot read."""
    if data[:2] != b"X\n":
        raise ValueError(f"expected R's XDR serialisation, found {data[:2]!r}")
    reader = _Reader(data, 2)
    version = reader.integers(3)[0]
    if version == 3:  # followed by the name of the encoding
        reader.take(reader.integers(1)[0])
    return reader.item()


class _Reader:
    def __init__(self, data: bytes, at: int):
        self.data, self.at = data, at
        self.symbols: list[str] = []

    def take(self, size: int) -> bytes:
        if self.at + size > len(self.data):
            raise ValueError(f"the serialised object ends at byte {len(self.data)}, inside an item")
        self.at += size
        return self.data[self.at - size : self.at]

    def integers(self, count: int) -> list[int]:
        return list(struct.unpack(f">{count}i", self.take(4 * count)))

    def item(self):
        (flags,) = self.integers(1)
        kind = flags & 0xFF
        if kind == NIL:
            return None
        if kind == REFERENCE:
            return self.symbols[(flags >> 8 or self.integers(1)[0]) - 1]
        if kind == SYMBOL:
            self.symbols.append(self.item())
            return self.symbols[-1]
        if kind == CHAR:
            (size,) = self.integers(1)
            return None if size == -1 else self.take(size).decode()
        if kind == PAIRLIST:
            return self.pairs(flags)
        return Vector(self.values(kind), (self.item() or {}) if flags & HAS_ATTRIBUTES else {})

    def values(self, kind: int) -> list:
        if kind not in (LOGICAL, INTEGER, REAL, STRING, LIST):
            raise ValueError(f"R object of type {kind} at byte {self.at}: only vectors, factors and lists are read")
        (count,) = self.integers(1)
        if kind in (STRING, LIST):
            return [self.item() for _ in range(count)]
        return self.integers(count) if kind != REAL else list(struct.unpack(f">{count}d", self.take(8 * count)))

    def pairs(self, flags: int) -> dict[str, Vector]:
        found = {}
        while flags & 0xFF == PAIRLIST:
            if flags & HAS_ATTRIBUTES or not flags & HAS_TAG:
                raise ValueError(f"pairlist without names at byte {self.at}")
            tag = self.item()
            found[tag] = self.item()
            (flags,) = self.integers(1)
        return found
