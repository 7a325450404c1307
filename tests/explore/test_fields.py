# SPDX-License-Identifier: Apache-2.0
import re

import numpy as np
import pytest

from mvke_tf.data.encoder import EncodedFeature
from mvke_tf.errors import DataError
from mvke_tf.explore.fields import from_text, hint, to_text

NUMBER = EncodedFeature("age", "user", "buckets", "number")
WHOLE = EncodedFeature("user", "user", "hash", "integer", bins=4)
WORD = EncodedFeature("city", "user", "vocabulary", "string")
LIST = EncodedFeature("seen", "user", "vocabulary", "string", length=3, keep="last")
WEIGHTED = EncodedFeature("likes", "user", "vocabulary", "string", length=3, weighted=True, keep="heaviest")
VECTOR = EncodedFeature("face", "user", "vector", "vector", width=2)


@pytest.mark.parametrize(
    ("feature", "text", "raw"),
    [
        (NUMBER, "35", {"age": [35.0]}),
        (NUMBER, "0.1", {"age": [np.float32(0.1)]}),
        (NUMBER, "", {"age": [np.nan]}),
        (WHOLE, "-9223372036854775807", {"user": [-(2**63) + 1]}),
        (WHOLE, "", {"user": [-(2**63)]}),
        (WORD, " São = Paulo, <b>", {"city": [" São = Paulo, <b>"]}),
        (WORD, "", {"city": [""]}),
        (LIST, "a = 2\nb, c", {"seen": [["a = 2", "b, c"]], "seen_weights": [[1.0, 1.0]]}),
        (LIST, "", {"seen": [[""]], "seen_weights": [[0.0]]}),
        (WEIGHTED, "a = b = 2\nc = 0.5", {"likes": [["a = b", "c"]], "likes_weights": [[2.0, 0.5]]}),
        (VECTOR, "0.5 -2", {"face": [[0.5, -2.0]]}),
        (VECTOR, "", {"face": [[np.nan, np.nan]]}),
    ],
)
def test_text_and_back(feature, text, raw):
    read = from_text(feature, text)
    assert set(read) == set(raw)
    for name, column in raw.items():
        np.testing.assert_array_equal(read[name], np.array(column, read[name].dtype))
    assert to_text(feature, read, 0) == text


def test_forms_that_people_write():
    assert from_text(NUMBER, " 1e3 ")["age"] == 1000
    assert from_text(VECTOR, "1, 2")["face"].tolist() == [[1, 2]]
    assert from_text(WEIGHTED, "\n a \n\n b = 3\n")["likes_weights"].tolist() == [[1, 3]]
    assert from_text(LIST, "a\r\n b\r\n")["seen"].tolist() == [["a", " b"]]
    # Empty slots in the middle are not shown.
    table = {"seen": np.array([["a", "", "b"]], object), "seen_weights": np.array([[1.0, 0.0, 1.0]])}
    assert to_text(LIST, table, 0) == "a\nb"


@pytest.mark.parametrize(
    ("feature", "text", "message"),
    [
        (NUMBER, "old", "age: expected a number. Received: 'old'"),
        (NUMBER, "inf", "age: expected a number. Received: 'inf'"),
        (NUMBER, "1e39", "age: expected a number. Received: '1e39'"),
        (NUMBER, "1\n2", "age: expected one value. Received: 2 lines"),
        (WHOLE, "1.5", "user: expected a whole number. Received: '1.5'"),
        (WHOLE, str(2**63), f"user: expected a whole number. Received: '{2**63}'"),
        (WEIGHTED, "a = b", "likes: expected a weight above 0 after ' = '. Received: 'b'"),
        (WEIGHTED, "a = 0", "likes: expected a weight above 0 after ' = '. Received: '0'"),
        (VECTOR, "1", "face: expected 2 numbers. Received: 1"),
        (VECTOR, "1 x", "face: expected a number. Received: 'x'"),
    ],
)
def test_what_is_no_value(feature, text, message):
    with pytest.raises(DataError, match=re.escape(message)):
        from_text(feature, text)


def test_hints():
    assert hint(WHOLE) == "a whole number; empty: unknown"
    assert hint(WEIGHTED) == "value = weight per line, the heaviest 3 count; empty: none"
    assert hint(LIST) == "one value per line, the last 3 count; empty: none"
    hour = EncodedFeature("hour", "user", "integer", "integer", bins=24, context=True)
    assert hint(hour) == "at the moment of a request; a whole number; empty: unknown"
    assert hint(VECTOR) == "2 numbers with spaces between; empty: unknown"
