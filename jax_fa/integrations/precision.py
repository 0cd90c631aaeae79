"""The `precision` that layers pass to the products of attention: accepted where the kernels have it anyway."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa import compat
from jax_fa.explanation import here


def check_precision(precision, dtype) -> None:
    """Raises NotImplementedError for a precision that the products of this dtype do not have on JAX's default platform.

    On CPU every backend computes float32 products and sums for float32, as it does float64 for float64; products of
    16-bit values and their sums are float32 everywhere.
    """
    asked = precision if isinstance(precision, tuple) else (precision,)
    try:
        levels = [_level(p) for p in asked]
    except ValueError:
        raise NotImplementedError(
            f"precision must be None, a jax.lax.Precision or its name, or an algorithm of jax.lax.dot; got {precision!r}."
        ) from None
    if dtype == jnp.float64:
        return
    if _FLOAT64 in levels:
        raise NotImplementedError(
            f"precision={precision!r} asks for float64; {dtype} is computed with float32 products and sums. Pass float64 "
            "arrays (dtype=jnp.float64, with jax_enable_x64)."
        )
    if dtype != jnp.float32 or here() == "cpu":
        return
    default = compat.matmul_precision()
    if max(levels) > _level(default):
        raise NotImplementedError(
            f"precision={precision!r} is more than the kernels may use on {here()}: they take the precision of float32 "
            f"products from jax.config.jax_default_matmul_precision, which is {default!r}. Set that, by "
            '`jax.config.update("jax_default_matmul_precision", "highest")`, or leave precision=None.'
        )


_DEFAULT, _HIGH, _HIGHEST, _FLOAT64 = range(4)
_LEVELS = {
    "F64_F64_F64": _FLOAT64,
    "F32_F32_F32": _HIGHEST,
    "BF16_BF16_F32_X9": _HIGHEST,
    "BF16_BF16_F32_X6": _HIGHEST,
    "BF16_BF16_F32_X3": _HIGH,
    "TF32_TF32_F32_X3": _HIGH,
}


def _level(precision) -> int:
    """How much a precision asks of float32 products; ValueError for what JAX does not take as one."""
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    jax.eval_shape(lambda x: jax.lax.dot(x, x, precision=precision), one)
    if isinstance(precision, jax.lax.DotAlgorithm):
        return _FLOAT64 if precision.accumulation_type == np.float64 else _HIGHEST
    name = precision.name if isinstance(precision, jax.lax.DotAlgorithmPreset) else str(precision).upper()
    if precision is None or name in jax.lax.DotAlgorithmPreset.__members__:
        return _LEVELS.get(name, _DEFAULT)
    return jax.lax.Precision(precision).value
