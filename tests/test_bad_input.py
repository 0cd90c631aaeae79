"""Every argument of every public function with every kind of thing that it cannot be: one error, which names it, before
anything runs."""

import inspect
import re

import jax
import numpy as np
import pytest

import jax_fa
from jax_fa import masks, sequence_parallel
from jax_fa.integrations import patch_jax_nn

pytestmark = [
    pytest.mark.usefixtures("no_type_checker"),
    pytest.mark.filterwarnings("ignore"),  # what is wrong may be warned of first
]


class Odd:
    def __repr__(self) -> str:
        return "Odd()"


def _zeros(*shape: int, dtype=np.float32):
    return np.zeros(shape, dtype)


KINDS = {
    "text": "sideways",
    "bytes": b"x",
    "object": Odd(),
    "dict": {"a": 1},
    "set": {1, 2},
    "function": len,
    "type": int,
    "negative": -3,
    "nan": float("nan"),
    "infinite": float("inf"),
    "huge": 10**30,
    "complex": 1j,
    "fraction": 2.5,
    "true": True,
    "date": np.datetime64("2020-01-01"),
    "array of text": np.array(["a"]),
    "array of objects": np.array([Odd()], dtype=object),
    "complex array": _zeros(2, 5, 4, 8, dtype=np.complex64),
    "integer array": _zeros(2, 5, 4, 8, dtype=np.int8),
    "boolean array": _zeros(2, 5, 4, 8, dtype=bool),
    "rank 0": _zeros(),
    "rank 1": _zeros(3),
    "rank 6": _zeros(1, 1, 2, 5, 4, 8),
    "other shape": _zeros(3, 11, 5, 13),
    "empty": _zeros(0),
    "ragged": [[1.0], [2.0, 3.0]],
    "list of text": ["a"],
    "tuple": (1, 2, 3, 4, 5),
    "negative list": [-1, -2],
    "random key": jax.random.key(0),
    "integers": np.zeros(3, np.int32),
}
_BSND = {"query": _zeros(2, 5, 4, 8), "key": _zeros(2, 7, 2, 8), "value": _zeros(2, 7, 2, 8)}
_BSH = {"query": _zeros(2, 5, 32), "key": _zeros(2, 7, 16), "value": _zeros(2, 7, 16), "head_num": 4}
ENTRIES = {
    jax_fa.flash_attention: _BSND,
    jax_fa.dot_product_attention: _BSND,
    jax_fa.flash_attention_score: _BSH | {"input_layout": "BSH"},
    jax_fa.npu_fusion_attention: _BSH | {"input_layout": "BSH"},
    jax_fa.paged_attention: {
        "query": _zeros(2, 4, 8),
        "key_pages": _zeros(6, 4, 2, 8),
        "value_pages": _zeros(6, 4, 2, 8),
        "page_table": np.zeros((2, 3), np.int32),
        "lengths": np.array([3, 5]),
    },
    jax_fa.flops: _BSND,
    jax_fa.explain: _BSND,
    jax_fa.dropout_mask: {"dropout_key": jax.random.key(0), "dropout_rate": 0.5, "shape": (2, 4, 5, 7)},
    jax_fa.create_block_mask: {
        "mask_mod": lambda batch, head, row, column: row >= column,
        "batch": None,
        "heads": None,
        "rows": 200,
        "columns": 200,
    },
    sequence_parallel.reorder: {"x": _zeros(2, 16, 2, 4), "devices": 2},
    sequence_parallel.restore: {"x": _zeros(2, 16, 2, 4), "devices": 2},
    sequence_parallel.visited_tiles: {"mask": masks.Causal(), "sq": 1024, "skv": 1024, "devices": 2},
    masks.Causal: {},
    masks.SlidingWindow: {"left": 3},
    masks.Band: {},
    masks.Prefix: {"length": 3},
    masks.Lengths: {"key": 3},
    masks.CumulativeLengths: {"query": (2, 5)},
    masks.SegmentIds: {"query": np.arange(5) // 3, "key": np.arange(7) // 3},
    masks.Dense: {"array": np.ones((5, 7), bool)},
    masks.Intersection: {},
    masks.Union: {},
    masks.Complement: {},
    jax_fa.ascend.Options: {},
    jax_fa.mosaic.Options: {},
    jax_fa.mosaic.Tiles: {"width": 64, "stages": 2, "consumers": 2},
    jax_fa.strict: {},
    patch_jax_nn: {},
}
_NUMBER = {"negative", "huge", "fraction", "rank 0"}
_TOKENS = {"negative", "huge"}
# What each argument may well be.
MEANT = {
    "bias": {"negative", "nan", "infinite", "fraction", "rank 0"},
    "dropout_key": {"random key"},
    "dropout_rate": {"rank 0"},
    "gen_mask_parallel": {"true"},
    "is_causal": {"true"},
    "key_value_seq_lengths": {"negative list"},  # as 0, like jax.nn's
    "local_window_size": {"negative", "huge", "negative list"},
    "logits_soft_cap": {"huge", "fraction"},
    "next_tockens": _TOKENS,
    "next_tokens": _TOKENS,
    "offset": _TOKENS,
    # Of no meaning here, whatever array it is.
    "padding_mask": {*_NUMBER - {"huge"}, "nan", "infinite", "complex", "true", "tuple", "negative list"}
    | {kind for kind, x in KINDS.items() if isinstance(x, np.ndarray) and x.dtype.kind in "fcib"},
    # Without atten_mask CANN ignores it.
    ("npu_fusion_attention", "prefix"): {"negative", "huge", "tuple", "negative list", "integers"},
    "pre_tockens": _TOKENS,
    "pre_tokens": _TOKENS,
    "query_seq_lengths": {"negative list"},
    "return_logsumexp": {"true"},
    "return_max_logits": {"true"},
    "return_residual": {"true"},
    "key_scale": {"nan", "infinite", "fraction", "rank 0"},
    "scale": _NUMBER,
    "value_scale": {"nan", "infinite", "fraction", "rank 0"},
    ("Band", "left"): _TOKENS,
    ("Band", "offset"): _TOKENS,
    ("Band", "right"): _TOKENS,
    ("Causal", "offset"): _TOKENS,
    ("CumulativeLengths", "key"): set(),
    ("CumulativeLengths", "query"): {"tuple", "empty", "integers"},
    ("Dense", "array"): {"true"},
    ("Options", "max_work"): {"huge"},
    ("Tiles", "stages"): {"huge"},
    ("SegmentIds", "padding_id"): _TOKENS,
    ("SegmentIds", "query"): {"tuple"},
    ("SlidingWindow", "left"): {"huge"},
    ("SlidingWindow", "right"): {"huge"},
    ("create_block_mask", "batch"): {"tuple"},
    ("paged_attention", "local_window_size"): {"huge"},
    ("reorder", "axis"): {"negative"},
    ("restore", "axis"): {"negative"},
    ("strict", "enabled"): {"true"},
    ("visited_tiles", "tile"): {"huge"},
    "scale_value": _NUMBER,
    "seed": _TOKENS,
    "sync": {"true"},
}
# What an error calls an argument otherwise.
OTHER_NAMES = {("Dense", "array"): "mask"}
# Names of ours, and what Python and JAX show of their own objects.
INTERNAL = re.compile(
    r"(?<!\w)_[a-z]\w*|jaxpr|[Pp]rimitive|Tracer|Traced<|\bProblem\b|\bOperands\b|jaxtyping|beartype|object at 0x"
    r"|jax_fa\.(call|arguments|entry|rules|compat)\b|jax\._src"
)


def _wrong(entry, name: str, kind: str) -> str | None:
    """What is wrong with the answer to this argument; None: nothing."""
    given = KINDS[kind]
    meant = MEANT.get((entry.__name__, name), MEANT.get(name, ()))

    def call():
        result = entry(**{**ENTRIES[entry], name: given})
        if isinstance(result, masks.Mask) and not isinstance(result, jax_fa.BlockMask):
            result = jax_fa.flash_attention(**_BSND, mask=result)
        return [x for x in jax.tree.leaves(result) if hasattr(x, "dtype")]

    try:
        jax.eval_shape(call)  # traces, and computes nothing
    except (NotImplementedError, TypeError, ValueError) as error:
        said = str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    else:
        return None if kind in meant else "no error"
    if kind in meant:
        return f"refused: {said}"
    named = OTHER_NAMES.get((entry.__name__, name), name)
    if not re.search(rf"\b{named}\b", said) and not (name == "query" and re.match("key must have", said)):
        return f"not named: {said}"
    return f"internal name: {said}" if INTERNAL.search(said) else None


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        (entry, name)
        for entry in ENTRIES
        for name, parameter in inspect.signature(entry).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_what_an_argument_cannot_be(entry, name):
    found = {kind: wrong for kind in KINDS if (wrong := _wrong(entry, name, kind)) is not None}
    assert not found, "\n".join(f"{kind}: {wrong}" for kind, wrong in found.items())
