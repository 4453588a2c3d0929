"""Kinds of values in a generation config: each kind has a description in words and a test.

The ranges are those of the rules in transformers' generation/logits_process.py and stopping_criteria.py.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

_BIGGEST_ID = 2**31
_LARGEST = 1e30  # no rule needs a larger number, and an integer in JSON may be too large for a float


@dataclass(frozen=True)
class Kind:
    """`expected` ends the sentence "expected ...". `holds` says whether a value other than None is of this kind."""

    expected: str
    holds: Callable[[object], bool]


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST  # False for NaN


def _is_token(value) -> bool:
    return type(value) is int and abs(value) < _BIGGEST_ID


def _is_id(value) -> bool:
    return _is_token(value) and value >= 0


def _listed(value, holds: Callable[[object], bool], at_least: int = 0) -> bool:
    return isinstance(value, (list, tuple)) and len(value) >= at_least and all(holds(item) for item in value)


def _is_bias(value) -> bool:
    if isinstance(value, dict):
        value = list(value.items())
    return _listed(value, lambda pair: _listed(pair, lambda _: True, 2) and len(pair) == 2, 1) and all(
        _listed(ids, _is_id, 1) and _is_number(bias) for ids, bias in value
    )


def _is_decay(value) -> bool:
    return _listed(value, _is_number, 2) and len(value) == 2 and type(value[0]) is int and value[0] >= 0 < value[1]


_WATERMARK: dict[str, Callable[[object], bool]] = {
    "greenlist_ratio": lambda value: _is_number(value) and 0 <= value <= 1,
    "bias": _is_number,
    "hashing_key": _is_id,
    "seeding_scheme": lambda value: value in ("lefthash", "selfhash"),
    "context_width": lambda value: type(value) is int and value >= 1,
}


def _is_watermark(value) -> bool:
    if hasattr(value, "to_dict"):  # transformers' own class, after reading
        value = value.to_dict()
    return isinstance(value, dict) and all(name in _WATERMARK and _WATERMARK[name](value[name]) for name in value)


ANY = Kind("anything", lambda value: True)
FLAG = Kind("true or false", lambda value: type(value) is bool)
COUNT = Kind("a whole number of 0 or more", lambda value: type(value) is int and value >= 0)
# transformers copies a text as many times as an n-gram is long.
NGRAM = Kind("a whole number of 0 to 65,536", lambda value: type(value) is int and 0 <= value <= 1 << 16)
POSITIVE = Kind("a whole number of 1 or more", lambda value: type(value) is int and value >= 1)
NUMBER = Kind("a number", _is_number)
POSITIVE_NUMBER = Kind("a number above 0", lambda value: _is_number(value) and value > 0)
TEMPERATURE = Kind("a number of 0 (greedy) or more", lambda value: _is_number(value) and value >= 0)
SHARE = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
SHARE_ABOVE_0 = Kind("a number above 0 and at most 1", lambda value: _is_number(value) and 0 < value <= 1)
TOKENS = Kind("a token's id or a list of them", lambda value: _is_token(value) or _listed(value, _is_token))
TOKEN = Kind("a token's id", _is_token)
TOKEN_LIST = Kind("a list of token ids", lambda value: _listed(value, _is_token))
ID = Kind("a token's id, 0 or more", _is_id)
IDS = Kind("a token's id, 0 or more, or a list of them", lambda value: _is_id(value) or _listed(value, _is_id, 1))
ID_LISTS = Kind("a list of lists of token ids", lambda value: _listed(value, lambda ids: _listed(ids, _is_id, 1), 1))
TEXTS = Kind(
    "a text or a list of texts, none of them empty",
    lambda value: (type(value) is str and value != "") or _listed(value, lambda item: type(item) is str and item != ""),
)
DECAY = Kind("a list of a position and a factor above 0", _is_decay)
SEQUENCE_BIAS = Kind("a list of pairs, each a list of token ids and a number", _is_bias)
WATERMARK = Kind(f"an object with any of {', '.join(_WATERMARK)}, each as in transformers' WatermarkingConfig", _is_watermark)


def spelled(value: object) -> str:
    """A value as JSON, shortened if it is long."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
