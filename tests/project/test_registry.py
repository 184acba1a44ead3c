"""The registry of named objects that all public `register_...` functions use."""

import pytest

from tensornet.errors import TopologyError
from tensornet.registry import Registry


@pytest.fixture
def numbers() -> Registry[str]:
    registry: Registry[str] = Registry("number", error=TopologyError, hint="Count first.")
    registry.add("one", "1")
    registry.add("two", "2")
    return registry


def test_objects_are_found_by_name_in_the_order_of_registration(numbers: Registry[str]) -> None:
    numbers.add("one", numbers["one"])  # the same object again
    assert (numbers["two"], numbers.get("two"), numbers.get("three"), numbers.get(["two"])) == (
        "2",
        "2",
        None,
        None,
    )
    assert (list(numbers), numbers.values()) == (["one", "two"], ("1", "2"))


def test_another_object_of_a_taken_name_is_refused(numbers: Registry[str]) -> None:
    with pytest.raises(TopologyError, match="already registered"):
        numbers.add("one", "I")
    assert numbers["one"] == "1"
    numbers.remove("one")
    numbers.add("one", "I")
    assert numbers["one"] == "I"


@pytest.mark.parametrize(
    ("name", "part"),
    [("onne", "mean 'one'"), ("seven", "one, two"), (["one"], "mean"), (3, "one, two")],
)
def test_an_unknown_name_lists_the_others(numbers: Registry[str], name: object, part: str) -> None:
    with pytest.raises(TopologyError, match=part):
        numbers[name]


def test_a_copy_does_not_change_the_original(numbers: Registry[str]) -> None:
    copy = numbers.copy()
    copy.add("three", "3")
    assert numbers.get("three") is None
