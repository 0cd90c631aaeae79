"""The CANN emulator's control symbols, and the directory that tests run against."""

import ctypes
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from jax_fa import ascend

OBJECTS = ("tensor", "int_array", "executor")


def directory() -> Path:
    return Path(ascend.emulator_dir())


@cache
def _control() -> ctypes.CDLL:
    """Of the library that this process calls: dlopen gives the same one for the same file."""
    runtime = ascend.library().runtime
    assert runtime is not None, ascend.library().error
    library = ctypes.CDLL(runtime, mode=os.RTLD_LOCAL)
    library.jaxFaEmulatorLive.restype = ctypes.c_int64
    library.jaxFaEmulatorCalls.restype = ctypes.c_int64
    library.jaxFaEmulatorLog.restype = ctypes.c_char_p
    library.jaxFaEmulatorFail.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    return library


def live(*kinds: str) -> dict[str, int]:
    return {kind: _control().jaxFaEmulatorLive(kind.encode()) for kind in kinds or OBJECTS}


def calls(function: str) -> int:
    return _control().jaxFaEmulatorCalls(function.encode())


def fail(function: str, code: int, skip: int = 0, times: int = 1) -> None:
    """Coming calls of a C function fail with the code."""
    _control().jaxFaEmulatorFail(function.encode(), code, skip, times)


def words(text: bytes) -> None:
    """What the error texts of faults end with."""
    _control().jaxFaEmulatorWords(text)


def style(newer: bool) -> None:
    """Whether what tiling refuses comes from phase 1 (newer releases of CANN) or from phase 2."""
    _control().jaxFaEmulatorStyle(int(newer))


def log() -> list[dict[str, Any]]:
    """The operator calls that were accepted since the last reset."""
    return json.loads(_control().jaxFaEmulatorLog())


def reset() -> None:
    _control().jaxFaEmulatorReset()
