"""Names of objects, and the names and specs that users type."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from librbd_py.format import names
from librbd_py.format.names import ImageSpec, parse_image_spec


def test_object_names() -> None:
    assert names.header("10ab") == "rbd_header.10ab"
    assert names.id_object("vm") == "rbd_id.vm"
    assert names.data_prefix("10ab") == "rbd_data.10ab"
    assert names.data_prefix("10ab", 8) == "rbd_data.8.10ab"
    assert names.data_object("rbd_data.10ab", 255) == "rbd_data.10ab.00000000000000ff"
    assert names.object_map("10ab") == "rbd_object_map.10ab"
    assert names.object_map("10ab", 4) == "rbd_object_map.10ab.0000000000000004"


def test_object_names_read_back() -> None:
    assert names.parse_data_object("rbd_data.8.1ae.00000000000000ff") == ("rbd_data.8.1ae", 255)
    assert names.parse_data_object("rbd_data.1ae.ffffffffffffffff") == ("rbd_data.1ae", (1 << 64) - 1)
    assert names.parse_object_map("rbd_object_map.1ae") == ("1ae", names.NOSNAP)
    assert names.parse_object_map("rbd_object_map.1ae.0000000000000004") == ("1ae", 4)


@pytest.mark.parametrize(
    "oid",
    [
        "rbd_data.1ae",
        "rbd_data.1ae.ff",
        "rbd_data.1ae.00000000000000FF",
        "rbd_data.../x.00000000000000ff",
        "rbd_data.1ae.00000000000000ff\n",
        "rbd_data..00000000000000ff",
        "xrbd_data.1ae.00000000000000ff",
        "rbd_data.1é.00000000000000ff",
    ],
)
def test_what_is_no_data_object(oid: str) -> None:
    assert names.parse_data_object(oid) is None


def test_image_ids() -> None:
    made = names.make_id(0x1045)
    assert made.startswith("1045") and len(made) <= 14
    assert names.check_id(made) == made
    assert len(names.make_id((1 << 63) - 1)) == 14
    for bad in ("", "a/b", "a b", "é", "x" * 65, "a\n"):
        with pytest.raises(ValueError):
            names.check_id(bad)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("vm", ImageSpec("vm")),
        ("pool/vm", ImageSpec("vm", "pool")),
        ("pool/ns/vm@s 1", ImageSpec("vm", "pool", "ns", "s 1")),
        ("pool//vm", ImageSpec("vm", "pool", "")),
        ("vm@s", ImageSpec("vm", snap="s")),
    ],
)
def test_image_specs(text: str, spec: ImageSpec) -> None:
    assert parse_image_spec(text) == spec
    if spec.namespace != "":
        assert str(spec) == text


@pytest.mark.parametrize(
    "text", ["", "/", "pool/", "/vm", "a/b/c/d", "vm@", "vm@a@b", "@s", "vm@a/b", "a\0b", "\ud800"]
)
def test_bad_image_specs(text: str) -> None:
    with pytest.raises(ValueError):
        parse_image_spec(text)


@settings(derandomize=True, database=None)
@given(st.text())
def test_any_text_is_a_spec_or_a_value_error(text: str) -> None:
    try:
        spec = parse_image_spec(text)
    except ValueError:
        return
    assert parse_image_spec(str(spec)) == parse_image_spec(str(parse_image_spec(str(spec))))


def test_pool_specs() -> None:
    assert names.parse_pool_spec("pool") == ("pool", "")
    assert names.parse_pool_spec("pool/ns") == ("pool", "ns")
    for bad in ("", "/", "pool/", "a/b/c", "a@b"):
        with pytest.raises(ValueError):
            names.parse_pool_spec(bad)
