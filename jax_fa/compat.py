"""The one place for what differs between JAX versions or is not public."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import config, core, dispatch, sharding_impls, source_info_util
from jax._src.export import _export
from jax.interpreters import mlir, partial_eval
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def varying_axes(x) -> frozenset[str]:
    """The manual mesh axes (`shard_map`) over which a value or aval differs."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary_alike(tree):
    """Marks every array as differing over the manual axes over which any of them does, as JAX's functions do.

    The transpose sums the cotangent of an array over the axes that it did not vary over.
    """
    axes = frozenset().union(*(varying_axes(x) for x in jax.tree.leaves(tree)))

    def vary(x):
        missing = tuple(sorted(axes - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree) if axes else tree


class Placement:
    """Where an aval lies: its mesh axes, in canonical order, and its manual axes."""

    def __init__(self, aval, axes: tuple[int, ...]) -> None:
        self._aval = aval
        spec = tuple(aval.sharding.spec)
        self._spec = [spec[axis] if axis < len(spec) else None for axis in axes]

    def aval(self, shape, dtype, canonical):
        """An aval placed the same way, whose dim i is canonical dim `canonical[i]`."""
        spec = PartitionSpec(*(self._spec[i] for i in canonical))
        sharding = NamedSharding(self._aval.sharding.mesh, spec)
        return self._aval.update(shape=tuple(shape), dtype=dtype, sharding=sharding, weak_type=False)


@contextlib.contextmanager
def allow_promotion():
    """A context (or decorator) in which our own code may broadcast, however strict the caller is about theirs."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@contextlib.contextmanager
def plain():
    """A context for our own code in which arrays carry no sharding in their types, whatever mesh the caller set."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    with (
        allow_promotion(),
        jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)),
    ):
        yield


@contextlib.contextmanager
def eager():
    """A context in which our own code computes at once, whatever transformation or `shard_map` surrounds it."""
    with core.eval_context(), plain():
        yield


def lower_plain(fn, ctx, *args):
    """Lowers a traceable function inside another primitive's lowering rule.

    Shardings and manual axes are types of the surrounding program; inside, everything is local and plain.
    """
    local = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
    with plain():
        return mlir.lower_fun(fn, multiple_results=True)(ctx.replace(avals_in=local), *args)


def lower_manual(fn, ctx, *args):
    """The same of a function that communicates over the manual axes of the surrounding `shard_map`."""
    context = ctx.module_context.axis_context
    manual = context.manual_axes
    types = {name: AxisType.Manual if name in manual else AxisType.Auto for name in context.mesh.axis_names}
    mesh = context.mesh.abstract_mesh.update_axis_types(types)
    sizes = [(name, context.mesh.shape[name]) for name in manual]
    with (
        allow_promotion(),
        jax.sharding.use_abstract_mesh(mesh),
        core.extend_axis_env_nd(sizes),
        config._check_vma(False),
    ):
        whole = NamedSharding(mesh, PartitionSpec())
        local = [jax.core.ShapedArray(aval.shape, aval.dtype, sharding=whole) for aval in ctx.avals_in]
        return mlir.lower_fun(fn, multiple_results=True)(ctx.replace(avals_in=local), *args)


def axis_is_manual(name) -> bool | None:
    """Whether code traced here is local along this mesh axis (inside `shard_map`); None: no such mesh axis is known."""
    mesh = jax.sharding.get_abstract_mesh()
    return name in mesh.manual_axes if name in mesh.axis_names else None


def checks_varying() -> bool:
    """Whether types say over which manual axes values differ (`shard_map(check_vma=True)`)."""
    return config._check_vma.value


def is_partitioned(ctx) -> bool:
    """Whether XLA will split the program being lowered over the devices of a known mesh.

    Not inside `shard_map` (everything is local there), and not for export (its artifact must not hold a
    Python callback).
    """
    module = ctx.module_context
    context = module.axis_context
    if module.lowering_parameters.for_export or getattr(context, "device_assignment", None) is None:
        return False
    return context.num_devices > 1 and context.abstract_mesh is not None


def see_devices_when_lowering(primitive) -> None:
    """Has jit hand the devices and their mesh to the primitive's lowering rule, which partitioning needs."""
    dispatch.prim_requires_devices_during_lowering.add(primitive)


def def_dce(primitive, rule: Callable) -> None:
    """`rule(which results are used, equation)` gives which inputs are used, and the equation that is left or None."""
    # Since JAX 0.12 a rule is also told which inputs live on.
    partial_eval.dce_rules[primitive] = lambda used, *rest: rule(used, rest[-1])


def mesh_axes(sharding, mesh) -> tuple[tuple[str, ...], ...]:
    """The mesh axes of each dim of a sharding that XLA's partitioner hands to a callback.

    Empty where it cuts a mesh axis in two (which no PartitionSpec can say): such an array counts as whole.
    """
    if sharding is None:
        return ()
    try:
        spec = sharding_impls.parse_flatten_op_sharding(sharding._to_xla_hlo_sharding(0), mesh)[0]
    except ValueError:
        return ()
    return tuple(entry if isinstance(entry, tuple) else (entry,) if entry else () for entry in spec)


def guarantee_custom_call(target: str) -> None:
    """Lets `jax.export` serialize programs that call this FFI target, which it does for JAX's own.

    That is a promise: a target's operands, results and attributes keep their meaning, and what changes gets a
    new name. Where JAX has moved its list, `jax.export` asks for its `disabled_checks` instead.
    """
    stable = getattr(_export, "_CUSTOM_CALL_TARGETS_GUARANTEED_STABLE", None)
    if isinstance(stable, set):
        stable.add(target)


def interpreting_gpu() -> bool:
    """Whether Pallas' interpreter of Mosaic GPU kernels is forced here, in which they run on CPU."""
    forced = config.pallas_tpu_interpret_mode_context_manager.value
    return type(forced).__name__ == "InterpretGPUParams"


def interpreted(fn: Callable) -> Callable:
    """A function that runs `fn` through Pallas' interpreter, from wherever it is lowered.

    The interpreter's callbacks are an effect, which rules that lower primitives cannot hold: so it runs in a callback
    of its own, in a thread in which the mode must be forced again.
    """
    from jax.experimental.pallas import mosaic_gpu

    plgpu: Any = mosaic_gpu  # JAX 0.10 has no such mode
    params = config.pallas_tpu_interpret_mode_context_manager.value

    def run(*args):
        with plgpu.force_gpu_interpret_mode(params):
            return jax.tree.map(np.asarray, jax.jit(fn)(*args))

    def call(*args):
        return jax.pure_callback(run, jax.eval_shape(fn, *args), *args)

    return call


class Frame(NamedTuple):
    file: str
    line: int
    function: str


def frames(equation) -> list[Frame]:
    """Where an equation of a jaxpr was made, innermost first, without JAX's own."""
    found = source_info_util.user_frames(equation.source_info.traceback)
    return [Frame(x.file_name, x.start_line, x.function_name) for x in found]
