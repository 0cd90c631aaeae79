"""`python -m jax_fa doctor`, and what it finds: broken installations, environment variables that cannot be meant."""

import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jax_fa
from jax_fa import backends, doctor
from jax_fa.backends import native, variables
from jax_fa.backends.ascend import installation
from jax_fa.doctor import numbers, usable

ROOT = Path(jax_fa.__file__).parents[1]
X = jnp.ones((1, 4, 2, 8))
needs_native = pytest.mark.skipif(native.missing is not None, reason="needs the native extension")


def _report(capsys, *argv: str) -> tuple[int, str]:
    return doctor.main(argv), capsys.readouterr().out


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in [
        name for name in os.environ if name.startswith("JAX_FA_") and name != "JAX_FA_CANN_EMULATOR"
    ]:
        monkeypatch.delenv(name)


@needs_native
def test_a_sound_installation(capsys):
    code, text = _report(capsys)
    assert code == 0, text
    assert f"jax_fa            {jax_fa.__version__}, from " in text
    assert native.extension.__file__ in text and native.extension.cpu_tuning() in text
    assert "cpu on cpu, float32" in text and "xla on cpu, bfloat16" in text and "WRONG" not in text
    for backend in backends.every():
        assert f"\n  {backend.name} " in text
    for name in ("cpu", "xla"):
        assert re.search(rf"\n  {name} +usable on cpu: float32, bfloat16, float16", text)
    assert text.endswith("What to do next\n  - Nothing: all is well.\n") or "jax[cuda13]" in text


def test_a_wrong_result_is_found(capsys, monkeypatch):
    right = numbers._run
    monkeypatch.setattr(usable, "DTYPES", ("float32",))
    monkeypatch.setattr(numbers, "_run", lambda *args: [1.001 * x for x in right(*args)])
    code, text = _report(capsys)
    assert code == 1 and re.search(r"xla on cpu, float32 +1.0e-03 WRONG\n", text)
    assert "  - xla on cpu, float32 is wrong: its error is 1.0e-03." in text


def test_a_call_that_fails_is_told(capsys, monkeypatch):
    monkeypatch.setattr(usable, "DTYPES", ("float32",))
    monkeypatch.setattr(numbers, "_run", lambda *args: 1 / 0)
    code, text = _report(capsys)
    assert code == 1 and "failed: ZeroDivisionError" in text


def test_without_kernels_there_is_advice_and_no_error(capsys, monkeypatch):
    monkeypatch.setattr(native, "extension", None)
    monkeypatch.setattr(native, "missing", "No module named 'jax_fa._native'")
    monkeypatch.setattr(jax_fa, "__file__", "/nowhere/jax_fa/__init__.py")
    code, text = _report(capsys, "--no-check")
    assert code == 0 and "compiled kernels  none" in text
    assert "Without compiled kernels, calls on CPU run on xla, several times slower: " in text


@pytest.mark.parametrize("where", ["file", "/proc"])
def test_a_cache_that_cannot_be_written(where, capsys, tmp_path):
    """A directory below a file; one of a file system that takes no files, whatever its permissions are."""
    (tmp_path / "file").touch()
    if not (tmp_path / where).exists():
        pytest.skip(f"the system has no {where}")
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / where / "cache"))
        code, text = _report(capsys, "--no-check")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert (
        code == 1
        and "(not writable)" in text
        and "set jax_compilation_cache_dir to another directory" in text
    )


def test_a_name_that_nothing_reads_is_told(capsys, monkeypatch):
    monkeypatch.setenv("JAX_FA_STRCT", "1")
    code, text = _report(capsys, "--no-check")
    assert code == 1 and "  - jax_fa reads no environment variable JAX_FA_STRCT; did you mean" in text


WRONG = {
    "JAX_FA_STRICT": ("yes", "one of 0, 1"),
    "JAX_FA_CANN_ABI": ("medium", "one of long, short"),
    "JAX_FA_CANN_EMULATOR": ("/no/such/directory", "a directory that exists"),
    "JAX_FA_CPU_CACHES": (
        "32K,512K,16M",
        "bytes of the first, second and third cache, such as 32768,524288,16777216",
    ),
    "JAX_FA_CPU_ISA": ("avx513", "one of the instruction sets that this machine has: "),
}


