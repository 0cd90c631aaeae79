"""`explain`: platforms by every name, the entry that arguments belong to, and what is computed in."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa import explanation
from jax_fa.backends import native
from jax_fa.masks import Causal

X = jax.ShapeDtypeStruct((1, 64, 4, 32), jnp.float32)
Y = jax.ShapeDtypeStruct((1, 8, 64, 4, 32), jnp.float32)


def test_gpu_is_what_jax_calls_cuda():
    gpu, cuda = (jax_fa.explain(X, X, X, platforms=(name,)) for name in ("gpu", "cuda"))
    assert gpu.reasons == {"gpu": cuda.reasons["cuda"]}
    assert gpu.reasons["gpu"]["cpu"] == "runs on CPU only, not on CUDA"
    assert not gpu.reasons["gpu"]["mosaic"].startswith("runs on")


def test_platforms_are_read_once():
    assert list(jax_fa.explain(X, X, X, platforms=iter(["cpu", "gpu"])).chosen) == ["cpu", "gpu"]


@pytest.mark.parametrize("name", ["cpu", "cuda", "gpu", "rocm", "tpu", "METAL", "ascend", "npu", "NPU"])
def test_a_string_is_one_platform(name):
    assert list(jax_fa.explain(X, X, X, platforms=name).chosen) == [name]


def test_a_plugin_of_any_name_is_known(monkeypatch):
    monkeypatch.setattr(explanation.extend_backend, "backends", lambda: {"abacus": None})
    assert jax_fa.explain(X, X, X, platforms="abacus").chosen == {"abacus": "xla"}


@pytest.mark.parametrize(("version", "platform"), [("cuda 13000", "cuda"), ("rocm 7.0", "rocm")])
def test_the_kind_of_gpu(version, platform, monkeypatch):
    class Device:
        client = type("Client", (), {"platform_version": f"PJRT C API\n{version}"})

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device])
    assert explanation.here() == platform


def test_a_user_on_cpu_reads_of_platforms_first(monkeypatch):
    """Not of versions, nor of what would have to be installed."""
    monkeypatch.delenv("JAX_FA_CANN_EMULATOR", raising=False)
    told = jax_fa.explain(X, X, X, platforms="cpu").reasons["cpu"]
    assert told["mosaic"].startswith("runs on CUDA only; on CPU in Pallas' interpreter, for tests")
    assert told["ascend"].startswith("runs on ascend, npu; on cpu only against an emulator of CANN")


@pytest.mark.parametrize(
    ("arguments", "options", "entry"),
    [
        ((X, X, X), {}, "dot_product_attention"),
        ((X, X, X), {"mask": Causal()}, "flash_attention"),
        ((X, X, X), {"alibi_slopes": jnp.ones(4)}, "flash_attention"),
        ((Y, Y, Y), {"bias": jax.ShapeDtypeStruct((1, 1, 4, 64, 64), jnp.float32)}, "flash_attention"),
        ((), {"query": Y, "key": Y, "value": Y}, "flash_attention"),
        ((X, X), {"value": jax.ShapeDtypeStruct((1, 64, 4, 8), jnp.float32)}, "flash_attention"),
        ((X, X, X), {"head_num": 4, "input_layout": "BSND"}, "flash_attention_score"),
    ],
)
def test_the_entry_of_arguments(arguments, options, entry):
    assert jax_fa.explain(*arguments, platforms="cpu", **options).entry == entry


@pytest.mark.parametrize(
    ("dtype", "platform", "text"),
    [
        ("float32", "cpu", "float32 products and sums"),
        ("bfloat16", "cpu", "products of bfloat16 values, float32 sums and softmax"),
        ("float16", "cuda", "products of float16 values, float32 sums and softmax"),
        ("float32", "tpu", "float32 sums; products as jax_default_matmul_precision says"),
        ("float64", "cpu", "float64 products and sums"),
        ("bfloat16", "ascend", "as CANN's operator does"),
    ],
)
def test_what_it_computes_in(dtype, platform, text):
    if platform == "ascend" and native.missing is not None:
        pytest.skip("needs the native extension")
    with jax.enable_x64(True):
        x = jax.ShapeDtypeStruct((1, 64, 4, 32), dtype)
        told = jax_fa.explain(x, x, x, platforms=platform)
    assert told.computes_in[platform].startswith(text)
    assert text in str(told)


@pytest.mark.skipif(native.missing is not None, reason="needs the native extension")
def test_the_cpu_kernels_say_what_they_chose(monkeypatch):
    for isa in ("portable", native.extension.chosen_instruction_set()):
        monkeypatch.setenv("JAX_FA_CPU_ISA", isa)
        told = jax_fa.explain(X, X, X, platforms="cpu")
        (note,) = told.notes["cpu"]
        assert note == f"kernels {native.extension.cpu_tuning()}" and note.startswith(f"kernels {isa}: ")
        assert note in str(told)


# --- a checkout in front of the installed package


@pytest.fixture
def checkout(tmp_path):
    """The sources without compiled kernels, as `git clone` leaves them."""
    package = Path(jax_fa.__file__).parent
    shutil.copytree(
        package, tmp_path / "jax_fa", ignore=shutil.ignore_patterns("_native*", "emulator", "__pycache__")
    )
    (tmp_path / "cc").mkdir()
    for name in ("pyproject.toml", "cc/CMakeLists.txt"):
        (tmp_path / name).touch()
    return tmp_path


ASK = """
import jax, jax.numpy as jnp, jax_fa
x = jax.ShapeDtypeStruct((1, 8, 2, 16), jnp.float32)
print(jax_fa.explain(x, x, x, platforms="cpu"))
"""


def _ask(at: Path, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        cwd=at,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _metadata(at: Path) -> None:
    """What pip leaves of an installed package."""
    info = at / "jax_fa-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: jax_fa\nVersion: 0.1.0\n")


def test_a_checkout_that_shadows_the_installed_package(checkout, tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    _metadata(site)
    told = _ask(checkout, PYTHONPATH=str(site))
    assert (
        f"cpu  cpu     jax_fa is imported from its source tree {checkout}, which holds no compiled kernels, in place of the "
        "installed package: start Python with -P, or in another directory"
    ) in told


def test_a_checkout_and_nothing_installed(monkeypatch):
    monkeypatch.setattr(native, "_is_source_tree", lambda: True)
    monkeypatch.setattr(native, "_is_installed", lambda: False)
    assert native.absence("").endswith(
        f"run `python -m pip install {native._ROOT}`, then start Python with -P, or in another directory"
    )


def test_a_package_without_its_extension(monkeypatch):
    monkeypatch.setattr(native, "_is_source_tree", lambda: False)
    text = "the native extension is not installed (no file); reinstall with a C++17 compiler at hand"
    assert native.absence("no file") == text


# --- functions


def _attend(x):
    return jax_fa.flash_attention(x, x, x, mask=Causal())


def _layers(x):
    return jax.lax.scan(lambda x, _: (_attend(x), None), x, length=6)[0]


def _cond(x):
    return jax.lax.cond(x[0, 0, 0, 0] > 0, _attend, lambda x: x, x)


def _loss(x):
    return jnp.sum(_layers(x) ** 2)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda x: x + 1, []),
        (_attend, [("forward", 1)]),
        (jax.jit(_attend), [("forward", 1)]),
        (jax.checkpoint(_attend), [("forward", 1)]),
        (jax.vmap(_attend), [("forward", 1)]),
        (_layers, [("forward", 6)]),
        (_cond, [("forward", 1)]),
        (jax.grad(_loss), [("forward", 6), ("backward", 6)]),
        (lambda x: jax.nn.dot_product_attention(x, x, x), []),
        (lambda x: _attend(x) + jax_fa.dot_product_attention(x, x, x), [("forward", 1)] * 2),
    ],
)
def test_the_calls_of_a_function(function, found):
    shape = (2, 1, 64, 4, 16) if "vmap" in repr(function) else (1, 64, 4, 16)
    told = jax_fa.explain(function, jax.ShapeDtypeStruct(shape, jnp.float32), platforms="cpu")
    assert [(x.entry, x.times) for x in told] == found
    assert all("test_explain.py" in x.source for x in told)
    assert isinstance(told, tuple) and (("no attention call" in str(told)) == (not found))


def test_a_function_with_options_and_a_tree_of_arguments():
    def model(parameters, x, *, causal, name):
        return _attend(x * parameters["scale"]) if causal and name == "this" else x

    x = jnp.ones((1, 64, 4, 16), jnp.bfloat16)
    (told,) = jax_fa.explain(model, {"scale": jnp.bfloat16(2)}, x, causal=True, name="this", platforms="tpu")
    assert told.dtype == "bfloat16" and told.chosen == {"tpu": "xla"} and "(_attend)" in told.source
    assert "forward: B=(1,)" in str(told)


def test_an_entry_as_the_function():
    (told,) = jax_fa.explain(partial(jax_fa.flash_attention, mask=Causal()), X, X, X, platforms="cpu")
    assert told.source == "the function itself" == jax_fa.explain(X, X, X, platforms="cpu").source


def test_entry_is_not_for_functions():
    with pytest.raises(ValueError, match="entry is for the arguments of a call; got entry='flash_attention'"):
        jax_fa.explain(_attend, X, entry="flash_attention")


def test_a_symbolic_length():
    (length,) = jax.export.symbolic_shape("S")
    x = jax.ShapeDtypeStruct((1, length, 4, 16), jnp.float32)
    told = jax_fa.explain(x, x, x, platforms="cpu")
    assert told.chosen == {"cpu": "xla"}
    assert told.reasons["cpu"]["cpu"] == "symbolic dimensions are not supported"


@pytest.mark.usefixtures("no_type_checker")
def test_lists_and_scalars_of_numpy():
    """They are read as the entries read them."""
    x = np.ones((1, 4, 1, 8), np.float32)
    options = {
        "is_causal": np.bool_(True),
        "scale": np.float32(0.5),
        "dropout_rate": np.float64(0.0),
        "key_value_seq_lengths": [3],
        "local_window_size": (np.int32(2), np.array(1)),
        "mask": [True, True, False, True],
    }
    told = jax_fa.explain(x.tolist(), x.tolist(), x.tolist(), **options, platforms="cpu")
    assert told.entry == "dot_product_attention" and told.problem.scale == 0.5 and told.dims.Sq == 4
    (told,) = jax_fa.explain(jax_fa.dot_product_attention, x, x, x, platforms="cpu", **options)
    assert told.problem.scale == 0.5
    assert jax_fa.explain(x, x, x, is_causal=np.array(True), return_residual=np.bool_(True)).chosen


@pytest.mark.usefixtures("no_type_checker")
def test_arrays_of_other_libraries():
    """They are what the entry makes of them, as in a call."""

    class Theirs:
        shape, dtype = (1, 8, 2, 4), "float32 of theirs"

        def __array__(self, dtype=None, copy=None):
            return np.zeros(self.shape, np.float32)

    x = Theirs()
    assert jax_fa.flash_attention(x, x, x).shape == x.shape
    assert jax_fa.explain(x, x, x, platforms="cpu").dims.Sq == 8
    assert jax_fa.flops(x, x, x).pairs == 2 * 8 * 8
