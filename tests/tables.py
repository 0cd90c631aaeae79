"""Which rows of a table, and which of its backends, are tested by default. The others are slow tests."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest


def mostly_slow(default: Collection, of: Iterable, name: Callable[[Any], Any] = lambda row: row) -> list:
    """All rows, of which those whose name is not among `default` are slow: each compiles for a while."""
    rows = list(of)
    assert set(default) <= {name(row) for row in rows}
    return [row if name(row) in default else pytest.param(row, marks=pytest.mark.slow) for row in rows]


def some_pairs(rows: Iterable, columns: Iterable, every: int) -> list:
    """All pairs, of which a part is taken by default, such that each row and each column is among it."""
    return [
        pytest.param(a, b, marks=() if (i + j) % every == 0 else pytest.mark.slow)
        for i, a in enumerate(rows)
        for j, b in enumerate(columns)
    ]


def _places(item: pytest.Item) -> tuple:
    """The row of each of a test's tables, backends left out."""
    found = []
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        found.append(tuple(id(item.callspec.params[name.strip()]) for name in names))
    return tuple(found)


class Sample:
    """Of each test the first case, and one in some number of those after it. Backends take different cases."""

    def __init__(self) -> None:
        self._seen: dict[tuple, int] = {}
        self._backends: dict[str, int] = defaultdict(int)

    def takes(self, item: pytest.Item, every: int) -> bool:
        test = item.nodeid.split("[")[0]
        params = item.callspec.params if hasattr(item, "callspec") else {}
        key = test, params.get("backend")
        if key not in self._seen:
            self._seen[key] = self._backends[test]
            self._backends[test] += 1
        self._seen[key] += 1
        return (self._seen[key] - 1) % every == 0


def one_in(every: int, items: list[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """(kept, left out) of what --one-in asks for."""
    sample = Sample()
    kept, left_out = [], []
    for item in items:
        (kept if sample.takes(item, every) else left_out).append(item)
    return kept, left_out


def leave_slow(items: list[pytest.Item]) -> None:
    """Of a test marked `one_in(N)`, one in N of its cases runs by default; the others are slow tests."""
    sample = Sample()
    for item in items:
        mark = item.get_closest_marker("one_in")
        if mark and not item.get_closest_marker("slow") and not sample.takes(item, *mark.args):
            item.add_marker(pytest.mark.slow)


def take_turns(items: list[pytest.Item]) -> None:
    """Of a test marked `in_turn`, each row runs on one backend by default, the next row on the next one.

    Where a test has several tables, each row of every table meets every backend. `in_turn(1)` begins with another
    backend: two tests of one table, so marked, run each of its rows on two.
    """
    tests = defaultdict(list)
    for item in items:
        if item.get_closest_marker("in_turn") and not item.get_closest_marker("slow"):
            tests[item.nodeid.split("[")[0]].append(item)
    for marked in tests.values():
        (first,) = marked[0].get_closest_marker("in_turn").args or (0,)
        ranks: dict[int, dict[tuple, int]] = defaultdict(dict)  # by table and row
        backends = defaultdict(list)
        for item in marked:
            backends[_places(item)].append(item.callspec.params["backend"])
        for item in marked:
            places = _places(item)
            rank = sum(ranks[i].setdefault(row, len(ranks[i])) for i, row in enumerate(places))
            serving = backends[places]
            if item.callspec.params["backend"] != serving[(first + rank) % len(serving)]:
                item.add_marker(pytest.mark.slow)
