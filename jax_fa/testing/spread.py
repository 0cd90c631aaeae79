"""Few rows of a large product of options in which every two values of two options still meet."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np


def pairwise(options: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows, one value of each option, in which every two values of two options meet; the same at every call.

    Greedy: a row starts with a pair that is missing yet and goes on with what adds most new pairs, so that the first
    rows have the most of them (`spanning` counts those that hold every value).
    """
    random = np.random.default_rng(0)
    names = list(options)
    missing: dict[tuple[tuple[str, int], tuple[str, int]], None] = {
        ((a, i), (b, j)): None
        for a, b in itertools.combinations(names, 2)
        for i in range(len(options[a]))
        for j in range(len(options[b]))
    }
    uses = {(name, i): 0 for name in names for i in range(len(options[name]))}
    rows = []

    def pair(one, other):
        return (one, other) if names.index(one[0]) < names.index(other[0]) else (other, one)

    while missing:
        first, second = min(missing, key=lambda p: uses[p[0]] + uses[p[1]])
        row = dict([first, second])
        for name in random.permutation([name for name in names if name not in row]):
            name = str(name)

            def worth(i, name=name, row=row):
                new = sum(pair((name, i), other) in missing for other in row.items())
                return (new, -uses[name, i])

            row[name] = max(random.permutation(len(options[name])).tolist(), key=worth)
        for one, other in itertools.combinations(row.items(), 2):
            missing.pop(pair(one, other), None)
        for item in row.items():
            uses[item] += 1
        rows.append({name: options[name][row[name]] for name in names})
    return rows


def spanning(rows: list[dict[str, Any]]) -> int:
    """How many of the first rows hold every value that any row has."""
    last: dict[tuple[str, str], int] = {}
    for n, row in enumerate(rows, 1):
        for item in ((name, repr(value)) for name, value in row.items()):
            last.setdefault(item, n)
    return max(last.values())


def covering(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the rows in which every two values of two options meet that meet in any row; the same at every call.

    For products of which some rows make no sense. Greedy: next comes the row that adds most new pairs.
    """
    pairs = [
        set(itertools.combinations([(name, repr(value)) for name, value in row.items()], 2)) for row in rows
    ]
    missing = set().union(*pairs)
    chosen = set()
    while missing:
        best = max(range(len(rows)), key=lambda i: len(pairs[i] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return [row for i, row in enumerate(rows) if i in chosen]
