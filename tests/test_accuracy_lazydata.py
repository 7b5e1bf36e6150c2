"""R's data frames without R, on databases written here by the format's own rules."""

import gzip
import lzma
import struct

import pytest

from bench.accuracy.lazydata import Vector, parse, read_data_frame

HEADER = b"X\n" + struct.pack(">3i", 3, 0x40102, 0x30500) + struct.pack(">i", 5) + b"UTF-8"


def char(text):
    return struct.pack(">2i", 9, -1) if text is None else struct.pack(">2i", 9, len(text.encode())) + text.encode()


def vector(kind, packed, count, attributes=()):
    """attributes: names and items; the first use of a name defines its symbol"""
    flags = kind | (0x200 if attributes else 0)
    pairs = b"".join(struct.pack(">i", 2 | 0x400) + symbol + item for symbol, item in attributes)
    return struct.pack(">2i", flags, count) + packed + (pairs + struct.pack(">i", 254) if attributes else b"")


def symbol(name):
    return struct.pack(">i", 1) + char(name)


def again(number):
    """A symbol that was defined before."""
    return struct.pack(">i", number << 8 | 255)


def strings(*texts):
    return vector(16, b"".join(map(char, texts)), len(texts))


def numbers(*values, attributes=()):
    kind, code = (14, "d") if isinstance(values[0], float) else (13, "i")
    return vector(kind, struct.pack(f">{len(values)}{code}", *values), len(values), attributes)


def listed(*items, attributes):
    return vector(19, b"".join(items), len(items), attributes)


def database(frame, method=b"Z", name="frame"):
    packed = lzma.compress(frame, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}])
    record = struct.pack(">i", len(frame)) + method + packed
    variables = listed(numbers(3, len(record)), attributes=[(symbol("names"), strings(name))])
    index = listed(variables, attributes=[(again(1), strings("variables"))])
    return gzip.compress(HEADER + index), b"???" + record


FRAME = HEADER + listed(
    strings("good", None, "süß"),
    numbers(2, 1, -(2**31), attributes=[(symbol("levels"), strings("other", "great")), (symbol("class"), strings("factor"))]),
    numbers(0.5, 1.0, 2.0),
    attributes=[(symbol("names"), strings("review", "score", "weight")), (again(2), strings("data.frame"))],
)


def test_columns_of_a_data_frame():
    """Strings with gaps, a factor by its levels, and doubles."""
    columns = read_data_frame(*database(FRAME), "frame")
    assert columns["review"].strings() == ["good", None, "süß"]
    assert columns["score"].strings() == ["great", "other", None]
    assert columns["weight"] == Vector([0.5, 1.0, 2.0])


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match="no data frame 'other' in the database, only frame"):
        read_data_frame(*database(FRAME), "other")


def test_what_cannot_be_read_is_refused():
    """Another compression, a format that is not XDR, an object of another kind, and a file that was cut."""
    with pytest.raises(ValueError, match="method b'2': only raw LZMA"):
        read_data_frame(*database(FRAME, method=b"2"), "frame")
    with pytest.raises(ValueError, match="XDR serialisation, found b'A"):
        parse(b"A\n1")
    with pytest.raises(ValueError, match="R object of type 3 at byte"):
        parse(HEADER + struct.pack(">i", 3))
    with pytest.raises(ValueError, match="inside an item"):
        parse(FRAME[:-60])
