"""What is decided once per process: which CANN is found and called, plugins, and what the emulator does not forgive."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tables import some_pairs

import jax_fa
from jax_fa.backends.ascend import installation
from jax_fa.testing import emulator

if (absent := installation.absence()) is not None:
    pytest.skip(f"needs the CANN adapter: {absent}", allow_module_level=True)

_OURS = ("JAX_FA_CANN_EMULATOR", "JAX_FA_CANN_PATH", "JAX_FA_CANN_ABI", "LD_LIBRARY_PATH")


def _run(
    program: str, *arguments: str, check: bool = True, **environment: str
) -> subprocess.CompletedProcess:
    """Runs a program in a process of its own, whose environment knows of no CANN but the one given."""
    inherited = {k: v for k, v in os.environ.items() if k not in _OURS and not k.startswith("ASCEND_")}
    path = str(Path(jax_fa.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", textwrap.dedent(program), *arguments],
        env=inherited | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


_LOAD = """
    import importlib.machinery, importlib.util, json, sys
    loader = importlib.machinery.ExtensionFileLoader("_native", sys.argv[1])
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_native", loader))
    loader.exec_module(module)
    print(json.dumps(module.cann_library()))
"""


def _library(**environment: str) -> dict:
    """What the loader finds, without the second that JAX takes."""
    import jax_fa._native as native

    return json.loads(_run(_LOAD, native.__file__, **environment).stdout)


def _install(root: Path, **files: str) -> Path:
    """Copies files of the emulator: where they go (with _ for /), and which they are."""
    for at, source in files.items():
        target = root / at.replace("__", "/")
        target.mkdir(parents=True, exist_ok=True)
        for name in source.split():
            shutil.copy(emulator.directory() / name, target / Path(name).name)
    return root


RUNTIME = "libascendcl.so libnnopbase.so"
LONG, FIRST, SECOND, SHORT, CUSTOM = (
    "libopapi.so",
    "v1/libopapi.so",
    "v2/libopapi.so",
    "short/libcust_opapi.so",
    "custom/libcust_opapi.so",
)
VENDOR = "opp__vendors__{}__op_api__lib"


# --- what is found


def test_the_search_order(tmp_path):
    home = _install(tmp_path / "home", lib64=f"{RUNTIME} {LONG}")
    found = _library(ASCEND_HOME_PATH=str(home))
    assert found["error"] is None and found["long"] == str(home / "lib64/libopapi.so")
    assert found["runtime"] == str(home / "lib64/libascendcl.so") and not found["emulator"]

    opp = _install(home, **{VENDOR.format("first"): CUSTOM, VENDOR.format("second"): SHORT})
    (opp / "opp/vendors/config.ini").write_text("load_priority=second,first\n")
    vendors = {"ASCEND_HOME_PATH": str(home), "ASCEND_OPP_PATH": str(home / "opp")}
    found = _library(**vendors)
    assert found["long"] == str(home / "opp/vendors/first/op_api/lib/libcust_opapi.so")
    assert found["short"] == str(home / "opp/vendors/second/op_api/lib/libcust_opapi.so")

    custom = _install(tmp_path / "vendor", op_api__lib=CUSTOM)
    found = _library(ASCEND_CUSTOM_OPP_PATH=str(custom), **vendors)
    assert found["long"] == str(custom / "op_api/lib/libcust_opapi.so")

    named = _install(tmp_path / "named", lib64=f"{RUNTIME} {FIRST}")
    found = _library(JAX_FA_CANN_PATH=f"/nowhere:{named}", ASCEND_HOME_PATH=str(home))
    assert found["long"] == str(named / "lib64/libopapi.so")
    assert found["runtime"] == str(named / "lib64/libascendcl.so")


def test_priority_of_vendors(tmp_path):
    root = _install(tmp_path, lib64=RUNTIME, **{VENDOR.format("a"): CUSTOM, VENDOR.format("b"): CUSTOM})
    (root / "opp/vendors/config.ini").write_text("load_priority=b,a\n")
    found = _library(JAX_FA_CANN_PATH=str(root))
    assert found["long"] == str(root / "opp/vendors/b/op_api/lib/libcust_opapi.so")


def test_the_newer_names(tmp_path):
    root = _install(tmp_path, lib64=f"{RUNTIME} {LONG}")
    (root / "lib64/libascendcl.so").rename(root / "lib64/libacl_rt.so")
    (root / "lib64/libopapi.so").rename(root / "lib64/libopapi_transformer.so")
    found = _library(JAX_FA_CANN_PATH=str(root))
    assert found["error"] is None
    assert Path(found["runtime"]).name == "libacl_rt.so"
    assert Path(found["long"]).name == "libopapi_transformer.so"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("", "no CANN runtime (libascendcl.so or libacl_rt.so) was found"),
        ("libascendcl.so libopapi.so", "libnnopbase.so was not found"),
        (RUNTIME, "no library with aclnnFlashAttentionScore"),
    ],
)
def test_missing_libraries(tmp_path, files, message):
    _install(tmp_path, lib=files)
    found = _library(JAX_FA_CANN_EMULATOR=str(tmp_path / "lib"))
    assert message in found["error"]
    assert str(tmp_path / "lib") in found["error"] and "JAX_FA_CANN_PATH" in found["error"]


def test_a_file_that_is_no_library(tmp_path):
    root = _install(tmp_path, lib=RUNTIME)
    (root / "lib/libopapi.so").write_text("not a library")
    found = _library(JAX_FA_CANN_EMULATOR=str(root / "lib"))
    assert "libopapi.so does not load" in found["error"]


_HEADER = """
aclnnStatus aclnnFlashAttentionScoreGetWorkspaceSize(const aclTensor *query, const aclTensor *key,
    const aclTensor *value, const aclTensor *realShiftOptional, const aclTensor *dropMaskOptional,
    const aclTensor *paddingMaskOptional, const aclTensor *attenMaskOptional, const aclIntArray *prefixOptional,
    double scaleValue, double keepProb, int64_t preTokens, int64_t nextTokens, int64_t headNum, char *inputLayout,
    int64_t innerPrecise, int64_t sparseMode, const aclTensor *softmaxMaxOut, const aclTensor *softmaxSumOut,
    const aclTensor *softmaxOutOut, const aclTensor *attentionOutOut, uint64_t *workspaceSize,
    aclOpExecutor **executor);
