"""How configurations and manifests are read."""

import pytest
import yaml

from kubetune_contract import yaml_text

VALUES = {
    "an exponent without a point is a number": ("1e-4", 1e-4),
    "so is one with a sign": ("+2E3", 2000.0),
    "a point without digits before it": (".5e1", 5.0),
    "a version stays text": ("1.2.3", "1.2.3"),
    "a date stays text": ("2026-01-31", "2026-01-31"),
    "an integer": ("42", 42),
    "a mapping below a mapping": ("{a: {b: [1, x]}}", {"a": {"b": [1, "x"]}}),
    "the same key in two mappings": ("{a: {k: 1}, b: {k: 2}}", {"a": {"k": 1}, "b": {"k": 2}}),
    "nothing": ("", None),
}


@pytest.mark.parametrize("case", VALUES)
def test_values(case):
    text, value = VALUES[case]
    assert yaml_text.parse(text) == value


def test_a_key_that_stands_twice_is_an_error_with_its_line():
    with pytest.raises(yaml.YAMLError, match="the key epochs stands twice in one mapping, the second time in line 3"):
        yaml_text.parse("training:\n  epochs: 1\n  epochs: 2\n")


def test_an_anchor_is_merged_below_keys_of_its_own():
    text = "base: &base {a: 1, b: 2}\nother:\n  <<: *base\n  b: 3\n"
    assert yaml_text.parse(text)["other"] == {"a": 1, "b": 3}


def test_empty_documents_are_left_out():
    assert yaml_text.documents("---\na: 1\n---\n# nothing\n---\nb: 2\n") == [{"a": 1}, {"b": 2}]


def test_python_objects_are_refused():
    with pytest.raises(yaml.YAMLError):
        yaml_text.parse("!!python/object/apply:os.getcwd []")
