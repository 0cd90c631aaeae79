"""Checks the annotations of the library while the tests run, at a fraction of what jaxtyping's own decorator takes.

That one binds the arguments of each call to the signature and remembers them, for shapes that name them; it does so
for functions without a shape too, and even for those without an annotation: a fifth of the time of the tests. Here,
only functions whose annotations have shapes are left to it.
"""

import dataclasses
import functools
import inspect
import typing

import jaxtyping

_complete = jaxtyping.jaxtyped


def _needs_no_shapes(annotation) -> bool:
    """Whether an annotation is of classes alone, which need neither shapes nor names to be looked up."""
    if isinstance(annotation, list | tuple):
        return all(map(_needs_no_shapes, annotation))
    if isinstance(annotation, str | typing.ForwardRef | typing.TypeVar | typing.ParamSpec):
        return False
    if getattr(annotation, "__module__", "").split(".")[0] == "jaxtyping":
        return False
    return _needs_no_shapes(typing.get_args(annotation))


def _hidden(function):
    """What looks for the caller of the library passes over the frames of jaxtyping's files."""
    function.__code__ = function.__code__.replace(co_filename=jaxtyping.__file__)
    return function


def _checked(function, typechecker):
    check = _hidden(typechecker(function))

    @functools.wraps(function)
    def run(*args, **kwargs):
        return (function if jaxtyping.config.jaxtyping_disable else check)(*args, **kwargs)

    return _hidden(run)


def _jaxtyped(target=None, *, typechecker):
    if target is None:
        return functools.partial(_jaxtyped, typechecker=typechecker)
    if inspect.isclass(target):
        if dataclasses.is_dataclass(target) and "__init__" in vars(target):
            target.__init__ = _jaxtyped(target.__init__, typechecker=typechecker)
        return target
    if not inspect.isfunction(target):
        return _complete(target, typechecker=typechecker)
    if not target.__annotations__:
        return target
    # beartype wants to be told what a generator yields.
    if not inspect.isgeneratorfunction(target) and _needs_no_shapes(list(target.__annotations__.values())):
        return _checked(target, typechecker)
    return _complete(target, typechecker=typechecker)


def install() -> None:
    """For what is imported from now on."""
    jaxtyping.jaxtyped = _jaxtyped
