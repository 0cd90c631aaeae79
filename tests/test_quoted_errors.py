"""Documents quote errors that exist: every message that they show is provoked here."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa.backends import cpu, native
from jax_fa.backends.mosaic import device
from jax_fa.masks import Causal, Lengths, SegmentIds
from jax_fa.testing import emulator

pytestmark = pytest.mark.usefixtures("no_type_checker")
ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
X = jnp.ones((1, 8, 2, 16))
KEYS = jax.random.split(jax.random.key(0), 3)


def _strict():
    with jax.enable_x64(True), jax_fa.strict():
        x = jnp.ones((1, 8, 2, 16), jnp.float64)
        jax.jit(attend).trace(x, x, x).lower(lowering_platforms=("cpu",))


def attend(query=X, key=X, value=X, **options):
    return jax_fa.flash_attention(query, key, value, **options)


def _float64():
    with jax.enable_x64(True):
        x = jnp.ones((1, 8, 2, 16), jnp.float64)
        attend(x, x, x, implementation="cpu")


def _without_extension(monkeypatch, source: bool):
    monkeypatch.setattr(native, "missing", "no such file")
    monkeypatch.setattr(native, "_is_source_tree", lambda: source)
    jax.jit(lambda x: attend(x, x, x, implementation="cpu")).lower(X)


def _without_backward(monkeypatch):
    real = cpu.backend.why_not
    monkeypatch.setattr(
        cpu.backend,
        "why_not",
        lambda *args, what, **more: "no" if what == "backward" else real(*args, what=what, **more),
    )
    jax.grad(lambda x: attend(x, X, X, implementation="cpu").sum())(X)


def _third_order():
    def sum_of_gradient(function):
        return lambda x: jax.grad(function)(x).sum()

    jax.grad(sum_of_gradient(sum_of_gradient(lambda x: (attend(x) ** 2).sum())))(X)


def _on_cuda(x=X):
    run = jax.jit(lambda x: attend(x, x, x, implementation="mosaic"))
    run.trace(x.astype(jnp.bfloat16) if x is X else x).lower(lowering_platforms=("cuda",))


def _new_jax(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))


def _unknown_gpu(monkeypatch):
    _new_jax(monkeypatch)
    _on_cuda()


def _ampere(monkeypatch):
    _new_jax(monkeypatch)
    monkeypatch.setattr(device, "compute_capability", lambda: "8.0")
    _on_cuda()


def _float32_on_hopper(monkeypatch):
    _new_jax(monkeypatch)
    monkeypatch.setattr(device, "compute_capability", lambda: "9.0")
    _on_cuda(jnp.ones((1, 9, 2, 16)))


def _old_jax(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    _on_cuda()


def _precision():
    flax = pytest.importorskip("jax_fa.integrations.flax")
    flax.attention_fn(X, X, X, precision="F64_F64_F64")


def _exported(tmp_path):
    """In a process that does not import jax_fa."""
    pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers to serialize")
    program = jax.export.export(jax.jit(lambda x: attend(x, x, x)), platforms=("cpu",))(X)
    (tmp_path / "program").write_bytes(program.serialize())
    load = (
        "import sys, pathlib, numpy as np; from jax import export\n"
        "export.deserialize(pathlib.Path(sys.argv[1]).read_bytes()).call(np.ones((1, 8, 2, 16), np.float32))"
    )
    command = [sys.executable, "-c", load, str(tmp_path / "program")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    raise RuntimeError(done.stderr)


def _cann(code: int):
    def provoke():
        x = jnp.ones((2, 16, 4, 32), jnp.bfloat16)
        function = "kernel" if code // 1000 == 507 else "aclnnFlashAttentionScoreV2"
        emulator.fail(function, code, times=10)
        try:
            jax.block_until_ready(attend(x, x, x, mask=Causal(), implementation="ascend"))
        finally:
            emulator.reset()

    return provoke


NATIVE = ("cpu: serves", "gradient", "No FFI", "returned", "161001", "507015", "jax_fa ascend")
PROVOKED: dict[str, Callable[..., object]] = {
    "key must have query's head_dim D=...": lambda: attend(key=X[..., :8]),
    "query must have a number of heads N that is a multiple of key's K": lambda: attend(
        key=jnp.ones((1, 8, 3, 16)), value=jnp.ones((1, 8, 3, 16))
    ),
    "layout must be one of BSND, BNSD, SBND, SND, NSD; got 'BHSD'": lambda: attend(layout="BHSD"),
    "mask must be boolean (True = visible); got dtype ...": lambda: attend(mask=jnp.zeros((8, 8))),
    "mask must be one mask; got a list of 2": lambda: attend(mask=[Causal(), Lengths(key=(3,))]),
    "~ and | cannot take the complement of SegmentIds that lie apart": lambda: attend(
        mask=~SegmentIds(np.array([0, 1, 0, 1, 0, 1, 0, 1]))
    ),
    "flash_attention has no argument 'is_causal'; pass mask=jax_fa.masks.Causal() instead": lambda: attend(
        is_causal=True
    ),
    "dropout_key must be a jax.random key when dropout_rate > 0": lambda: attend(dropout_rate=0.1),
    "dropout_key must be a jax.random key, such as jax.random.key(0); got 0": lambda: attend(
        dropout_rate=0.1, dropout_key=0
    ),
    "dropout_key must be a single jax.random key; got keys of shape ...": lambda: attend(
        dropout_rate=0.1, dropout_key=KEYS
    ),
    "implementation must be None or one of 'cpu', 'mosaic', 'ascend', 'xla'; got 'cudnn'": lambda: attend(
        implementation="cudnn"
    ),
    "jax_fa is strict (jax_fa.strict, JAX_FA_STRICT) and this call would fall back to xla on platform 'cpu'. ...": _strict,
    "implementation='cudnn' is jax.nn's, which cannot serve this call: ...": lambda: (
        jax_fa.dot_product_attention(X, X, X, implementation="cudnn")  # no CUDA, or float32
    ),
    "implementation='cpu' cannot serve this call on platform 'cpu'. "
    "cpu: serves float32, bfloat16 and float16, not float64": _float64,
    "implementation='cpu' cannot serve this call on platform 'cpu'. "
    "cpu: jax_fa is imported from its source tree ...": lambda monkeypatch: _without_extension(
        monkeypatch, True
    ),
    "implementation='cpu' cannot serve this call on platform 'cpu'. "
    "cpu: the native extension is not installed (...)": lambda monkeypatch: _without_extension(
        monkeypatch, False
    ),
    "implementation='...' cannot serve the gradient of this call": _without_backward,
    "jax_fa serves derivatives of the third order and above in forward mode only": _third_order,
    "implementation='mosaic' cannot serve this call on platform 'cuda'. mosaic: ...": _old_jax,
    "the GPU is not known where this is lowered": _unknown_gpu,
    "needs a Hopper GPU (compute capability 9.0), this one has 8.0": _ampere,
    "needs jax 0.11 or newer, which needs Python 3.12 or newer": _old_jax,
    "query has dtype float32; it serves bfloat16 and float16": _float32_on_hopper,
    "precision='F64_F64_F64' asks for float64": _precision,
    "No FFI handler registered for jax_fa_cpu_forward": _exported,
    "aclnn... returned 561103": _cann(561103),
    "161001": _cann(161001),
    "507015": _cann(507015),
    "jax_fa ascend: aclnnFlashAttentionScoreV2 returned 561103 (ACLNN_ERR_INNER_NULLPTR: ... CANN says: ... Function: "
    "aclnnFlashAttentionScoreV2 of /.../libopapi.so. Call: forward, layout BSND, query bfloat16[2, 16, 4, 32], "
    "...": _cann(561103),
}


def _quoted() -> set[str]:
    """What documents show as messages: in errors.md all sentences in code type, elsewhere what reads like an error."""
    found = set()
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        blocks = re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        found |= {" ".join(block.split()) for language, block in blocks if not language}
        text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        spans = {" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)}
        if path.name == "errors.md":
            bold = " ".join(re.findall(r"\*\*(`.+?)\*\*", text, re.DOTALL))
            found |= {" ".join(span.split()) for span in re.findall(r"`([^`]+)`", bold)}
            found |= {span for span in spans if span.count(" ") >= 4}
        found |= {span for span in spans if re.search(r" (must be|must have|cannot|got|returned) ", span)}
    return found


def test_every_message_in_the_documents_is_provoked():
    assert _quoted() == set(PROVOKED)


@pytest.mark.parametrize("message", PROVOKED)
def test_a_message_in_the_documents(message, request, monkeypatch, tmp_path):
    if native.missing is not None and any(word in message for word in NATIVE):
        pytest.skip("needs the native extension")
    provoke = PROVOKED[message]
    names = provoke.__code__.co_varnames[: provoke.__code__.co_argcount]
    fixtures = {"monkeypatch": monkeypatch, "tmp_path": tmp_path}
    with pytest.raises(Exception) as raised:  # the kind is a matter of test_errors.py
        provoke(**{name: fixtures[name] for name in names if name in fixtures})
    pattern = ".*".join(re.escape(part) for part in message.split("..."))
    assert re.search(pattern, str(raised.value), re.DOTALL), raised.value
