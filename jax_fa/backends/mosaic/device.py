"""Which NVIDIA GPU a program is lowered for."""

import jax

# An abstract device has a name only.
_CAPABILITIES = {"H100": "9.0", "H200": "9.0", "H800": "9.0", "H20": "9.0", "A100": "8.0", "B200": "10.0"}


def compute_capability() -> str | None:
    """That of the GPU which programs are lowered for, as "9.0"; None where no GPU is known.

    An abstract device counts before those that are there: `use_abstract_mesh` with one lowers for a chip elsewhere.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None and abstract.platform == "cuda":
        name = abstract.device_kind
        return next((c for kind, c in _CAPABILITIES.items() if kind in name), f"that of {name}")
    try:
        return str(jax.devices("cuda")[0].compute_capability)
    except RuntimeError:  # no such platform here
        return None
