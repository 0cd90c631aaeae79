"""What every test needs: eight CPU devices, strict dtypes, small tiles, the backends that are present."""

import gc
import os
from importlib import metadata

# Read when JAX starts, hence before its import. Compiling takes nearly all the time of the tests, and half of
# it goes into LLVM's optimizations, which these small arrays do not need; flags that are given come last and win.
_FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    # Tests of memory put it back (`testing.programs.temporary_bytes`).
    "--xla_disable_hlo_passes=while-loop-invariant-code-motion",
]
# The older of XLA's two ways of compiling loops takes a third of the time. Newer releases know no such flag.
if metadata.version("jaxlib").startswith("0.10."):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
# Pallas' interpreter of GPU kernels has its threads wait for one another in XLA's pool, which has one per core, or
# per device. For this process alone: those that tests start have pools as they would without it.
_NPROC = os.environ.get("NPROC")
os.environ["NPROC"] = _NPROC or "16"
os.environ["XLA_FLAGS"] = " ".join((*_FLAGS, os.environ.get("XLA_FLAGS", "")))

import annotations
import jax
import jaxtyping
import pytest
import tables
from hypothesis import HealthCheck, settings

annotations.install()  # before what it checks is imported

import jax_fa
from jax_fa import ascend, backends
from jax_fa.backends import native
from jax_fa.backends.ascend import installation
from jax_fa.backends.xla import tiling
from jax_fa.testing import cases

# Read when CANN is first asked for, which importing does not do.
if installation.absence() is None:
    os.environ.setdefault(installation.EMULATOR, ascend.emulator_dir())
jax.config.update("jax_numpy_dtype_promotion", "strict")
# What JAX leaves out of the tracebacks of errors takes three quarters of the time of tests that ask for them.
jax.config.update("jax_traceback_filtering", "off")
# Nobody reads which line of Python made an operation of these programs.
jax.config.update("jax_traceback_in_locations_limit", 0)
# Every example compiles: few of them, always the same, and without a clock.
settings.register_profile(
    "jax_fa",
    max_examples=10,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("jax_fa")

PLATFORM = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
if _NPROC is None:  # the pool exists now
    del os.environ["NPROC"]
# A call of up to ONE_TILE_ELEMENTS logits would be a single tile.
_SMALL = {"MIN_TILE": cases.ROWS, "MAX_ROWS": cases.ROWS, "MAX_KEYS": cases.KEYS, "ONE_TILE_ELEMENTS": 0}
_REAL = {name: getattr(tiling, name) for name in _SMALL}


# Files of which no version of Python or JAX changes a result: the arithmetic of kernels and of the operator that CANN is asked
# for, models of machines, and text. All else traces, transforms, lowers or shards, which JAX does.
_INDEPENDENT = {
    "test_accuracy",
    "test_ascend_operands",
    "test_ascend_packed",
    "test_ascend_sinks",
    "test_bench",
    "test_comparison",
    "test_cpu_benchmark",
    "test_floors",
    "test_flops",
    "test_gpu_assembly",
    "test_gpu_benchmark",
    "test_mosaic_parts",
    "test_native_operands",
    "test_native_second",
    "test_native_tangent",
    "test_properties",
    "test_quoted_errors",
    "test_scaling",
    "test_sizes",
}


# Modules, cases and caches of JAX live as long as the tests do: the garbage collector, which would go through them
# again and again, is told so once they are there, and is called less often.
gc.set_threshold(50_000, 20, 20)


def pytest_collection_finish(session) -> None:
    gc.collect()
    gc.freeze()


def pytest_addoption(parser) -> None:
    parser.addoption("--one-in", type=int, default=1, metavar="N", help="of each test one in N of its cases")


def pytest_generate_tests(metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        serving = [b.name for b in backends.every() if b.platforms is None or PLATFORM in b.platforms]
        metafunc.parametrize("backend", serving)


@pytest.hookimpl(wrapper=True)  # before marks are looked at, and after
def pytest_collection_modifyitems(config, items):
    """Leaves out a case for a backend that refuses its dtype (test_native.py holds it to the refusal), and what --one-in does."""
    kept, dropped = [], []
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        dtype = getattr(params.get("case"), "dtype", None)
        (dropped if (params.get("backend"), dtype) == ("cpu", "float64") else kept).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept
    tables.take_turns(items)
    tables.leave_slow(items)
    for item in items:
        if item.path.stem in _INDEPENDENT:
            item.add_marker(pytest.mark.independent)
    yield
    items[:], left_out = tables.one_in(config.getoption("one_in"), items)
    config.hook.pytest_deselected(items=left_out)


def pytest_report_header() -> str:
    return f"jax_fa: {jax_fa.__path__[0]}, native extension: {native.missing or 'present'}"


def _set_tiles(sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        setattr(tiling, name, size)


@pytest.fixture(scope="session", autouse=True)
def small_tiles():
    """Small tiles for all tests: compiled functions are shared, so the sizes must not change in between."""
    _set_tiles(_SMALL)
    yield
    _set_tiles(_REAL)


@pytest.fixture
def real_tiles(small_tiles):
    """The tiles of the library, for one test.

    The default device is part of the keys of JAX's caches, which so keep apart what was traced with other tiles.
    """
    _set_tiles(_REAL)
    with jax.default_device(jax.devices()[0]):
        yield
    _set_tiles(_SMALL)


@pytest.fixture
def no_type_checker():
    """Lets wrong arguments through to the library's own checks, as they are without the tests' type checker."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