def test_a_path_without_cann_is_told(monkeypatch):
    nothing = installation.Library("no CANN runtime was found", None, None, None, None, False, (), ())
    monkeypatch.setattr(installation, "library", lambda: nothing)
    assert not usable.backends().hints
    monkeypatch.setenv("JAX_FA_CANN_PATH", "/nowhere")
    assert usable.backends().hints == [
        "JAX_FA_CANN_PATH is set, and no CANN runtime that can be used is there."
    ]


@needs_native
@pytest.mark.parametrize("name", WRONG)
def test_a_value_that_cannot_be_meant(name, capsys, monkeypatch):
    value, allowed = WRONG[name]
    monkeypatch.setenv(name, value)
    for call in (jax_fa.flash_attention, jax_fa.dot_product_attention):
        with pytest.raises(ValueError, match="environment variable") as raised:
            call(X, X, X)
        text = str(raised.value)
        assert (
            text.startswith(f"the environment variable {name} must be {allowed}")
            and f"got {value!r}." in text
        )
    code, report = _report(capsys)
    assert code == 1 and text[1:] in report and "Results" not in report


def test_every_variable_has_a_wrong_value_here_or_takes_any():
    assert set(variables._CHECKS) - set(WRONG) == {"JAX_FA_CANN_PATH"}


def test_every_variable_is_documented():
    read = set(variables._CHECKS)
    page = ROOT / "docs" / "install.md"
    if not page.exists():
        page = Path(__file__).parents[1] / "docs" / "install.md"
    assert all(f"`{name}" in page.read_text() for name in read)


def _import(code: str = "import jax_fa", **environment: str) -> str:
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-W",
            "always",
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}",
        ],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_name_that_nothing_reads_is_warned_of():
    said = _import(JAX_FA_CPU_IAS="avx2", JAX_FA_ZZZZZZ="1")
    assert "jax_fa reads no environment variable JAX_FA_CPU_IAS; did you mean JAX_FA_CPU_ISA?" in said
    assert "jax_fa reads no environment variable JAX_FA_ZZZZZZ; those there are: JAX_FA_CANN_ABI, " in said


@needs_native
def test_an_extension_of_another_version_is_not_used():
    """Nor one that lacks what is asked of it; a sentence says so, and calls are right."""
    other = (
        "import types; from importlib import import_module; "
        "fake = types.ModuleType('jax_fa._native'); fake.__file__ = 'old.so'; {}"
        "sys.modules['jax_fa._native'] = fake; import jax_fa, jax.numpy as jnp; "
        "from jax_fa.backends import native; assert native.extension is None; "
        "x = jnp.ones((1, 4, 1, 8)); assert (jax_fa.flash_attention(x, x, x) == x).all()"
    )
    for version, told in (("fake.version = lambda: '0.0.1'; ", "0.0.1"), ("", "None")):
        said = _import(other.format(version))
        assert (
            "RuntimeWarning: jax_fa runs without its compiled kernels: old.so was built from other sources: its version "
            f"is {told}, not {jax_fa.__version__}. Reinstall jax_fa."
        ) in said


@pytest.mark.parametrize("cut_off", [False, pytest.param(True, marks=needs_native)])
def test_an_extension_that_cannot_be_loaded_is_warned_of(cut_off, tmp_path):
    """Also one of which only the beginning was written, of which the loader would die."""
    content = Path(native.extension.__file__).read_bytes()[:5000] if cut_off else b"half of a file"
    shutil.copytree(
        Path(jax_fa.__file__).parent,
        tmp_path / "jax_fa",
        ignore=shutil.ignore_patterns("_native*", "emulator"),
    )
    (tmp_path / "jax_fa" / f"_native{EXTENSION_SUFFIXES[0]}").write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import jax_fa"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0
    assert "RuntimeWarning: jax_fa runs without its compiled kernels: " in done.stderr
    assert "Reinstall jax_fa." in done.stderr
