"""Folders that contradict themselves, or want to harm their reader: every fault is named, and no tensor is loaded."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cobra.export.folder import CONFIG, PREFIX, TENSORS, first_matches, read_checkpoint
from cobra.storage import FormatError

A, B = f"{PREFIX}up.lora_A.weight", f"{PREFIX}up.lora_B.weight"
ENTRY = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}


def write(folder, config=None, tensors=None):
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up"]} | (config or {})
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors or {A: torch.ones(2, 3), B: torch.ones(4, 2)}, folder / TENSORS)
    return folder


def test_reads_the_header_only(tmp_path):
    """Sizes of tensors that no machine could hold, in a sparse file."""
    folder = write(tmp_path / "a")
    rows = 2**40
    entries = {
        A: {"dtype": "F16", "shape": [2, rows], "data_offsets": [0, 4 * rows]},
        B: {"dtype": "F16", "shape": [4, 2], "data_offsets": [4 * rows, 4 * rows + 16]},
        f"{PREFIX}head.weight": {"dtype": "I64", "shape": [], "data_offsets": [4 * rows + 16, 4 * rows + 24]},
    }
    header = json.dumps(entries).encode()
    with open(folder / TENSORS, "wb") as f:
        f.write(struct.pack("<Q", len(header)) + header)
        f.truncate(8 + len(header) + 4 * rows + 24)
    found = read_checkpoint(folder)
    assert found.modules["up"].lora_A == (2, rows) and found.others == ("head.weight",)
    assert (found.rank("up"), found.scale("up")) == (2, 1.0)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (CONFIG, "adapter_config.json: no such file; expected the settings"),
        (TENSORS, "safetensors: no such file; expected the"),
    ],
)
def test_missing_files(missing, words, tmp_path):
    (write(tmp_path / "a") / missing).unlink()
    with pytest.raises(FileNotFoundError, match=words):
        read_checkpoint(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        read_checkpoint(tmp_path / "nowhere")


def test_pickles_are_not_opened(tmp_path):
    """The file would fail to open as a pickle too: that it is refused for its name is the point."""
    (write(tmp_path / "a") / TENSORS).rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(
        FormatError, match=r"adapter_model\.bin: expected adapter_model\.safetensors, found a pickle.*save_pret"
    ):
        read_checkpoint(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"peft_type": "LORA", ', "expected JSON, found a truncated or foreign file"),
        (b"\xff\xfe\xff", "expected JSON"),
        ("[" * 200_000, "expected JSON"),
        ("[1, 2]", "expected an object of settings, found list"),
        ("{}", "field 'peft_type': expected 'LORA', found None"),
    ],
    ids=["truncated", "binary", "nested", "list", "no-type"],
)
def test_config_that_is_none(text, words, tmp_path):
    path = write(tmp_path / "a") / CONFIG
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FormatError, match=words) as raised:
        read_checkpoint(tmp_path / "a")
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("r", True, "an integer"),
        ("r", "2", "an integer"),
        ("lora_alpha", None, "a number"),
        ("lora_alpha", float("nan"), "a number"),
        ("lora_alpha", 10**400, "a number"),
        ("rank_pattern", {"up": [True, False]}, "an object of integers"),
        ("rank_pattern", [2], "an object of integers"),
        ("rank_pattern", {"up(": 2}, "an object of integers"),
        ("alpha_pattern", {"up": "2"}, "an object of numbers"),
        ("target_modules", ["up", 3], "a list of names or an expression"),
        ("target_modules", "up(", "a list of names or an expression"),
        ("exclude_modules", 3, "a list of names or an expression"),
        ("modules_to_save", "head", "a list of names"),
    ],
)
def test_settings_of_a_wrong_type(field, value, expected, tmp_path):
    with pytest.raises(FormatError, match=f"adapter_config.json: field '{field}': expected {expected}, found "):
        read_checkpoint(write(tmp_path / "a", {field: value}))


@pytest.mark.parametrize(
    ("header", "length", "words"),
    [
        ({A: ENTRY}, 2**63, "header too large"),
        ({A: ENTRY}, 10**7, "invalid header length"),
        ({A: ENTRY | {"data_offsets": [4000, 4004]}}, None, "invalid offset"),
        ({A: ENTRY, B: ENTRY}, None, "invalid offset"),
        ({A: ENTRY | {"shape": [2**62, 2**62]}}, None, "overflow"),
        ({A: ENTRY | {"shape": [-1]}}, None, "invalid JSON"),
        ({A: ENTRY | {"dtype": "PICKLE"}}, None, "unknown variant `PICKLE`"),
        ({A: ENTRY | {"data_offsets": [0, 8], "shape": [2]}}, None, "not fully covered"),
        (["a"], None, "invalid JSON"),
    ],
    ids=["huge", "long", "outside", "overlap", "overflow", "negative", "dtype", "truncated", "list"],
)
def test_hostile_headers(header, length, words, tmp_path):
    text = json.dumps(header).encode()
    path = write(tmp_path / "a") / TENSORS
    path.write_bytes(struct.pack("<Q", length or len(text)) + text + b"1234")
    with pytest.raises(FormatError, match=f"expected safetensors, found a truncated or foreign file: .*{words}") as raised:
        read_checkpoint(tmp_path / "a")
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("size", [0, 7, 40])
def test_truncated_files(size, tmp_path):
    path = write(tmp_path / "a") / TENSORS
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(FormatError, match="expected safetensors, found a truncated or foreign file"):
        read_checkpoint(tmp_path / "a")


@pytest.mark.parametrize(
    "key",
    [
        "up.lora_A.weight",
        "base_model.model.up.lora_A.default.weight",
        "base_model.model.up.lora_A",
        "base_model.model.lora_A.weight",
        "base_model.model.../../etc.lora_A.weight",
        "base_model.model.a..b.lora_A.weight",
        "base_model.model.a\0b.lora_A.weight",
        "base_model.model.a\nb.lora_A.weight",
        "base_model.model.a\x1b[2Jb.lora_A.weight",
        "base_model.model.a\x9b2Jb.lora_A.weight",
    ],
)
def test_keys_that_are_no_modules(key, tmp_path):
    with pytest.raises(FormatError, match=r"expected keys base_model\.model\.<module>\.lora_A\.weight, found") as raised:
        read_checkpoint(write(tmp_path / "a", tensors={key: torch.ones(2, 3), B: torch.ones(4, 2)}))
    assert repr(key) in str(raised.value)


@pytest.mark.parametrize("name", ["c++", "en|de", "question answering", "a/b", "a\\b", "f(x)"])
def test_names_that_torch_allows(name, tmp_path):
    """Keys of an nn.ModuleDict, as a model of several tasks has them."""
    tensors = {f"{PREFIX}tasks.{name}.lora_{x}.weight": t for x, t in (("A", torch.ones(2, 3)), ("B", torch.ones(4, 2)))}
    assert read_checkpoint(write(tmp_path / "a", tensors=tensors)).modules.keys() == {f"tasks.{name}"}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{PREFIX}head.weight": torch.ones(2)}, "expected lora_A and lora_B matrices, found none among 1 tensors"),
        ({A: torch.ones(2, 3)}, "up: expected lora_A and lora_B, found lora_A alone"),
        (
            {A: torch.ones(2, 3), B: torch.ones(4, 3)},
            r"up: expected lora_A \(r, K\) and lora_B \(N, r\), found \(2, 3\) and \(4, 3\)",
        ),
        ({A: torch.ones(2), B: torch.ones(4, 2)}, r"found \(2,\) and \(4, 2\)$"),
        ({A: torch.ones(0), B: torch.ones(0)}, r"found \(0,\) and \(0,\); an empty tensor was saved without being gathered"),
        ({A: torch.ones(2, 3, dtype=torch.int8), B: torch.ones(4, 2)}, "up.lora_A.weight is I8; expected one of F64, F32"),
        (
            {A: torch.ones(3, 3), B: torch.ones(4, 3)},
            r"up: expected rank 2, as r in adapter_config.json says, found lora_A \(3, 3\)",
        ),
    ],
    ids=["none", "half", "inner", "flat", "empty", "dtype", "rank"],
)
def test_shapes_that_disagree(tensors, words, tmp_path):
    with pytest.raises(FormatError, match=words):
        read_checkpoint(write(tmp_path / "a", tensors=tensors))


def test_no_tensor_at_all(tmp_path):
    folder = write(tmp_path / "a")
    save_file({}, folder / TENSORS)
    with pytest.raises(FormatError, match="found none among 0 tensors"):
        read_checkpoint(folder)


def test_the_first_pattern_wins(tmp_path):
    """As in peft: a shorter name in front takes the rank of a longer one behind it."""
    long = f"{PREFIX}inner.up"
    tensors = {f"{long}.lora_A.weight": torch.ones(4, 3), f"{long}.lora_B.weight": torch.ones(4, 4)}
    right = write(tmp_path / "right", {"rank_pattern": {"inner.up": 4, "up": 2}}, tensors)
    assert read_checkpoint(right).rank("inner.up") == 4
    with pytest.raises(FormatError, match=r"inner\.up: expected rank 2, as rank_pattern\['up'\], the first key that matches,"):
        read_checkpoint(write(tmp_path / "wrong", {"rank_pattern": {"up": 2, "inner.up": 4}}, tensors))


names = st.lists(
    st.text("ab.", min_size=1, max_size=6).filter(lambda s: ".." not in s and s.strip(".") == s), min_size=1, max_size=5
)


@settings(deadline=None)
@given(
    names,
    st.lists(st.text("ab.", min_size=1, max_size=6) | st.sampled_from(["a|b", ".*b", "a+", "(a.)?b"]), max_size=6, unique=True),
)
def test_patterns_match_as_in_peft(names, keys):
    """Against its own function: dots stand for any character, endings begin after a dot, order decides."""
    from peft.utils.other import get_pattern_key

    found = first_matches(keys, names)
    for name in names:
        theirs = get_pattern_key(keys, name)
        assert found[name] == (theirs if theirs in keys else None)


def test_embeddings_and_convolutions(tmp_path):
    """Other shapes that peft writes."""
    embedding, convolution = f"{PREFIX}embed_tokens.lora_embedding_", f"{PREFIX}conv.lora_"
    tensors = {
        f"{embedding}A": torch.ones(2, 96),
        f"{embedding}B": torch.ones(8, 2),
        f"{convolution}A.weight": torch.ones(2, 3, 5, 5),
        f"{convolution}B.weight": torch.ones(8, 2, 1, 1),
    }
    found = read_checkpoint(write(tmp_path / "a", {"rank_pattern": None}, tensors))
    assert {name: shapes.rank for name, shapes in found.modules.items()} == {"embed_tokens": 2, "conv": 2}


def test_fused_experts_hold_r_rows_each(tmp_path):
    """peft's target_parameters: three experts of rank 2 in one tensor; patterns name the parameter."""
    name = f"{PREFIX}mlp.experts.base_layer.lora_"
    tensors = {f"{name}A.weight": torch.ones(6, 3), f"{name}B.weight": torch.ones(4, 6)}
    config = {"target_parameters": ["gate_up_proj"], "alpha_pattern": {"mlp.experts.gate_up_proj": 6}}
    found = read_checkpoint(write(tmp_path / "a", config, tensors))
    assert found.scale("mlp.experts.base_layer") == 3.0
    with pytest.raises(FormatError, match="expected rank 4"):
        read_checkpoint(write(tmp_path / "a", config | {"r": 4}, tensors))
