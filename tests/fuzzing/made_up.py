"""How input is made up at random: values, objects of JSON, and files with some of their bytes changed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from hypothesis import strategies as st

words = st.text(max_size=20) | st.sampled_from(["", "auto", "none", "~x", "a\0b", "\ud800", "\x1b[31m", "../x", "/"])
# paddle makes subnormal numbers 0 in its process, and hypothesis does not draw what is not there.
numbers = (
    st.integers()
    | st.floats(allow_subnormal=False)
    | st.sampled_from([0, -1, 2**31, 2**63, 10**30, 10**400, 1e308, 1e-320])
)
scalars = st.none() | st.booleans() | numbers | words
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4), max_leaves=8
)


def objects(names: Iterable[str], usual: Any = values) -> Any:
    """JSON objects that have some of the ``names``, and perhaps others."""
    return st.dictionaries(st.sampled_from(sorted(names)) | words, usual, max_size=6)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


@st.composite
def mutated(draw: Any, whole: bytes) -> bytes:
    """``whole`` with some bytes changed, taken out, doubled or put in, or cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["set", "take", "put", "double", "cut"]))
        if kind == "set" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "take":
            del data[at : at + draw(st.integers(1, 20))]
        elif kind == "put":
            data[at:at] = draw(
                st.binary(max_size=8) | st.sampled_from([b'"', b"{", b"}", b"[", b"]", b",", b":", b"\n", b"9" * 30])
            )
        elif kind == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 40))] * draw(st.integers(1, 3))
        elif draw(st.booleans()):
            del data[at:]
    return bytes(data)