"""


def _contradictory(root: Path) -> Path:
    """A custom library whose symbols are those of the short operator and whose header is that of the long one."""
    _install(root, lib64=RUNTIME, **{VENDOR.format("odd"): SHORT})
    include = root / "opp/vendors/odd/op_api/include"
    include.mkdir()
    (include / "aclnn_flash_attention_score.h").write_text(_HEADER)
    return root


def test_an_ambiguous_library_is_refused_until_told(tmp_path):
    root = _contradictory(tmp_path)
    refused = _library(JAX_FA_CANN_PATH=str(root))
    assert any("ambiguous" in note and "JAX_FA_CANN_ABI" in note for note in refused["notes"])
    told = _library(JAX_FA_CANN_PATH=str(root), JAX_FA_CANN_ABI="short")
    assert told["short"] is not None
    wrong = _library(JAX_FA_CANN_PATH=str(root), JAX_FA_CANN_ABI="medium")
    assert "JAX_FA_CANN_ABI must be long or short; got medium" in wrong["error"]


# --- what is called


_PREAMBLE = """
import jax, jax.numpy as jnp, numpy as np
import jax_fa
from jax_fa import masks
from jax_fa.testing import emulator

def normal(seed, *shape, dtype="float32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)

def compare(*arguments, tolerance=1e-5, **options):
    '''Values and gradients of the two backends.'''
    def run(name, *x):
        named = dict(zip(("query", "key", "value", "bias", "alibi_slopes"), x))
        out = jax_fa.flash_attention(**named, implementation=name, **options)
        return jnp.sum(out.astype(jnp.float32) ** 2), out
    found, wanted = (jax.value_and_grad(lambda *x: run(name, *x), argnums=tuple(range(len(arguments))), has_aux=True)(*arguments)
                     for name in ("ascend", "xla"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, wanted)

def functions():
    return [call["function"].removeprefix("aclnnFlashAttention") for call in emulator.log()]
"""


def _program(text: str) -> str:
    return _PREAMBLE + textwrap.dedent(text)


def test_a_library_of_the_first_functions_only(tmp_path):
    root = _install(tmp_path, lib=f"{RUNTIME} {FIRST}")
    _run(
        _program("""
        q, k = normal(0, 2, 20, 4, 16), normal(1, 2, 20, 2, 16)
        bias, slopes = normal(2, 2, 1, 20, 20), np.abs(normal(3, 4))
        compare(q, k, k, bias, scale=0.3)
        call = emulator.log()[0]
        assert functions() == ["Score", "ScoreGrad"], functions()
        assert call["pseType"] is None and call["tensors"]["realShift"]["shape"] == [2, 4, 20, 20]
        emulator.reset()
        run = lambda name: jax_fa.flash_attention(q, k, k, alibi_slopes=slopes, implementation=name)
        np.testing.assert_allclose(run("ascend"), run("xla"), rtol=1e-5, atol=1e-5)
        (call,) = emulator.log()
        assert call["tensors"]["realShift"]["shape"] == [1, 4, 20, 20]
        emulator.reset()
        t = normal(4, 30, 4, 16)
        compare(t, t, t, layout="SND", mask=masks.CumulativeLengths((10, 10, 25), within=masks.Causal()))
        assert functions() == ["VarLenScore", "UnpaddingScoreGrad"], functions()
        compare(q, k, k, bias, scale=0.0)  # the scale multiplies the query: pse before scaling cannot be divided by 0
        """),
        JAX_FA_CANN_EMULATOR=str(root / "lib"),
    )


@pytest.mark.parametrize(("library", "functions"), [(FIRST, ("", "")), (SECOND, ("V2", "V2"))])
def test_a_library_without_sinks(library, functions, tmp_path):
    root = _install(tmp_path, lib=f"{RUNTIME} {library}")
    _run(
        _program("""
        import sys
        q, k = normal(0, 2, 20, 4, 16), normal(1, 2, 20, 2, 16)
        sinks = normal(2, 4)
        compare(q, k, k, mask=masks.Causal(), sinks=sinks)
        assert functions() == sys.argv[1].split(), functions()
        told = jax_fa.explain(q, k, k, sinks=sinks, entry="flash_attention", platforms="ascend", implementation="ascend")
        assert sum("this CANN has no aclnnFlashAttentionScore" in note for note in told.notes["ascend"]) == 2, told
        """),
        f"Score{functions[0]} ScoreGrad{functions[1]}",
        JAX_FA_CANN_EMULATOR=str(root / "lib"),
    )


def test_only_the_large_head_dim_operator(tmp_path):
    root = _install(tmp_path, lib64=RUNTIME, **{VENDOR.format("customize"): SHORT})
    _run(
        _program("""
        q, k = normal(0, 1, 9, 2, 576, dtype="float16"), normal(1, 1, 1030, 1, 576, dtype="float16")
        run = lambda name: jax_fa.flash_attention(q, k, k, implementation=name, return_logsumexp=True)
        for a, b in zip(run("ascend"), run("xla")):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)
        assert functions() == ["ScoreWithLargeHeadDim"], functions()

        def refusal(fn):
            try:
                fn()
            except NotImplementedError as error:
                return str(error)
            raise AssertionError

        only = "this CANN has only the large-head_dim operator"
        attend = lambda q, k, **more: lambda: jax_fa.flash_attention(q, k, k, implementation="ascend", **more)
        for call, why in (
            (attend(q, k[:, :1024]), "needs more than 1024 keys, not 1024"),
            (attend(q, k, mask=masks.Causal()), "has no mask"),
            (attend(q, k, bias=normal(2, 1030, dtype="float16")), "has no bias"),
            (attend(q, k, dropout_rate=0.5, dropout_key=jax.random.key(0)), "has no dropout"),
            (attend(q.astype("float32"), k.astype("float32")), "serves float16, not float32"),
            (attend(normal(0, 1, 9, 2, 577, dtype="float16"), normal(0, 1, 1030, 1, 577, dtype="float16")),
             "head_dim of at most 576, not 577"),
            (lambda: jax_fa.flash_attention(q, k, k[..., :64], implementation="ascend"),
             "takes values of query's head_dim 576, not 64"),
            (lambda: jax.grad(lambda q: attend(q, k)().astype(jnp.float32).sum())(q), "has no backward"),
        ):
            text = refusal(call)
            assert only in text and why in text, text
        told = jax_fa.explain(q, k, k, platforms=("ascend",))
        assert told.chosen["ascend"] == "ascend" and told.backward["ascend"] == "xla"
        import re
        assert re.search("ascend +ascend +xla", str(told)), str(told)
        """),
        JAX_FA_CANN_EMULATOR=str(root),
    )


def test_both_operators(tmp_path):
    root = _install(tmp_path, lib64=f"{RUNTIME} {LONG}", **{VENDOR.format("customize"): SHORT})
    program = _program("""
        import sys
        q, k = normal(0, 1, 9, 2, 64, dtype="float16"), normal(1, 1, 1030, 1, 64, dtype="float16")
        jax.block_until_ready(jax_fa.flash_attention(q, k, k, implementation="ascend"))
        jax.block_until_ready(jax_fa.flash_attention(q, k, k, mask=masks.Causal(), implementation="ascend"))
        assert functions() == sys.argv[1].split(), functions()
        """)
    environment = {"JAX_FA_CANN_EMULATOR": str(root)}
    _run(program, "ScoreV2 ScoreV2", **environment)
    _run(program, "ScoreWithLargeHeadDim ScoreV2", JAX_FA_CANN_ABI="short", **environment)


def test_a_program_for_a_newer_library(tmp_path):
    """Lowered where there is no CANN, it counts on ScoreV2; the machine that lacks it says so."""
    root = _install(tmp_path, lib=f"{RUNTIME} {FIRST}")
    _run(
        _program("""
        import pathlib, sys
        x, bias = normal(0, 1, 8, 2, 16), normal(1, 2, 8, 8)
        run = jax.jit(lambda x, b: jax_fa.flash_attention(x, x, x, bias=b))
        checks = [jax.export.DisabledSafetyCheck.platform()]
        exported = jax.export.export(run, platforms=("ascend",), disabled_checks=checks)(x, bias)
        pathlib.Path(sys.argv[1]).write_bytes(exported.serialize())
        """),
        str(tmp_path / "program"),
    )
    _run(
        """
        import pathlib, sys, numpy as np, jax, jax_fa
        program = jax.export.deserialize(bytearray(pathlib.Path(sys.argv[1]).read_bytes()))
        x, bias = np.ones((1, 8, 2, 16), "float32"), np.ones((2, 8, 8), "float32")
        try:
            jax.block_until_ready(jax.jit(program.call)(x, bias))
        except Exception as error:
            text = str(error)
            assert "aclnnFlashAttentionScoreV2 is not in" in text and "libopapi.so" in text, text
        else:
            raise AssertionError
        """,
        str(tmp_path / "program"),
        JAX_FA_CANN_EMULATOR=str(root / "lib"),
    )


def test_host_arrays_never_reach_a_real_library(tmp_path):
    root = _install(tmp_path, lib64=f"{RUNTIME} {LONG}")
    _run(
        """
        import numpy as np, jax_fa
        x = np.ones((1, 8, 2, 16), "float32")
        assert jax_fa.ascend.library().error is None and not jax_fa.ascend.library().emulator
        try:
            jax_fa.flash_attention(x, x, x, implementation="ascend")
        except NotImplementedError as error:
            assert "on cpu only against an emulator of CANN: set JAX_FA_CANN_EMULATOR" in str(error)
        else:
            raise AssertionError
        told = jax_fa.explain(x, x, x, platforms=("cpu", "ascend"))
        assert told.chosen == {"cpu": "cpu", "ascend": "ascend"}, str(told)
        """,
        JAX_FA_CANN_PATH=str(root),
    )


def test_nothing_is_left_at_exit():
    """After success, failure and release; streams and workspaces too."""
    done = _run(
        _program("""
        import threading
        x = normal(0, 2, 40, 4, 16)
        loss = lambda x: jnp.sum(jax_fa.flash_attention(x, x, x, mask=masks.Causal(), implementation="ascend") ** 2)
        step = jax.jit(jax.value_and_grad(loss))
        wanted = step(x)
        errors = []

        def work():
            for _ in range(20):
                for a, b in zip(step(x), wanted):
                    if not np.array_equal(a, b):
                        errors.append("differs")

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert not errors
        emulator.fail("kernel", 507015)
        try:
            jax.block_until_ready(step(x))
        except jax.errors.JaxRuntimeError as error:
            assert "507015" in str(error) and "max_work" in str(error), str(error)
        else:
            raise AssertionError
        assert emulator.live() == dict.fromkeys(emulator.OBJECTS, 0)
        assert 1 <= emulator.live("stream")["stream"] <= 9
        mallocs = emulator.calls("aclrtMalloc")
        for _ in range(5): jax.block_until_ready(step(x))
        assert emulator.calls("aclrtMalloc") == mallocs  # the steady state allocates nothing
        jax_fa.ascend.release()
        assert emulator.live("stream", "memory") == {"stream": 0, "memory": 0}
        jax.block_until_ready(step(x))  # and at exit, without being asked
        """),
        JAX_FA_CANN_EMULATOR=str(emulator.directory()),
        JAX_FA_EMULATOR_LEAKS="abort",
    )
    assert "live objects" not in done.stderr


# --- plugins


_HANDLERS = """
from jaxlib import xla_client

seen = []


def good(name, fn, platform, api_version=0, traits=0):
    seen.append((name, platform, api_version))


def older(name, fn, platform, api_version=0):
    seen.append((name, platform, api_version))


def odd(*args):
    raise RuntimeError("no custom calls here")


def register(platform, handler):
    xla_client.register_custom_call_handler(platform, handler)


def ours(platform):
    return [(f"jax_fa_ascend_{way}", platform, 1) for way in ("forward", "backward")]


def lower(platform):
    import jax, jax_fa
    x = jax.ShapeDtypeStruct((1, 8, 2, 16), "float32")
    jax.jit(lambda x: jax_fa.flash_attention(x, x, x)).trace(x).lower(lowering_platforms=(platform,))


def start():
    import jax
    jax.devices()
"""
# How a plugin comes, as (what happens before `import jax_fa`, what happens after it); its handler is {}.
_COMES = {
    "before": ("register('ASCEND', {})", ""),
    "installed": ("import sys; sys.path.insert(0, sys.argv[1])", "start()"),
    "named": ("", "jax_fa.ascend.register_platform('Ascend'); register('ASCEND', {})"),
    "unnamed": ("", "register('ASCEND', {}); jax_fa.ascend.register_platform('ascend')"),
    "by surprise": ("", "register('ASCEND', {}); lower('ascend')"),
}


def _plugin(tmp_path: Path, comes: str, handler: str) -> tuple[str, str]:
    """The two steps. An installed plugin is a module below `jax_plugins`, which JAX starts when it lists devices."""
    module = tmp_path / "jax_plugins" / "some_ascend"
    module.mkdir(parents=True)
    start = f"def initialize():\n    from __main__ import {handler}, register\n    register('ASCEND', {handler})\n"
    (module / "__init__.py").write_text(start)
    before, after = (step.replace("{}", handler) for step in _COMES[comes])
    return before, after


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("comes", "handler"), some_pairs(_COMES, ["good", "older"], every=2))
def test_a_plugin_gets_the_custom_calls(tmp_path, comes, handler):
    before, after = _plugin(tmp_path, comes, handler)
    steps = (before, "import jax_fa", after, "assert seen == ours('ASCEND'), seen", "lower('ascend')")
    _run("\n".join((_HANDLERS, *steps, "assert len(seen) == 2, seen")), str(tmp_path))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("comes", _COMES)
def test_a_plugin_that_refuses_is_a_warning(tmp_path, comes):
    before, after = _plugin(tmp_path, comes, "odd")
    steps = (
        "import warnings",
        "with warnings.catch_warnings(record=True) as caught:",
        "    warnings.simplefilter('always')",
        *(f"    {step}" for step in (before, "import jax_fa", after) if step),
        "texts = [str(w.message) for w in caught if 'could not register' in str(w.message)]",
        "assert len(texts) == 2 and all('no custom calls here' in text for text in texts), texts",
        "import jax.numpy as jnp",
        "jax_fa.flash_attention(*[jnp.ones((1, 4, 1, 8))] * 3)",
    )
    _run("\n".join((_HANDLERS, *steps)), str(tmp_path))


def test_an_installed_plugin_may_be_an_entry_point(tmp_path):
    """It is not started by `import jax_fa`; another plugin gets nothing."""
    (tmp_path / "fake.py").write_text(
        "def initialize():\n    from __main__ import good, register\n    register('other', good); register('NPU', good)\n"
    )
    info = tmp_path / "fake-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[jax_plugins]\nmy_npu = fake\n")
    steps = ("import sys; sys.path.insert(0, sys.argv[1])", "import jax_fa", "assert seen == []", "start()")
    _run("\n".join((_HANDLERS, *steps, "assert seen == ours('NPU'), seen")), str(tmp_path))


def test_importing_changes_nothing_of_jaxlib():
    _run("""
    import jax
    from jaxlib import xla_client
    tables = "_custom_callback_handler", "_custom_callback"
    before, kept = dict(vars(xla_client)), [dict(getattr(xla_client, name)) for name in tables]
    import jax_fa
    after = vars(xla_client)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] is not after[name]] == []
    assert kept == [getattr(xla_client, name) for name in tables]
    jax_fa.ascend.register_platform("some_npu")
    assert [name for name in before if before[name] is not after[name]] == ["register_custom_call_handler"]
    """)


# --- an extension without the CANN adapter


def test_without_the_cann_adapter():
    """As on platforms other than Linux: a reason, and everything else works."""
    import jax_fa._native as native

    _run(
        """
    import importlib.machinery, importlib.util, sys
    loader = importlib.machinery.ExtensionFileLoader("jax_fa._native", sys.argv[1])
    native = importlib.util.module_from_spec(importlib.util.spec_from_loader("jax_fa._native", loader))
    loader.exec_module(native)
    native.has_cann = lambda: False
    for name in ("ascend_registrations", "cann_library", "cann_release"):
        delattr(native, name)
    sys.modules["jax_fa._native"] = native
    import numpy as np, jax_fa
    why = "the native extension was built without the CANN adapter (Linux only)"
    x = np.ones((1, 8, 2, 16), "float32")
    told = jax_fa.explain(x, x, x, platforms=("cpu", "ascend"))
    assert told.chosen == {"cpu": "cpu", "ascend": "xla"}, str(told)
    assert told.reasons["ascend"]["ascend"] == why, str(told)
    try:
        jax_fa.ascend.emulator_dir()
    except RuntimeError as error:
        assert why in str(error), error
    else:
        raise AssertionError
    assert jax_fa.ascend.library().error == why
    jax_fa.ascend.register_platform("some_npu")
    jax_fa.ascend.release()
    """,
        native.__file__,
    )


# --- what the emulator does not forgive


_BARE = """
    import ctypes, sys
    base = ctypes.CDLL(sys.argv[1] + "/libnnopbase.so", mode=ctypes.RTLD_GLOBAL)
    runtime = ctypes.CDLL(sys.argv[1] + "/libascendcl.so", mode=ctypes.RTLD_GLOBAL)
    ops = ctypes.CDLL(sys.argv[1] + "/libopapi.so")
    runtime.aclGetRecentErrMsg.restype = ctypes.c_char_p
    base.aclCreateTensor.restype = ctypes.c_void_p
    p, i64, d, s, u64 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_char_p, ctypes.c_uint64
    base.aclCreateTensor.argtypes = [p, u64, ctypes.c_int, p, i64, ctypes.c_int, p, u64, p]
    raw = ctypes.create_string_buffer(1 << 20)
    start = -(-ctypes.addressof(raw) // 64) * 64
    used = [start]

    def tensor(*dims, shift=0):
        at, size = used[0] + shift, 4
        for n in dims: size *= n
        used[0] += -(-size // 64) * 64 + 64
        shape = (i64 * len(dims))(*dims)
        return p(base.aclCreateTensor(shape, len(dims), 0, None, 0, 2, shape, len(dims), at))

    def phase1(q, k, v, m, l, out, size=None, executor=None):
        null = p(None)
        return ops.aclnnFlashAttentionScoreGetWorkspaceSize(
            q, k, v, null, null, null, null, null, d(1), d(1), i64(99), i64(99), i64(2), s(b"BSH"), i64(0), i64(0),
            m, l, null, out, size, executor)

    def phase2(size, executor, workspace=True):
        memory = ctypes.create_string_buffer(size.value)
        keep.append(memory)
        return ops.aclnnFlashAttentionScore(memory if workspace else None, ctypes.c_uint64(size.value), executor, p(None))

    keep = []
    size, executor = ctypes.c_uint64(), p()
    out = ctypes.byref(size), ctypes.byref(executor)
    good = lambda: (tensor(1, 4, 8), tensor(1, 4, 8), tensor(1, 4, 8), tensor(1, 2, 4, 8), tensor(1, 2, 4, 8), tensor(1, 4, 8))
    args = good()
"""


def _bare(body: str, check: bool = True) -> subprocess.CompletedProcess:
    return _run(textwrap.dedent(_BARE) + textwrap.dedent(body), str(emulator.directory()), check=check)


def test_a_thread_needs_a_device_and_errors_are_read_once():
    _bare("""
    assert runtime.aclInit(None) == 0 and runtime.aclInit(None) == 100002
    runtime.aclGetRecentErrMsg()
    assert phase1(*args, *out) == 107002
    assert b"aclrtSetDevice" in runtime.aclGetRecentErrMsg() and runtime.aclGetRecentErrMsg() is None
    assert runtime.aclrtSetDevice(0) == 0
    assert phase1(p(None), *args[1:], *out) == 161001
    assert phase1(args[0], args[1], args[2], args[3], args[4], tensor(1, 4, 9), *out) == 161001
    assert phase1(tensor(1, 4, 9), *args[1:], *out) == 161002
    assert phase1(*args, *out) == 0 and size.value >= 16 << 20
    assert phase2(size, executor, workspace=False) == 161001
    assert phase1(*args, *out) == 0 and phase2(size, executor) == 0
    assert runtime.aclrtSynchronizeStream(None) == 0
    """)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("phase1(*args, *out); phase2(size, executor); phase2(size, executor)", "was destroyed before"),
        ("phase1(p(None), *args[1:], *out); size.value = 9; phase2(size, executor)", ""),
        ("base.aclDestroyTensor(args[0]); phase1(*args, *out)", "tensor query was destroyed before"),
        ("phase1(*args, *out); base.aclDestroyTensor(args[0])", "destroyed between phase 1 and phase 2"),
        ("phase1(tensor(1, 4, 8, shift=4), *args[1:], *out)", "does not start at a multiple of 32 bytes"),
        (
            "phase1(*args, *out); size.value -= 1; phase2(size, executor)",
            "workspace smaller than phase 1 asked",
        ),
        ("runtime.aclrtFree(p(start))", "aclrtFree of memory that aclrtMalloc did not give"),
    ],
    ids=["twice", "after-failure", "dead-tensor", "between", "misaligned", "small-workspace", "free"],
)
def test_aborts(body, message):
    done = _bare("runtime.aclrtSetDevice(0)\n" + body, check=False)
    assert done.returncode < 0, done.stdout + done.stderr
    assert message in done.stderr
