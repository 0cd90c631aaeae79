"""The steps of a ring: which shards go where."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Schedule:
    """The steps of a ring: at which distances shards of keys are computed with, and how far each one goes.

    At distance d, device j + d has the shard of device j. Shards go forward from distance 1 on, and backward from -1 on.
    """

    visited: tuple[int, ...]
    reach: tuple[
        tuple[int, int], ...
    ]  # of each shard: the last distance forward, and backward (both positive)

    @classmethod
    def of(cls, seen: np.ndarray) -> "Schedule":
        """From which shards of keys each device needs, `[device, shard]`."""
        n = len(seen)
        needed = [{(i - j) % n for i in range(n) if seen[i, j]} for j in range(n)]
        every = sorted({0}.union(*needed))
        # The fewest steps leave out the widest gap on the circle of distances.
        gaps = [b - a for a, b in zip(every, [*every[1:], n], strict=True)]
        last = every[int(np.argmax(gaps[::-1])) * -1 - 1]  # of equal ones the last: rather forward
        visited = {d if d <= last else d - n for ds in needed for d in ds}
        reach = tuple(
            (max((d for d in ds if d <= last), default=0), max((n - d for d in ds if d > last), default=0))
            for ds in needed
        )
        return cls(tuple(sorted(visited)), reach)

    def far(self, sign: int) -> int:
        """The last distance of any shard."""
        return max(reach[sign < 0] for reach in self.reach)

    @property
    def distances(self) -> list[int]:
        return [*range(self.far(1) + 1), *(-d for d in range(1, self.far(-1) + 1))]

    def on(self, distance: int) -> list[tuple[int, int]]:
        """(source, target) of shards that go on to this distance."""
        sign = 1 if distance > 0 else -1
        n, before = len(self.reach), distance - sign
        going = [j for j, reach in enumerate(self.reach) if reach[sign < 0] >= abs(distance)]
        return [((j + before) % n, (j + distance) % n) for j in going]

    def home(self, distance: int) -> list[tuple[int, int]]:
        """(source, target) of gradients of the shards that have come to their last distance."""
        n, sign = len(self.reach), distance < 0
        return [((j + distance) % n, j) for j, reach in enumerate(self.reach) if reach[sign] == abs(distance)]
