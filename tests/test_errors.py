"""Every error of the public functions: its type and its text.

(Those of `jax_fa.masks` stand in test_masks.py.)
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa import masks

pytestmark = pytest.mark.usefixtures("no_type_checker")


def _zeros(*shape: int, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


Q, KV = _zeros(2, 5, 4, 8), _zeros(2, 7, 2, 8)
KEY = jax.random.key(0)


def attend(query=Q, key=KV, value=KV, **options):
    return jax_fa.flash_attention(query, key, value, **options)


def dot(query=Q, key=KV, value=KV, *args, **options):
    return jax_fa.dot_product_attention(query, key, value, *args, **options)


def traced(function, *args):
    return jax.jit(function)(*args)


# Both entries share these: (name, arguments, exception, text).
SHARED = [
    (
        "integer-query",
        {"query": _zeros(2, 5, 4, 8, dtype=jnp.int32)},
        TypeError,
        r"query must have a floating dtype; got int32\.",
    ),
    (
        "other-key-dtype",
        {"key": _zeros(2, 7, 2, 8, dtype=jnp.bfloat16)},
        TypeError,
        r"key must have query's dtype float32; got bfloat16\.",
    ),
    (
        "other-value-dtype",
        {"value": _zeros(2, 7, 2, 8, dtype=jnp.float16)},
        TypeError,
        r"value must have query's dtype float32; got float16\.",
    ),
    (
        "batch",
        {"key": _zeros(3, 7, 2, 8), "value": _zeros(3, 7, 2, 8)},
        ValueError,
        r"key must have batch dims B=\(2,\); got \(3,\)\. "
        r"\(query has shape \(2, 5, 4, 8\), key \(3, 7, 2, 8\); layout BSND\.\)",
    ),
    (
        "head-dim",
        {"key": _zeros(2, 7, 2, 6), "value": _zeros(2, 7, 2, 6)},
        ValueError,
        r"key must have query's head_dim D=8; got 6\. \(query has shape .*, key \(2, 7, 2, 6\); layout BSND\.\)",
    ),
    (
        "value-length",
        {"value": _zeros(2, 6, 2, 8)},
        ValueError,
        r"value must have key's \(\*B, Skv, K\)=\(2, 7, 2\); got \(2, 6, 2\)\. "
        r"\(key has shape \(2, 7, 2, 8\), value \(2, 6, 2, 8\); layout BSND\.\)",
    ),
    (
        "value-heads",
        {"value": _zeros(2, 7, 1, 8)},
        ValueError,
        r"value must have key's \(\*B, Skv, K\)=\(2, 7, 2\); got \(2, 7, 1\)\.",
    ),
    (
        "zero-head-dim",
        {"query": _zeros(2, 5, 4, 0), "key": _zeros(2, 7, 2, 0), "value": _zeros(2, 7, 2, 0)},
        ValueError,
        r"query must have head_dim D of at least 1; got shape \(2, 5, 4, 0\) \(BSND\)\.",
    ),
    (
        "heads",
        {"query": _zeros(2, 5, 3, 8)},
        ValueError,
        r"query must have a number of heads N that is a multiple of key's K; got N=3, K=2 "
        r"from shapes \(2, 5, 3, 8\) and \(2, 7, 2, 8\) \(BSND\)\.",
    ),
    (
        "no-heads",
        {"key": _zeros(2, 7, 0, 8), "value": _zeros(2, 7, 0, 8)},
        ValueError,
        r"multiple of key's K; got N=4, K=0",
    ),
    (
        "sinks-dtype",
        {"sinks": _zeros(4, dtype=jnp.int32)},
        TypeError,
        r"sinks must have a floating dtype; got int32\.",
    ),
    (
        "sinks-shape",
        {"sinks": _zeros(2)},
        ValueError,
        r"sinks must have shape \(N,\) or \(\*B, N\) with B=\(2,\), N=4; got \(2,\)\.",
    ),
    (
        "sinks-scalar",
        {"sinks": 0.0},
        ValueError,
        r"sinks must have shape \(N,\) or \(\*B, N\) with B=\(2,\), N=4; got \(\)\.",
    ),
    (
        "sinks-rows",
        {"sinks": _zeros(1, 2, 4)},
        ValueError,
        r"sinks must have shape \(N,\) or \(\*B, N\) .* got \(1, 2, 4\)\.",
    ),
    (
        "max-logits-traced",
        {"return_max_logits": "yes"},
        TypeError,
        r"return_max_logits must be True or False; got 'yes'\.",
    ),
    (
        "scale-shape",
        {"scale": jnp.ones(2)},
        ValueError,
        r"scale must be a scalar, or .* \(\*B, N, 1, 1\)=\(2, 4, 1, 1\): .* shape \(4, 1, 1\); got shape \(2,\)\.",
    ),
    ("scale-nan", {"scale": float("nan")}, ValueError, r"scale must be finite; got nan\."),
    ("scale-infinite", {"scale": -np.inf}, ValueError, r"scale must be finite; got -inf\."),
    (
        "cap-zero",
        {"logits_soft_cap": 0.0},
        ValueError,
        r"logits_soft_cap must be positive and finite, or None for no cap; got 0\.0\.",
    ),
    (
        "cap-negative",
        {"logits_soft_cap": -1},
        ValueError,
        r"logits_soft_cap must be positive .*; got -1\.0\.",
    ),
    (
        "cap-infinite",
        {"logits_soft_cap": np.inf},
        ValueError,
        r"logits_soft_cap must be positive .*; got inf\.",
    ),
    (
        "cap-of-a-head",
        {"logits_soft_cap": np.full((1, 1, 1), -2.0, np.float32)},
        ValueError,
        r"(?s)logits_soft_cap must be positive .*; got .*-2\.",
    ),
    (
        "rate-one",
        {"dropout_rate": 1.0},
        ValueError,
        r"dropout_rate must be in \[0, 1\); got 1\.0\.",
    ),
    (
        "rate-negative",
        {"dropout_rate": -0.1},
        ValueError,
        r"dropout_rate must be in \[0, 1\); got -0\.1\.",
    ),
    (
        "no-dropout-key",
        {"dropout_rate": 0.5},
        ValueError,
        r"dropout_key must be a jax\.random key when dropout_rate > 0 \(it is 0\.5\); got None\.",
    ),
    (
        "boolean-bias",
        {"bias": _zeros(5, 7, dtype=bool)},
        TypeError,
        r"bias must be numeric, it is added to the logits; got dtype bool\. Pass it as mask\.",
    ),
    (
        "complex-bias",
        {"bias": _zeros(5, 7, dtype=jnp.complex64)},
        TypeError,
        r"bias must be real; got dtype complex64\.",
    ),
    (
        "bias-shape",
        {"bias": _zeros(2, 5, 7)},
        ValueError,
        r"bias must broadcast to \(\*B, N, Sq, Skv\)=\(2, 4, 5, 7\); got shape \(2, 5, 7\)\.",
    ),
    (
        "mask-shape",
        {"mask": _zeros(3, 7, dtype=bool)},
        ValueError,
        r"mask must broadcast to \(\*B, N, Sq, Skv\)=\(2, 4, 5, 7\); got shape \(3, 7\)\.",
    ),
    (
        "float-mask",
        {"mask": _zeros(5, 7)},
        TypeError,
        r"mask must be boolean \(True = visible\); got dtype float32\. For an additive mask use bias\.",
    ),
    (
        "unknown-implementation",
        {"implementation": "flash"},
        ValueError,
        r"implementation must be None or one of 'cpu', 'mosaic', 'ascend', 'xla'; got 'flash'\.",
    ),
    (
        "a-platform-as-implementation",
        {"implementation": "tpu"},
        ValueError,
        r"implementation must be .*; got 'tpu'\. None takes the best backend .*: there 'xla'\.",
    ),
    (
        "implementation-list",
        {"implementation": ["xla"]},
        ValueError,
        r"implementation must be .*; got \['xla'\]",
    ),
    ("no-query", {"query": None}, TypeError, r"query must be an array; got None\."),
    ("no-key", {"key": None}, TypeError, r"key must be an array; got None\."),
    ("a-string", {"value": "abc"}, TypeError, r"value must be an array; got 'abc'\."),
    (
        "ragged",
        {"bias": [[1.0], [1.0, 2.0]]},
        TypeError,
        r"bias must be an array; got \[\[1\.0\], \[1\.0, 2\.0\]\]",
    ),
    (
        "a-shape-in-place-of-an-array",
        {"query": jax.ShapeDtypeStruct((2, 5, 4, 8), jnp.float32)},
        TypeError,
        r"query must be an array; got ShapeDtypeStruct\(.*\), which has no values\. \(jax_fa\.explain and",
    ),
    ("a-key-as-bias", {"bias": KEY}, TypeError, r"bias must be an array; got a jax\.random key\."),
    ("scale-string", {"scale": "0.3"}, TypeError, r"scale must be a number or None; got '0\.3'\."),
    ("scale-bool", {"scale": True}, TypeError, r"scale must be a number or None; got True\."),
    ("scale-list", {"scale": [0.3]}, TypeError, r"scale must be a number or None; got \[0\.3\]\."),
    (
        "cap-string",
        {"logits_soft_cap": "30"},
        TypeError,
        r"logits_soft_cap must be a positive number or None; got '30'",
    ),
    ("no-rate", {"dropout_rate": None}, TypeError, r"dropout_rate must be a number in \[0, 1\); got None\."),
    (
        "an-int-as-dropout-key",
        {"dropout_rate": 0.5, "dropout_key": 0},
        TypeError,
        r"dropout_key must be a jax\.random key, such as jax\.random\.key\(0\); got 0\.",
    ),
    (
        "an-array-as-dropout-key",
        {"dropout_rate": 0.5, "dropout_key": jnp.zeros(3, jnp.uint32)},
        TypeError,
        r"dropout_key must be a jax\.random key, .* of shape \(3,\) and dtype uint32\.",
    ),
    (
        "several-dropout-keys",
        {"dropout_rate": 0.5, "dropout_key": jax.random.split(KEY, 2)},
        ValueError,
        r"dropout_key must be a single jax\.random key; got keys of shape \(2,\)\. .* jax\.vmap the call",
    ),
    (
        "several-old-style-keys",
        {"dropout_rate": 0.5, "dropout_key": jnp.zeros((3, 2), jnp.uint32)},
        ValueError,
        r"dropout_key must be a single jax\.random key; got keys of shape \(3,\)\.",
    ),
]

FLASH = [
    (
        lambda: attend(layout="BHSD"),
        ValueError,
        r"layout must be one of BSND, BNSD, SBND, SND, NSD; got 'BHSD'\. "
        r"Heads are N and lengths S here: pass layout='BNSD'\.",
    ),
    (lambda: attend(layout="bshd"), ValueError, r"got 'bshd'\. .* pass layout='BSND'\."),
    (lambda: attend(layout=None), ValueError, r"layout must be one of BSND, .*; got None\."),
    (lambda: attend(layout=["BSND"]), ValueError, r"layout must be one of BSND, .*; got \['BSND'\]\."),
    (
        lambda: attend(mask=[masks.Causal(), masks.Lengths(key=(1, 2))]),
        TypeError,
        r"mask must be one mask; got a list of 2\. Join masks by &: mask=Causal\(\) & Lengths\(key=\.\.\.\)\.",
    ),
    (
        lambda: attend(mask=True),
        TypeError,
        r"mask must be a jax_fa\.masks\.Mask or a boolean array; got True\. A causal mask is "
        r"mask=jax_fa\.masks\.Causal\(\)\.",
    ),
    (
        lambda: attend(mask=masks.Causal),
        TypeError,
        r"mask must be an object; got the class Causal: pass Causal\(\)",
    ),
    (
        lambda: masks.Causal() | 1.0,
        TypeError,
        r"mask must be a jax_fa\.masks\.Mask or a boolean array; got float",
    ),
    (
        lambda: attend(causal=True),
        TypeError,
        r"^flash_attention has no argument 'causal'; pass mask=jax_fa\.masks\.Causal\(\) instead\.$",
    ),
    (
        lambda: attend(is_causal=True),
        TypeError,
        r"^flash_attention has no argument 'is_causal'; pass mask=jax_fa\.masks\.Causal\(\) instead\. "
        r"\(is_causal is an argument of jax_fa\.dot_product_attention\.\)$",
    ),
    (
        lambda: attend(bais=None),
        TypeError,
        r"^flash_attention has no argument 'bais'; did you mean 'bias'\?$",
    ),
    (
        lambda: attend(colour=1),
        TypeError,
        r"^flash_attention has no argument 'colour'; its arguments are query, key, .*\.$",
    ),
    (
        lambda: attend(return_logsumexp="yes"),
        TypeError,
        r"return_logsumexp must be True or False; got 'yes'\.",
    ),
    (lambda: attend(scale=10**400), ValueError, r"scale must be finite; got an object of type int\."),
    (lambda: attend(logits_soft_cap=10**400), ValueError, "logits_soft_cap must be finite"),
    (lambda: attend(dropout_rate=10**400), ValueError, "dropout_rate must be finite"),
    (
        lambda: attend(return_logsumexp=np.int32(3)),
        TypeError,
        r"return_logsumexp must be True or False; got np\.int32\(3\)\.",
    ),
    (
        lambda: attend(_zeros(4, 8), _zeros(2, 8), _zeros(2, 8)),
        ValueError,
        r"query must have a rank that fits layout 'BSND'; got shape \(4, 8\)\.",
    ),
    (
        lambda: attend(layout="SND"),
        ValueError,
        r"query must have a rank that fits layout 'SND'; got shape \(2, 5, 4, 8\)\.",
    ),
    (
        lambda: attend(Q[0], KV[0], KV[0], layout="SBND"),
        ValueError,
        r"query must have a rank that fits layout 'SBND'; got shape \(5, 4, 8\)\.",
    ),
    (lambda: attend(key=KV[0]), ValueError, r"key must have 4 dimensions \(BSND\); got shape \(7, 2, 8\)\."),
    (
        lambda: attend(value=KV[0]),
        ValueError,
        r"value must have 4 dimensions \(BSND\); got shape \(7, 2, 8\)\.",
    ),
    (
        lambda: attend(key=_zeros(2, 3, 7, 8), value=_zeros(2, 3, 7, 8), layout="BNSD"),
        ValueError,
        r"got N=5, K=3 from shapes \(2, 5, 4, 8\) and \(2, 3, 7, 8\) \(BNSD\)\.",
    ),
    (
        lambda: attend(mask="causal"),
        TypeError,
        r"mask must be a jax_fa\.masks\.Mask or a boolean array; got str\. For an additive mask use bias\.",
    ),
    (
        lambda: attend(mask=masks.Lengths(key=jnp.array([1, 2, 3]))),
        ValueError,
        r"key lengths must have one entry per batch entry, shape \(2,\); got shape \(3,\)\.",
    ),
    (
        lambda: attend(alibi_slopes=jnp.ones(4, jnp.int32)),
        TypeError,
        r"alibi_slopes must have a floating dtype; got int32\.",
    ),
    (
        lambda: attend(alibi_slopes=_zeros(2)),
        ValueError,
        r"alibi_slopes must have shape \(N,\) or \(\*B, N\) with B=\(2,\), N=4; got \(2,\)\.",
    ),
    (
        lambda: attend(alibi_slopes=_zeros(2, 4, 1)),
        ValueError,
        r"alibi_slopes must have shape \(N,\) or \(\*B, N\); got \(2, 4, 1\)\.",
    ),
    (
        lambda: attend(alibi_slopes=_zeros(3, 4)),
        ValueError,
        r"alibi_slopes must have shape .*; got \(3, 4\)\.",
    ),
    (
        lambda: traced(lambda rate: attend(dropout_rate=rate), 0.5),
        ValueError,
        r"dropout_key must be a jax\.random key when dropout_rate is traced; got None\.",
    ),
    (
        lambda: attend(logits_soft_cap=jnp.ones(2)),
        ValueError,
        r"logits_soft_cap must be a scalar, or .*; got shape \(2,\)\.",
    ),
    (
        lambda: attend(dropout_rate=jnp.ones(2), dropout_key=KEY),
        ValueError,
        r"dropout_rate must be a scalar; got shape \(2,\)\.",
    ),
]

DOT = [
    (
        lambda: dot(_zeros(4, 8)),
        ValueError,
        r"query must have 4 dimensions .* or 3 \(S, N, D\); got shape \(4, 8\)\.",
    ),
    (
        lambda: dot(key=_zeros(1, 2, 7, 2, 8)),
        ValueError,
        r"key must have 4 dimensions .*; got shape \(1, 2, 7, 2, 8\)\.",
    ),
    (
        lambda: dot(value=_zeros(2, 7, 2, 6)),
        ValueError,
        r"value must have key's shape \(2, 7, 2, 8\); got \(2, 7, 2, 6\)\. "
        r"\(jax_fa\.flash_attention takes values of another head_dim\.\)",
    ),
    (
        lambda: dot(Q, KV, KV, masks.Causal()),
        TypeError,
        r"bias must be an array; got Causal\(.*\)\. Structured masks: jax_fa\.flash_attention\.",
    ),
    (
        lambda: dot(mask=masks.Causal()),
        TypeError,
        r"mask must be an array; got Causal\(.*\)\. Structured masks",
    ),
    (
        lambda: dot(bias=_zeros(1, 2, 4, 5, 7)),
        ValueError,
        r"bias must have at most 4 dimensions; got shape \(1, 2, 4, 5, 7\)\.",
    ),
    (
        lambda: dot(local_window_size=(1, 2, 3)),
        ValueError,
        r"local_window_size must be an int, a pair \(left, right\) of ints.*, or None; got \(1, 2, 3\)\.",
    ),
    (lambda: dot(local_window_size="ab"), ValueError, r"local_window_size must be an int, .*; got 'ab'\."),
    (lambda: dot(local_window_size=(1.5, 0)), ValueError, r"local_window_size must be .*; got \(1\.5, 0\)\."),
    (
        lambda: dot(mask=True),
        TypeError,
        r"mask must be a boolean array; got True\. A causal mask is is_causal=True\.",
    ),
    (
        lambda: dot(mask=[masks.Causal()]),
        TypeError,
        r"mask must be an array; got a list of masks\. Structured masks, joined by &, are arguments of jax_fa\.flash_",
    ),
    (lambda: dot(is_causal="no"), TypeError, r"is_causal must be True or False; got 'no'\."),
    (lambda: dot(return_residual="no"), TypeError, r"return_residual must be True or False; got 'no'\."),
    (
        lambda: attend(implementation="cudnn"),
        ValueError,
        r"implementation must be None or one of 'cpu', 'mosaic', 'ascend', 'xla'; got 'cudnn'\. None takes the best "
        r"backend .*: on NVIDIA GPUs 'mosaic' or 'xla'\. dot_product_attention alone takes 'cudnn', which is jax.nn's\.",
    ),
    (
        lambda: dot(implementation="cudnn", logits_soft_cap=3.0),
        NotImplementedError,
        r"implementation='cudnn' is jax.nn's, which has no logits_soft_cap; None takes the best backend of jax_fa\.",
    ),
    (
        lambda: dot(implementation="cudnn", return_max_logits=True),
        NotImplementedError,
        r"implementation='cudnn' is jax.nn's, which has no return_max_logits",
    ),
    (
        lambda: dot(implementation="cudnn", dropout_rate=0.1, dropout_key=KEY),
        NotImplementedError,
        r"implementation='cudnn' is jax.nn's, which has no dropout_rate",
    ),
    (
        lambda: dot(implementation="cudnn", sinks=_zeros(4)),
        NotImplementedError,
        r"implementation='cudnn' is jax.nn's, which has no sinks",
    ),
    (
        lambda: dot(implementation="cudnn", bias=_zeros(3, 5, 7)),
        ValueError,
        r"bias must broadcast to \(\*B, N, Sq, Skv\)=\(2, 4, 5, 7\); got shape \(3, 5, 7\)",
    ),
    (
        lambda: jax_fa.explain(Q, KV, KV, implementation="cudnn"),
        ValueError,
        r"implementation='cudnn' is a call of jax\.nn, which explain does not read\.",
    ),
    (
        lambda: traced(lambda flag: dot(is_causal=flag), True),
        TypeError,
        r"is_causal must be True or False, known when the program is traced; got a traced value bool\[\]\. "
        r"Make it a static argument of jax\.jit \(static_argnames\)\.",
    ),
    (
        lambda: dot(causal=True),
        TypeError,
        r"^dot_product_attention has no argument 'causal'; pass is_causal=True instead\.$",
    ),
    (
        lambda: dot(layout="BNSD"),
        TypeError,
        r"^dot_product_attention has no argument 'layout'; its arguments .*\. "
        r"\(layout is an argument of jax_fa\.flash_attention\.\)$",
    ),
    (
        lambda: dot(key_value_seq_lengths="abc"),
        TypeError,
        r"key_value_seq_lengths must be an array; got 'abc'\.",
    ),
    (lambda: dot(local_window_size=1.5), ValueError, r"local_window_size must be an int, .*; got 1\.5\."),
    (lambda: dot(local_window_size=True), ValueError, r"local_window_size must be an int, .*; got True\."),
    (
        lambda: dot(query_seq_lengths=_zeros(2)),
        TypeError,
        r"query_seq_lengths must hold integers; got dtype float32\.",
    ),
    (
        lambda: dot(key_value_seq_lengths=jnp.arange(3)),
        ValueError,
        r"key_value_seq_lengths must have shape \(B,\)=\(2,\); got \(3,\)\.",
    ),
]


def score(query=Q, key=KV, value=KV, **options):
    return jax_fa.flash_attention_score(query, key, value, head_num=4, input_layout="BSND", **options)


def score_packed(**options):
    options = {"actual_seq_qlen": (2, 5), "actual_seq_kvlen": (3, 7)} | options
    return jax_fa.flash_attention_score(Q[0], KV[0], KV[0], head_num=4, input_layout="TND", **options)


OTHER = [
    (lambda: score(key=None), TypeError, r"key must be an array; got None\."),
    (lambda: score(query="abc"), TypeError, r"query must be an array; got 'abc'\."),
    (lambda: score(pse="abc"), TypeError, r"pse must be an array; got 'abc'\."),
    (
        lambda: score(pse_type=jnp.ones(3)),
        TypeError,
        r"pse_type must be an int; got ArrayImpl of shape \(3,\)",
    ),
    (lambda: score(sparse_mode="2"), TypeError, r"sparse_mode must be an int; got '2'\."),
    (lambda: score(inner_precise=None), TypeError, r"inner_precise must be an int; got None\."),
    (
        lambda: score(prefix="ab", sparse_mode=5),
        TypeError,
        r"^prefix must be a list of ints or an integer array; got 'ab'\.$",
    ),
    (
        lambda: score(prefix=[[1], 2], sparse_mode=5),
        TypeError,
        r"^prefix must be a list of ints or an integer array; got \[\[1\], 2\]\.$",
    ),
    (
        lambda: score_packed(actual_seq_qlen="ab"),
        TypeError,
        r"^actual_seq_qlen must be a list of ints or an integer array; got 'ab'\.$",
    ),
    (
        lambda: score_packed(actual_seq_kvlen=[[1], 2]),
        TypeError,
        r"^actual_seq_kvlen must be a list of ints or an integer array; got \[\[1\], 2\]\.$",
    ),
    (
        lambda: traced(lambda p: score(keep_prob=p), 0.5),
        ValueError,
        r"^keep_prob must be a Python number in \(0, 1\]; got a traced value float32\[\]\.",
    ),
    (
        lambda: masks.Lengths(key=[[1], [2, 3]]),
        TypeError,
        r"^key lengths must be a list of ints or an integer array; got \[\[1\], \[2, 3\]\]\.$",
    ),
    (
        lambda: jax_fa.flash_attention_score(Q, KV, KV, head_num=4, input_layout=["BSND"]),
        ValueError,
        r"input_layout must be one of BSH, SBH, BSND, BNSD, TND; got \['BSND'\]\.",
    ),
    (
        lambda: jax_fa.flash_attention_score(Q, KV, KV, head_num=4, input_layout="BSND", scale=0.3),
        TypeError,
        r"^flash_attention_score has no argument 'scale'; pass scale_value instead\. \(scale is an argument of "
        r"jax_fa\.dot_product_attention and jax_fa\.flash_attention and jax_fa\.npu_fusion_attention and "
        r"jax_fa\.paged_attention\.\)$",
    ),
    (
        lambda: jax_fa.explain(Q, KV),
        TypeError,
        r"these are not the arguments of jax_fa\.dot_product_attention: missing a required argument: 'value'\.",
    ),
    (
        lambda: jax_fa.explain(Q, KV, KV, causal=True),
        TypeError,
        r"^dot_product_attention has no argument 'causal'; pass is_causal=True instead\.$",
    ),
    (
        lambda: jax_fa.explain(Q, KV, KV, is_causal=True, alibi_slopes=jnp.ones(4)),
        TypeError,
        r"No entry has all these arguments: alibi_slopes of flash_attention, is_causal of dot_product_attention\. "
        r"flash_attention has no argument 'is_causal'; pass mask=jax_fa\.masks\.Causal\(\) instead",
    ),
    (
        lambda: jax_fa.explain(Q, KV, KV, platforms=("cudda",)),
        ValueError,
        r"platforms must be among cpu, cuda, tpu, ascend, rocm, metal, oneapi, npu, gpu; got 'cudda'\.",
    ),
    (
        lambda: jax_fa.explain(Q, KV, KV, platforms=()),
        ValueError,
        r"platforms must name at least one platform",
    ),
    (
        lambda: jax_fa.explain(Q, KV, KV, platforms=3),
        TypeError,
        r"platforms must be names of platforms or None; got 3",
    ),
    (
        lambda: jax_fa.dropout_mask(KEY, 0.5, (2, 3, 4)),
        ValueError,
        r"shape must be \(B, N, Sq, Skv\); got \(2, 3, 4\)\.",
    ),
    (
        lambda: jax_fa.dropout_mask(KEY, 1.0, (1, 2, 3, 4)),
        ValueError,
        r"dropout_rate must be in \[0, 1\); got 1\.0\.",
    ),
    (
        lambda: jax_fa.explain(Q, KV, KV, entry="attention"),
        ValueError,
        r"entry must be one of dot_product_attention, flash_attention, flash_attention_score, npu_fusion_attention, "
        r"paged_attention; got 'attention'\.",
    ),
    (
        lambda: jax_fa.explain(Q, KV, KV[:, :6]),
        ValueError,
        r"value must have key's \(\*B, Skv, K\)=\(2, 7, 2\); got",
    ),
]


@pytest.mark.parametrize("entry", [attend, dot], ids=["flash_attention", "dot_product_attention"])
@pytest.mark.parametrize(("options", "kind", "message"), [x[1:] for x in SHARED], ids=[x[0] for x in SHARED])
def test_errors_of_both_entries(entry, options, kind, message):
    with pytest.raises(kind, match=message):
        entry(**options)


@pytest.mark.parametrize(("call", "kind", "message"), [*FLASH, *DOT, *OTHER])
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_a_backend_that_refuses_says_why(monkeypatch):
    """NotImplementedError with the reason, when the call is compiled."""
    for backend in jax_fa.backends.every():
        monkeypatch.setattr(backend, "why_not", lambda *args, **kwargs: "it does not like this")
    with pytest.raises(
        NotImplementedError,
        match=r"implementation='xla' cannot serve this call on platform '\w+'\. xla: it does not like this\.",
    ):
        jax.jit(lambda q: attend(q, implementation="xla"))(Q)
    with pytest.raises(
        NotImplementedError, match=r"No backend can serve this call .*xla: it does not like this"
    ):
        jax.jit(attend)(Q)
