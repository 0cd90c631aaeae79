"""The arrays of one call: as the library takes them, and in the canonical form of the reference."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa.testing import oracle
from jax_fa.testing.fuzz import garbage, kinds, paged, score, ways
from jax_fa.testing.fuzz.kinds import Random, Sizes
from jax_fa.testing.fuzz.program import Data, Program
from jax_fa.testing.fuzz.reference import Attention

STORED = ("query", "key", "value", "out")
_UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
_SMALLEST = {"float64": 1e-300, "float32": 1e-34, "bfloat16": 1e-34, "float16": 2.0**-25}


def accumulator(program: Program) -> str:
    return "float64" if program.dtype == "float64" else "float32"


def unit_of(dtype: Any) -> float:
    return _UNIT[jnp.dtype(dtype).name]


def smallest_of(dtype: Any) -> float:
    return _SMALLEST[jnp.dtype(dtype).name]


# --- shapes and layouts


def shape_of(program: Program, name: str) -> tuple[int, ...]:
    """Canonical, without the dim that vmap adds."""
    p = program
    heads = (*p.B, p.N)
    sizes = Sizes(p.B, p.N, p.Sq, p.Skv, p.Sq, p.Skv)
    return {
        "query": (*p.B, p.Sq, p.N, p.D),
        "key": (*p.B, p.Skv, p.K, p.D),
        "value": (*p.B, p.Skv, p.K, p.Dv),
        "out": (*p.B, p.Sq, p.N, p.Dv),
        "lse": (*heads, p.Sq),
        "bias": kinds.dense_shape(p.bias or "", sizes),
        "alibi_slopes": heads if p.slopes == "BN" else (p.N,),
        "sinks": heads if p.sinks == "BN" else (p.N,),
    }.get(name, ())


def dtype_of(program: Program, name: str) -> Any:
    if name in STORED:
        return jnp.dtype(program.pages if program.pages and name in paged.STORED else program.dtype)
    return jnp.dtype(program.bias_dtype if name == "bias" else accumulator(program))


def to_stored(program: Program, name: str, x: np.ndarray, lead: int) -> np.ndarray:
    """`lead`: how many dims precede those of the layout."""
    layout = program.layout
    if name not in STORED or layout in ("BSND", "SND", "TND"):
        return x
    if layout in ("BNSD", "NSD"):
        return x.swapaxes(-2, -3)
    x = np.moveaxis(x, -3, lead) if layout.startswith("SB") else x
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1]) if layout.endswith("H") else x


def from_stored(program: Program, name: str, x: np.ndarray, lead: int) -> np.ndarray:
    layout = program.layout
    if name not in STORED or layout in ("BSND", "SND", "TND"):
        return x
    if layout in ("BNSD", "NSD"):
        return x.swapaxes(-2, -3)
    if layout.endswith("H"):
        heads = program.N if name in ("query", "out") else program.K
        x = x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)
    return np.moveaxis(x, lead, -3) if layout.startswith("SB") else x


# --- drawing


@dataclass
class Inputs:
    """By name; arrays that vmap maps have a leading dim more, in the form of the library wherever that is mapped."""

    program: Program
    data: Data
    operands: dict[str, np.ndarray]
    tangents: dict[str, np.ndarray]
    cotangents: dict[str, np.ndarray]
    cotangent_tangents: dict[str, np.ndarray]
    masks: dict[str, dict[str, np.ndarray]]
    dropout: dict[str, Any]
    scale: float
    cap: float | None
    rate: float
    visible: Any = True
    position: Any = None
    stored: dict[str, np.ndarray] = field(default_factory=dict)  # operands that the library takes otherwise
    _cache: dict[str, Any] = field(default_factory=dict)

    # --- as the library takes them

    def arguments(self) -> dict[str, Any]:
        p = self.program
        lead = int(bool(p.mapped))
        result: dict[str, Any] = {
            "operands": {
                n: self._mapped(n, self._laid(n, x)) for n, x in (self.operands | self.stored).items()
            },
            "masks": {} if p.known_mask else self._mapped_masks(),
            "dropout": {n: self._mapped(n, x) for n, x in self.dropout.items()},
        }
        if p.derivative in ("reverse", "second"):
            result["cotangents"] = {n: to_stored(p, n, x, lead) for n, x in self.cotangents.items()}
        if p.derivative in ("forward", "second"):
            result["tangents"] = {n: self._mapped(n, self._laid(n, x)) for n, x in self.tangents.items()}
        if p.derivative == "second":
            moved = self.cotangent_tangents
            result["cotangent_tangents"] = {n: to_stored(p, n, x, lead) for n, x in moved.items()}
        return result

    def _laid(self, name: str, x: np.ndarray) -> np.ndarray:
        return to_stored(self.program, name, x, int(name in self.program.mapped))

    def _mapped(self, name: str, x: Any) -> Any:
        p = self.program
        return np.moveaxis(x, 0, -1) if p.mapped_last and name in p.mapped else x

    def _mapped_masks(self) -> Any:
        return {
            kind: {name: self._mapped("mask", x) for name, x in values.items()}
            for kind, values in self.masks.items()
        }

    # --- in canonical form

    def _lead(self, name: str, x: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """With the dim that vmap adds at the front: in full where the gradient has it."""
        p, x = self.program, np.asarray(x)
        if not p.mapped:
            return x
        mapped = name in p.mapped
        rank = {"query": 3, "key": 3, "value": 3, "bias": 3}.get(name, 1) + len(p.B)
        inner = x.shape[1:] if mapped else x.shape
        inner = (1,) * (rank - len(inner)) + inner
        x = x.reshape((x.shape[0] if mapped else 1, *inner))
        return np.broadcast_to(x, (2, *inner)) if p.vmap_outside else x

    def reference(self, seed_words: Any) -> Attention:
        """Computed; `seed_words`: what JAX makes of the key of dropout."""
        p = self.program
        half = p.dtype in ("bfloat16", "float16")
        eps = 2.0**-51 if p.dtype == "float64" else 2.0**-24
        wanted = p.derivative in ("reverse", "second")
        moved = self.cotangent_tangents if p.derivative == "second" else {}
        call = Attention(
            batch=p.batch,
            given={n: self._lead(n, x) for n, x in self.operands.items()},
            scale=self.scale,
            cap=self.cap,
            visible=self.visible,
            distance=self.distance(),
            keep=self._keep(seed_words),
            unit=_UNIT[p.dtype],
            smallest=_SMALLEST[p.dtype],
            least_value=paged.least_value(p),
            eps=eps,
            narrow=_UNIT[p.dtype] if half else 0.0,
            loose_delta=half and (p.backend == "ascend" or p.how == "npu_grad"),
            scales_out=half and p.backend == "ascend" and p.dropout == "traced",
            cap_off=2.0**-22 if p.backend == "mosaic" else 0.0,
            scales_ds=p.backend == "mosaic" and p.scale == "traced",
            merged=ways.merges(p),
            composed=bool(p.sinks and (p.max_logits or p.how == "sharded" or p.derivative == "second")),
            added=ways.merges(p) or p.how == "sharded",
            tangents={n: self._lead(n, x) for n, x in self.tangents.items()}
            if p.derivative in ("forward", "second")
            else {},
            cotangents=(self.cotangents["out"], self.cotangents.get("lse")) if wanted else None,
            cotangent_tangents=(moved.get("out"), moved.get("lse")),
        )
        call.compute()
        return call

    def distance(self) -> Any:
        if self.program.slopes is None:
            return None
        j = np.arange(self.program.Skv)
        away = np.abs(j - np.asarray(self.position, np.int64)[..., None])
        return away ** score.distance_power(self.program)

    def _keep(self, seed_words: Any) -> Any:
        p = self.program
        if p.dropout is None:
            return None
        if p.dropout == "bits":
            return score.keep_bits(p, self.dropout["drop_mask"], self.masks) / score.KEEP_PROB
        limit = max(1, 65536 - int(np.rint(np.float32(self.rate) * np.float32(65536))))
        shape, words = (*p.B, p.N, p.Sq, p.Skv), np.asarray(seed_words)
        if words.ndim == 1:
            bits = oracle.keep_bits(words, shape, limit / 65536)
        else:
            bits = np.stack([oracle.keep_bits(w, shape, limit / 65536) for w in words])
        return bits * (65536 / limit)

    def gradient(self, name: str, x: Any) -> np.ndarray:
        """A gradient of the library, in canonical form."""
        p, x = self.program, np.asarray(x)
        if not p.mapped:
            return from_stored(p, name, x, 0)
        if p.vmap_outside:
            return self._lead_like(name, from_stored(p, name, x, 1))
        if name in p.mapped:
            x = np.moveaxis(x, -1, 0) if p.mapped_last else x
            return self._lead_like(name, from_stored(p, name, x, 1))
        return self._lead_like(name, from_stored(p, name, x, 0)[None])

    def _lead_like(self, name: str, x: np.ndarray) -> np.ndarray:
        return x.reshape(self._lead(name, self.operands[name]).shape)


def _known(program: Program) -> dict[str, Any]:
    """Numbers that are part of the program."""
    random = np.random.default_rng((program.seed, 2))
    if program.entry == score.ENTRY:
        return {"scale": score.known_scale(program), "cap": None, "rate": 0.0}
    factor = float(random.choice([0.0, -0.5, 0.2, 1.0, 1.7]))
    return {
        "scale": program.D**-0.5 * (factor if program.scale == "known" else 1.0),
        "cap": float(random.choice([0.7, 3.0, 50.0])) if program.cap == "known" else None,
        "rate": float(random.choice([0.1, 0.3, 0.5, 0.9])) if program.dropout else 0.0,
    }


def kind_of(name: str) -> kinds.Kind:
    return next(table[name] for table in (kinds.KINDS, score.SCORE_KINDS, paged.KINDS) if name in table)


def maps_an_array(program: Program) -> bool:
    """Whether vmap has something to map: masks may be without arrays."""
    p = program
    if not p.mapped or set(p.mapped) != {"mask"}:
        return True
    still = np.random.default_rng(0)
    sizes = Sizes((), 1, 1, 1, 1, 1, 1)
    return any(kind_of(name).draw(Random(still, still), sizes) for name in p.mask)


def draw_masks(program: Program, seed: int) -> dict[str, dict[str, np.ndarray]]:
    p = program
    sizes = Sizes(p.B, p.N, p.Sq, p.Skv, p.Sq, p.Skv, p.K)
    drawn = []
    for copy in range(2 if "mask" in p.mapped else 1):
        values = {}
        for at, name in enumerate(p.mask):
            random = Random(
                np.random.default_rng((p.seed, 3, at)), np.random.default_rng((seed, 4, at, copy))
            )
            values[name] = kind_of(name).draw(random, sizes)
        drawn.append(values)
    if "mask" not in p.mapped:
        return drawn[0]
    return {
        name: {key: np.stack([values[name][key] for values in drawn]) for key in drawn[0][name]}
        for name in p.mask
    }


def _visible(program: Program, values: dict[str, dict[str, np.ndarray]]) -> tuple[Any, Any]:
    """What is visible, and at which key position each row stands."""
    p = program
    aligned = kinds.COMBINATIONS[p.joined].aligned
    counted = tuple(name for i, name in enumerate(p.mask) if aligned(i))
    sizes = Sizes(p.B, p.N, p.Sq, p.Skv, *kinds.lengths_of(counted, values, p.Sq, p.Skv))
    plain = np.ones((1,) * (len(p.B) + 3), bool)
    position: Any = np.arange(p.Sq)
    each = []
    for name in p.mask:
        each.append(plain & kind_of(name).visible(sizes, values[name]))
        place = kind_of(name).position
        if place is not None:
            position = place(sizes, values[name])
    position = np.broadcast_to(position, (*p.B, p.N, p.Sq))
    return kinds.joined(p.joined, each) if each else plain, position


def draw(program: Program, data: Data) -> Inputs:
    p = program
    random = np.random.default_rng((p.seed, data.seed, 5))
    known = _known(p)
    mask_seed = p.seed if p.known_mask else data.seed + 1
    values = draw_masks(p, mask_seed)
    if "mask" in p.mapped:
        parts = [
            _visible(p, {n: {k: np.asarray(x[v]) for k, x in vs.items()} for n, vs in values.items()})
            for v in range(2)
        ]
        shape = np.broadcast_shapes(*(part[0].shape for part in parts))
        visible = np.stack([np.broadcast_to(part[0], shape) for part in parts])
        position = np.stack([part[1] for part in parts])
    else:
        visible, position = _visible(p, values)
    values_of = _Values(p, data, random)
    operands = {name: values_of.operand(name) for name in p.operands}
    stored = {}
    if paged.are_data(p):
        stored = {name: paged.as_stored(p, name, operands[name]) for name in paged.STORED}
        operands |= {name: paged.meaning(p, name, x, values) for name, x in stored.items()}
    dropout: dict[str, Any] = {}
    rate = known["rate"]
    if p.dropout == "bits":
        dropout = score.draw_bits(p, random)
    elif p.dropout:
        shape = (2, 2) if "dropout_key" in p.mapped else (2,)
        dropout["dropout_key"] = random.integers(0, 2**32, shape, dtype=np.uint32)
    if p.dropout == "traced":
        rate = float(np.float32(random.choice([0.0, 0.05, 0.3, 0.5, 0.99])))
        dropout["rate"] = np.float32(rate)
    inputs = Inputs(
        program=p,
        data=data,
        operands=operands,
        tangents={n: values_of.tangent(n, x) for n, x in operands.items()},
        cotangents={n: values_of.result(n) for n in p.results()},
        cotangent_tangents={n: values_of.result(n) for n in p.results()},
        masks=values,
        dropout=dropout,
        scale=known["scale"],
        cap=known["cap"],
        rate=rate,
        visible=visible,
        position=position,
        stored=stored,
    )
    if data.garbage:
        groups = [
            (inputs.operands, False),
            (inputs.tangents, False),
            (inputs.cotangents, True),
            (inputs.cotangent_tangents, True),
        ]
        garbage.spoil(p, data, visible, groups, random)
    return inputs


class _Values:
    def __init__(self, program: Program, data: Data, random: np.random.Generator) -> None:
        self.program, self.data, self.random = program, data, random
        # What float16 holds, with all products.
        self.size = min(max(data.size, 1e-2), 16.0) if program.dtype == "float16" else data.size

    def _shape(self, name: str) -> tuple[int, ...]:
        lead = (2,) if name in self.program.mapped else ()
        return (*lead, *shape_of(self.program, name))

    def _normal(self, name: str, factor: float = 1.0) -> np.ndarray:
        x = self.random.standard_normal(self._shape(name), np.float32) * np.float32(factor)
        return x.astype(dtype_of(self.program, name))

    def operand(self, name: str) -> np.ndarray:
        random, shape = self.random, self._shape(name)
        acc = accumulator(self.program)
        if name == "scale":
            factor = random.choice([0.0, -0.7, 0.3, 1.0, 1.0, 2.0], shape)
            return np.asarray(factor * self.program.D**-0.5, acc)
        if name == "logits_soft_cap":
            return np.asarray(random.choice([0.6, 2.5, 20.0], shape) * (1 + random.random(shape)), acc)
        if name == "alibi_slopes":
            return np.asarray(random.standard_normal(shape) / 8, acc)
        if name == "sinks":
            x = random.standard_normal(shape) * 2
            return np.asarray(np.where(random.random(shape) < 0.1, -np.inf, x), acc)
        x = self._normal(name, {"query": self.data.spread, "value": self.size}.get(name, 1.0))
        if name == "bias" and self.data.infinite_bias:
            x = np.where(random.random(x.shape) < 0.2, np.array(-np.inf, x.dtype), x)
        return x

    def tangent(self, name: str, x: np.ndarray) -> np.ndarray:
        factor = {"query": self.data.spread, "value": self.size}.get(name, 1.0)
        if name in ("scale", "alibi_slopes"):
            factor = 0.1
        moved = self.random.standard_normal(x.shape, np.float32) * np.float32(factor)
        return np.asarray(moved).astype(x.dtype)

    def result(self, name: str) -> np.ndarray:
        """A cotangent, or the tangent of one."""
        lead = (2,) if self.program.mapped else ()
        x = self.random.standard_normal((*lead, *shape_of(self.program, name)), np.float32)
        if name == "out":
            return (x * np.float32(min(self.size, 100.0))).astype(jnp.dtype(self.program.dtype))
        return x.astype(accumulator(self.program))


def seed_words(key: Any) -> Any:
    """The Philox key that a JAX key stands for."""
    return jax.random.bits(jax.random.wrap_key_data(key, impl="threefry2x32"), (2,), jnp.uint32)
