"""What is taken by default of a table: every row on each backend in turn, or one in some of its cases."""

from types import SimpleNamespace

import pytest
import tables

ROWS, COLUMNS = ["a", "b", "c", "d"], ["x", "y", "z"]


class _Item:
    """One test of two tables and a backend."""

    nodeid = "test_something[...]"

    def __init__(self, *marks: pytest.MarkDecorator, **params: str) -> None:
        self.callspec = SimpleNamespace(params=params)
        self._marks = [mark.mark for mark in marks]
        self._marks += [pytest.mark.parametrize(name, []).mark for name in params if name != "backend"]

    def iter_markers(self, name):
        return (mark for mark in self._marks if mark.name == name)

    def get_closest_marker(self, name):
        return next(self.iter_markers(name), None)

    def add_marker(self, mark):
        self._marks.append(mark.mark)


def _items(backends: list[str], *marks: pytest.MarkDecorator) -> list[_Item]:
    return [_Item(*marks, row=r, column=c, backend=b) for r in ROWS for c in COLUMNS for b in backends]


def _params(items) -> set[tuple[str, ...]]:
    return {tuple(item.callspec.params.values()) for item in items}


def _not_slow(items) -> set[tuple[str, ...]]:
    return _params(item for item in items if not item.get_closest_marker("slow"))


def _default(first: int, backends: list[str]) -> set[tuple[str, ...]]:
    items = _items(backends, pytest.mark.in_turn(first))
    tables.take_turns(items)
    return _not_slow(items)


def test_each_row_has_its_turn():
    found = _default(0, ["xla", "cpu"])
    assert sorted((r, c) for r, c, _ in found) == [(r, c) for r in ROWS for c in COLUMNS]
    for value in (*ROWS, *COLUMNS):  # of every table, on every backend
        assert {backend for *row, backend in found if value in row} == {"xla", "cpu"}
    assert found.isdisjoint(_default(1, ["xla", "cpu"]))
    assert len(_default(1, ["xla"])) == len(ROWS) * len(COLUMNS)


@pytest.mark.parametrize("backends", [["xla"], ["xla", "cpu"]])
def test_one_in_some_cases_runs(backends):
    n = len(ROWS) * len(COLUMNS) * len(backends)
    for every in (2, 3, 4):
        items = _items(backends, pytest.mark.one_in(every))
        tables.leave_slow(items)
        found = _not_slow(items)
        assert n // every <= len(found) <= n // every + 1
        assert {backend for *_, backend in found} == set(backends)
        assert len({tuple(row) for *row, _ in found}) == len(found)  # another case on each backend
        kept, left_out = tables.one_in(every, _items(backends))  # what the option of that name does
        assert _params(kept) == found and len(kept) + len(left_out) == n


def test_one_in_some_cases_of_those_whose_turn_it_is():
    items = _items(["xla", "cpu"], pytest.mark.in_turn(), pytest.mark.one_in(2))
    tables.take_turns(items)
    tables.leave_slow(items)
    found = _not_slow(items)
    assert len(found) == len(ROWS) * len(COLUMNS) // 2
    assert {backend for *_, backend in found} == {"xla", "cpu"}


def test_some_pairs_have_every_row_and_column():
    for every in (2, 3):
        taken = [pair.values for pair in tables.some_pairs(ROWS, COLUMNS, every) if not pair.marks]
        assert {a for a, _ in taken} == set(ROWS) and {b for _, b in taken} == set(COLUMNS)


def test_rows_by_default_must_be_there():
    assert [getattr(row, "marks", "default") for row in tables.mostly_slow(["b"], of="ab")][1] == "default"
    with pytest.raises(AssertionError):
        tables.mostly_slow(["c"], of="ab")
