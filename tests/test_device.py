"""Device numbers as data: the committed ones, own ones, and this CPU's."""

import dataclasses
import json

import pytest

from cobra.deploy.device import DEVICES, ITEMSIZE, DeviceSpec, device_spec, measure_cpu

OWN = {
    "name": "board",
    "bfloat16": 4e12,
    "float16": 4e12,
    "float32": 2e12,
    "float64": 1e12,
    "bandwidth": 5e10,
    "launch": 1e-5,
    "cache": 1000,
}


def test_committed_devices():
    assert set(DEVICES) == {"A100-40", "A100-80", "H100", "H200", "L4", "CPU"}
    assert all(DEVICES[name].name == name for name in DEVICES)
    assert DEVICES["A100-40"].bandwidth < DEVICES["A100-80"].bandwidth < DEVICES["H100"].bandwidth < DEVICES["H200"].bandwidth
    for spec in DEVICES.values():
        assert spec.flops("bfloat16") == spec.bfloat16 >= spec.float32 >= spec.float64
        assert spec.bandwidth < spec.float64  # B/s and FLOP/s, not GB/s beside TFLOP/s
        assert 1e-6 <= spec.launch <= 1e-5 and 2**20 <= spec.cache <= 2**27


def test_break_even_rank_of_the_roofline():
    """F / BW: below this rank a shrink is bound by reading its input."""
    assert DEVICES["A100-80"].bfloat16 / DEVICES["A100-80"].bandwidth == pytest.approx(153, abs=1)
    assert DEVICES["H100"].bfloat16 / DEVICES["H100"].bandwidth == pytest.approx(295, abs=1)


def test_lookup_in_any_case():
    assert device_spec("h100") is device_spec("H100") is DEVICES["H100"]


@pytest.mark.parametrize(("name", "near"), [("a100", "'A100-40'"), ("H-100", "'H100'"), ("l40", "'L4'")])
def test_unknown_device_has_close_names(name, near):
    with pytest.raises(ValueError, match=rf"device '{name}' is unknown \(did you mean .*{near}.*there are A100-40, A100-80"):
        device_spec(name)


def test_own_spec_through_json():
    spec = DeviceSpec.from_dict(json.loads(json.dumps(OWN)))
    assert spec.to_dict() == OWN | {"grouped": False}
    assert DeviceSpec.from_dict(spec.to_dict()) == spec
    assert DeviceSpec.from_dict(OWN | {"grouped": True}).grouped


def test_unknown_key_names_the_nearest():
    with pytest.raises(ValueError, match=r"a DeviceSpec has no field 'bandwith' \(did you mean 'bandwidth'\?\)"):
        DeviceSpec.from_dict(OWN | {"bandwith": 1e12})


def test_missing_keys_are_named():
    with pytest.raises(ValueError, match="a DeviceSpec needs launch, cache"):
        DeviceSpec.from_dict({k: v for k, v in OWN.items() if k not in ("launch", "cache")})
    with pytest.raises(ValueError, match="a DeviceSpec is a mapping of its fields, found list"):
        DeviceSpec.from_dict([OWN])


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("float32", 0),
        ("bandwidth", -1.0),
        ("bandwidth", float("nan")),
        ("launch", -1e-6),
        ("cache", "40 MB"),
        ("float16", True),
    ],
)
def test_bad_numbers_are_named(field, bad):
    with pytest.raises(ValueError, match=f"board: {field}={bad!r}: expected a finite number"):
        DeviceSpec.from_dict(OWN | {field: bad})


def test_zero_launch_and_cache_are_a_pure_roofline():
    spec = dataclasses.replace(DEVICES["H100"], launch=0.0, cache=0)
    assert (spec.launch, spec.cache) == (0.0, 0)


def test_unknown_dtype():
    with pytest.raises(ValueError, match=r"dtype='bfloat' is not one of .* \(did you mean 'bfloat16'"):
        DEVICES["H100"].flops("bfloat")


def test_measured_cpu():
    """Real measurements give a spec that can be stored; they lie within what any machine of these years can do."""
    spec = measure_cpu("mine")
    assert spec.name == "mine" and not spec.grouped
    assert all(1e8 < spec.flops(dtype) < 1e15 for dtype in ITEMSIZE)
    assert 1e8 < spec.bandwidth < 1e13
    assert 1e-7 < spec.launch < 1e-2
    assert spec.cache >= 2**16
    assert DeviceSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
