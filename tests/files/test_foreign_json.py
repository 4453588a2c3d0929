"""One boundary for JSON that others wrote: which field, what was found, what was expected."""

import pytest

from qcli.errors import CheckpointError
from qcli.files.foreign_json import (
    FLAG,
    NUMBER,
    OBJECT,
    TEXT,
    Required,
    at_least,
    check,
    either,
    list_of,
    map_of,
    one_of,
    parse,
    parse_object,
    whole,
)


@pytest.mark.parametrize(
    "data, words",
    [
        (b'{"a": ', "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b'{"\xff": 1}', "byte 2 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5000, "is not valid JSON"),
        ("{}".encode("utf-16"), "byte 0 is not UTF-8"),
    ],
)
def test_what_is_no_json(data, words):
    with pytest.raises(CheckpointError, match="thing.json") as refused:
        parse(data, "thing.json", "Do this.")
    assert words in refused.value.message and refused.value.hint == "Do this."


def test_a_byte_order_mark_is_let_pass():
    assert parse_object(b'\xef\xbb\xbf{"a": 1}', "x", "") == {"a": 1}


def test_a_name_that_stands_twice():
    assert parse_object(b'{"a": 1, "a": 2}', "x", "") == {"a": 2}
    with pytest.raises(CheckpointError, match="the name 'a' occurs twice"):
        parse_object(b'{"b": {"a": 1, "a": 2}}', "x", "", unique=True)


@pytest.mark.parametrize("data, found", [(b"[]", r"\[\] \(a list\)"), (b"null", "null"), (b'"x"', r'"x" \(a string\)')])
def test_another_root(data, found):
    with pytest.raises(CheckpointError, match=f"x holds {found}, expected a JSON object"):
        parse_object(data, "x", "")


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (TEXT, ["", "a"], [1, True, ["a"], {}]),
        (FLAG, [True, False], [0, 1, "true"]),
        (OBJECT, [{}], [[], "x"]),
        (NUMBER, [0, -1.5, 10**400 // 10**399], [True, "1", float("nan"), float("inf")]),
        (whole(), [0, 5], [-1, 1.0, True, 1 << 63]),
        (whole(1, 9), [1, 9], [0, 10]),
        (at_least(0), [0, 0.5], [-0.1, float("inf")]),
        (one_of("nf4", "fp4"), ["nf4"], ["nf8", 4, ["nf4"], {}]),
        (one_of(256), [256], [True, 256.0, "256"]),
        (list_of(TEXT), [[], ["a"]], [["a", 1], "a", [None]]),
        (list_of(whole(), 2), [[1, 2]], [[1], [1, 2, 3], [1, "2"]]),
        (map_of(TEXT), [{}, {"a": "b"}], [{"a": 1}, ["a"]]),
        (either(TEXT, OBJECT), ["a", {}], [1, []]),
    ],
)
def test_kinds(kind, good, bad):
    for value in [*good, None]:  # null is as good as absent
        check({"field": value}, {"field": kind}, "x")
    for value in bad:
        with pytest.raises(CheckpointError, match="x: field is .*, expected"):
            check({"field": value}, {"field": kind}, "x")


def test_a_number_too_large_for_a_float_is_finite():
    with pytest.raises(CheckpointError, match="expected a finite number"):
        check({"field": 10**400}, {"field": NUMBER}, "x")


def test_what_must_be_there():
    check({"a": "x"}, {"a": Required(TEXT)}, "x")
    for value in ({}, {"a": None}):
        with pytest.raises(CheckpointError, match="x has no a, expected a string"):
            check(value, {"a": Required(TEXT)}, "x")


def test_a_long_value_is_shortened():
    with pytest.raises(CheckpointError) as refused:
        check({"a": list(range(10_000))}, {"a": TEXT}, "x")
    assert len(refused.value.message) < 120
