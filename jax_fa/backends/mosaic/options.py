"""What a caller can choose of this backend."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, get_args

from jax_fa.arguments import shown
from jax_fa.backends.mosaic.tuning import Tiles, Which


@dataclass(frozen=True)
class Options:
    """`implementation=jax_fa.mosaic.Options(...)`: the backend by name, and the tiles of its kernels.

    A call for which these tiles are too large (for shared memory, or at its head_dim for the registers) is refused as
    any that the backend cannot serve: `explain` says why.

    Args:
      tiles: for some of the kernels ("forward", "dq", "dkv", "dbias") the tiles to take in place of the table's.

    Raises:
      ValueError: a name that is no kernel's.
      TypeError: a value that is no `Tiles`, tiles that are no dict.
    """

    backend: ClassVar[str] = "mosaic"
    tiles: Mapping[Which, Tiles] | tuple[tuple[Which, Tiles], ...] = ()

    def __post_init__(self) -> None:
        pairs = isinstance(self.tiles, tuple) and all(
            isinstance(x, tuple) and len(x) == 2 for x in self.tiles
        )
        if not isinstance(self.tiles, Mapping) and not pairs:
            raise TypeError(
                f"tiles must be a dict from names of kernels to jax_fa.mosaic.Tiles; got {shown(self.tiles)}."
            )
        given = dict(self.tiles)
        for name, tiles in given.items():
            if name not in get_args(Which):
                raise ValueError(
                    f"tiles must name kernels among {', '.join(get_args(Which))}; got {shown(name)}."
                )
            if not isinstance(tiles, Tiles):
                raise TypeError(f"tiles must hold jax_fa.mosaic.Tiles; got {shown(tiles)} for {name!r}.")
        object.__setattr__(self, "tiles", tuple(sorted(given.items())))  # hashable

    def of(self, which: Which) -> Tiles | None:
        return dict(self.tiles).get(which)
