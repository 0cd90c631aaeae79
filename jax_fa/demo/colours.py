"""One colour per implementation, for every plot of the self-test, the benchmark and the notebooks."""

COLOURS = {
    "jax_fa": "#24608f",
    "cpu": "#24608f",
    "mosaic": "#3f8f5a",
    "ascend": "#7a4fa3",
    "xla": "#d98324",
    "jax.nn": "#555555",
    "jax.nn cudnn": "#9a9a9a",
    "flax": "#555555",  # its attention is jax.nn's
    "tokamax": "#b09a1c",
    "torch": "#a33b3b",
}


def colour(name: str) -> str:
    """The colour of an implementation; black for one that is not in the table."""
    return COLOURS.get(name, "black")
