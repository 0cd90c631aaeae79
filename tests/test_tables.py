"""What is taken by default of a table: every row, on each backend in turn."""

from types import SimpleNamespace

import pytest
import tables

ROWS, COLUMNS = ["a", "b", "c", "d"], ["x", "y", "z"]


class _Item:
    """One test of two tables and a backend."""

    nodeid = "test_something[...]"

    def __init__(self, first: int, **params: str) -> None:
        self.callspec = SimpleNamespace(params=params)
        self._marks = [pytest.mark.in_turn(first).mark]
        self._marks += [pytest.mark.parametrize(name, []).mark for name in params if name != "backend"]

    def iter_markers(self, name):
        return (mark for mark in self._marks if mark.name == name)

    def get_closest_marker(self, name):
        return next(self.iter_markers(name), None)

    def add_marker(self, mark):
        self._marks.append(mark.mark)


def _default(first: int, backends: list[str]) -> set[tuple[str, ...]]:
    items = [_Item(first, row=r, column=c, backend=b) for r in ROWS for c in COLUMNS for b in backends]
    tables.take_turns(items)
    return {tuple(item.callspec.params.values()) for item in items if not item.get_closest_marker("slow")}


def test_each_row_has_its_turn():
    found = _default(0, ["xla", "cpu"])
    assert sorted((r, c) for r, c, _ in found) == [(r, c) for r in ROWS for c in COLUMNS]
    for value in (*ROWS, *COLUMNS):  # of every table, on every backend
        assert {backend for *row, backend in found if value in row} == {"xla", "cpu"}
    assert found.isdisjoint(_default(1, ["xla", "cpu"]))
    assert len(_default(1, ["xla"])) == len(ROWS) * len(COLUMNS)


def test_some_pairs_have_every_row_and_column():
    for every in (2, 3):
        taken = [pair.values for pair in tables.some_pairs(ROWS, COLUMNS, every) if not pair.marks]
        assert {a for a, _ in taken} == set(ROWS) and {b for _, b in taken} == set(COLUMNS)


def test_rows_by_default_must_be_there():
    assert [getattr(row, "marks", "default") for row in tables.mostly_slow(["b"], of="ab")][1] == "default"
    with pytest.raises(AssertionError):
        tables.mostly_slow(["c"], of="ab")
