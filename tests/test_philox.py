import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from cobra_kernels import extension, philox4x32_ref
from cobra_kernels.philox import gate_words, gate_words_ref

HEADERS = Path(__file__).parents[1] / "csrc"
BIG = 2**64 - 1

# counter, key, words: kat_vectors of Random123
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
IDS = ["zeros", "ones", "pi"]

# sites, ranks, seed, step, first_site
DRAWS = [
    (1, 1, 0, 0, 0),
    (3, 5, BIG, 1, 0),
    (2, 16, 2**32, BIG, 7),
    (5, 13, 2**63 + 11, 2**33 + 3, 2**32 - 5),
    (0, 4, 1, 2, 3),
    (4, 0, 1, 2, 3),
]

needs_extension = pytest.mark.skipif(extension.load() is None, reason="the compiled extension was not built")


def words_of(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS, ids=IDS)
def test_reference_gives_the_published_words(counter, key, words):
    assert philox4x32_ref(torch.tensor(words_of(counter)), words_of(key)).tolist() == words_of(words)


def test_reference_is_elementwise():
    """Any shape of counters at once: each element's words are its own."""
    counter = torch.randint(2**32, (3, 5, 4))
    words = philox4x32_ref(counter, (1, 2))
    assert torch.equal(words[2, 3], philox4x32_ref(counter[2, 3], (1, 2)))


@needs_extension
@pytest.mark.parametrize("draw", DRAWS, ids=str)
def test_extension_equals_reference(draw):
    words = gate_words(*draw)
    assert words.dtype == torch.int64
    assert torch.equal(words, gate_words_ref(*draw))


def test_without_extension_the_words_are_the_references(monkeypatch):
    monkeypatch.setattr(extension, "load", lambda: None)
    assert torch.equal(gate_words(3, 5, BIG, 1), gate_words_ref(3, 5, BIG, 1))


@pytest.mark.parametrize("function", [gate_words, gate_words_ref])
def test_a_gate_keeps_its_word(function):
    """A gate's word depends on neither r_max nor how many sites are drawn with it, so that shrinking moves no gate."""
    words = function(9, 23, 5, 6)
    for ranks in (1, 3, 4, 22):
        assert torch.equal(function(2, ranks, 5, 6, first_site=7), words[7:, :ranks])


@pytest.mark.parametrize("function", [gate_words, gate_words_ref])
def test_every_half_of_seed_and_step_counts(function):
    """No part of the counter or key is dropped: no two of these draws share a word."""
    draws = [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 2**32, 0), (0, 0, 2)]
    words = torch.cat([function(2, 8, seed, step, first_site) for seed, step, first_site in draws])
    assert words.unique().numel() == words.numel()


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_header_stands_alone(tmp_path):
    """csrc/philox.h, compiled with nothing else, gives the published words and the reference's counter layout."""

    def literal(words: str) -> str:
        return ", ".join(f"0x{word}u" for word in words.split())

    calls = [f"philox4x32_10({{{{{literal(counter)}}}}}, {literal(key)})" for counter, key, _ in VECTORS]
    calls.append(f"gate_block({BIG}u, {2**33 + 5}u, 7, 3)")
    (tmp_path / "main.cpp").write_text(
        '#include "philox.h"\n#include <cstdio>\n#include <initializer_list>\nint main() {\n'
        f"  for (const auto& words : {{cobra::{', cobra::'.join(calls)}}})\n"
        '    for (uint32_t w : words.w) std::printf("%u\\n", w);\n}\n'
    )
    program = tmp_path / "main"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-I", HEADERS]
    subprocess.run(["g++", *flags, tmp_path / "main.cpp", "-o", program], check=True)
    printed = [int(line) for line in subprocess.run(program, check=True, capture_output=True, text=True).stdout.split()]
    expected = [word for *_, words in VECTORS for word in words_of(words)]
    assert printed == expected + gate_words_ref(1, 16, BIG, 2**33 + 5, first_site=7)[0, 12:].tolist()
