"""From a Python function over tensors to a native program on disk.

Numba compiles a program once; its object code is kept in a cache folder, and every later process
loads that through llvmlite alone, without importing Numba. A program takes one argument, the
address of a table of int64: for each group of tensors the symbolic sizes (N, D, …), then the address
of each tensor. `groups.py` turns the table back into groups of arrays inside the compiled code, so shapes
are compile-time constants wherever the config fixes them, and nothing is reference-counted: the code is
compiled without Numba's runtime and could not allocate if it wanted to.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import llvmlite
import llvmlite.binding as llvm
import numpy as np

from tapeless.errors import ConfigError, Notice
from tapeless.layout import Tensor
from tapeless.ops.cpu import code_cache
from tapeless.team import run_together

# The C library's way of giving the processor to another thread.
YIELD = "SwitchToThread" if sys.platform == "win32" else "sched_yield"

# Reordering sums is allowed, forgetting that NaN and infinity exist is not.
FASTMATH = {"reassoc", "contract", "nsz", "arcp", "afn"}

# What compiled code may call beside the routines: the C library's mathematics, which every process has.
LIBRARY = {
    "exp",
    "expf",
    "log",
    "logf",
    "tanh",
    "tanhf",
    "sqrt",
    "sqrtf",
    "memset",
    "memcpy",
    "memmove",
    YIELD,
}


# Held while code is compiled and loaded: LLVM, Numba and what they keep are shared by all engines. A fork
# waits for it, since a child process would find it, and theirs, held for ever.
_compiling = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_compiling.acquire, after_in_parent=_compiling.release, after_in_child=_compiling.release
    )


class Group(NamedTuple):
    """One argument of a program: a NamedTuple of tensors."""

    name: str
    tensors: tuple[Tensor, ...]

    @property
    def symbols(self) -> list[str]:
        """The symbolic sizes of its tensors."""
        return sorted({s for t in self.tensors for s in t.shape if isinstance(s, str)})

    @property
    def size(self) -> int:
        """Numbers of its part of a table."""
        return len(self.symbols) + len(self.tensors)


class Program:
    """A compiled function over groups of tensors.

    `key` names everything the code depends on besides the package's source and the processor;
    `build` makes the Python function to compile, and is only called when the cache has no code.
    """

    def __init__(
        self, groups: Sequence[Group], key: str, build: Callable[[], Callable], notice: Callable[[], None]
    ):
        self._groups = groups

        code = cached(key, lambda: compile_object(groups, build()), notice)
        link_routines(code)
        address = _load(code, "tapeless_entry")
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_int64)(address)
        self._tables: dict[int, tuple[Sequence[Any], np.ndarray]] = {}  # each thread's last, and for what

    def __call__(self, *arguments: Any) -> None:
        self._call(self._table(0, arguments).ctypes.data)

    def together(self, calls: Sequence[Sequence[Any]]) -> None:
        """Several calls at once, each on a thread of its own."""
        tables = [self._table(k, arguments).ctypes.data for k, arguments in enumerate(calls)]
        run_together([partial(self._call, table) for table in tables])

    def _table(self, k: int, arguments: Sequence[Any]) -> np.ndarray:
        last = self._tables.get(k)
        if last is None or any(a is not b for a, b in zip(arguments, last[0], strict=True)):
            last = self._tables[k] = arguments, self._make_table(arguments)
        return last[1]

    def _make_table(self, arguments: Sequence[Any]) -> np.ndarray:
        sizes: dict[str, int] = {}
        table: list[int] = []
        for group, views in zip(self._groups, arguments, strict=True):
            for tensor, array in zip(group.tensors, views, strict=True):
                _check(group, tensor, array, sizes)
            table += [sizes[s] for s in group.symbols] + [array.ctypes.data for array in views]
        return np.array(table, np.int64)


def _check(group: Group, tensor: Tensor, array: np.ndarray, sizes: dict[str, int]) -> None:
    """Native code trusts its table, so everything in it is checked here."""
    dtype = "float32" if tensor.dtype == "float" else tensor.dtype
    ok = array.dtype == dtype and array.flags.c_contiguous and array.ndim == len(tensor.shape)
    if ok:
        for want, got in zip(tensor.shape, array.shape, strict=True):
            ok = ok and got == (sizes.setdefault(want, got) if isinstance(want, str) else want)
    if not ok:
        raise TypeError(
            f"{group.name}.{tensor.name}: expected {dtype} {tensor.shape}, got {array.dtype} {array.shape}"
        )


# ---------------------------------------------------------------- compiling


@cache
def check_compiler() -> None:
    """Raise `ConfigError` where Numba does not load, or is told not to compile."""
    with warnings.catch_warnings(record=True) as caught:
        try:
            import numba
        except Exception as error:  # its settings are read, and checked, by many modules
            raise ConfigError(
                f"Numba, which compiles for the cpu engine, does not load: {error} If one of the environment "
                "variables NUMBA_… is the reason, unset it; the reference engine does without Numba."
            ) from error
    for warning in caught:
        # Of a setting that it does not understand, Numba would show a traceback.
        warnings.warn(Notice(str(warning.message).splitlines()[0]), stacklevel=2)
    settings: Any = numba.config
    if settings.DISABLE_JIT:
        raise ConfigError(
            "NUMBA_DISABLE_JIT keeps Numba from compiling for the cpu engine: unset it, or use the reference "
            "engine."
        )


def jit(function: Callable, **options: Any) -> Any:
    """`function` as a Numba function that other compiled functions may call; it becomes part of its
    callers, where shapes are constants."""
    import numba

    njit: Any = numba.njit  # some of these options are not in its type stub
    return njit(
        fastmath=FASTMATH,
        error_model="numpy",
        _nrt=False,
        forceinline=True,
        no_cpython_wrapper=True,
        no_cfunc_wrapper=True,
        debug=False,
        pipeline_class=_pipeline(),
        **options,
    )(function)


@cache
def _pipeline() -> Any:
    """Numba's compiler up to LLVM's language. By itself it would go on to optimise every function and
    make machine code of it; here all of them become one program, for which `_emit` does that once."""
    import numba
    from llvmlite.binding.newpassmanagers import create_new_function_pass_manager
    from numba.core.compiler import CompilerBase, DefaultPassBuilder
    from numba.core.compiler_machinery import register_pass
    from numba.core.typed_passes import NativeLowering

    # Enough that the whole stays small: Numba keeps every variable in memory.
    simplify = create_new_function_pass_manager()
    simplify.add_sroa_pass()
    simplify.add_simplify_cfg_pass()
    simplify.add_instruction_combine_pass()
    simplify.add_simplify_cfg_pass()
    builder = llvm.create_pass_builder(_target_machine(), llvm.create_pipeline_tuning_options())

    def simplify_functions(module):
        module.data_layout = str(_target_machine().target_data)
        for function in module.functions:
            if not function.is_declaration:
                simplify.run(function, builder)

    @register_pass(mutates_CFG=True, analysis_only=False)
    class Lowering(NativeLowering):
        _name = "tapeless_lowering"

        def run_pass(self, state):
            library = state.targetctx.codegen().create_library(state.func_id.func_qualname)
            steps = ("_optimize_functions", "_optimize_final_module", "_finalize_final_module")
            if not all(hasattr(library, name) for name in (*steps, "_finalized")):
                raise RuntimeError(f"numba {numba.__version__} optimises in another way than tapeless knows")
            library._optimize_functions = simplify_functions
            library._optimize_final_module = lambda: None
            library._finalize_final_module = partial(setattr, library, "_finalized", True)
            state.library = library
            state.flags.no_compile = True
            super().run_pass(state)
            library.finalize()  # links what it calls
            # Callers find a function by its machine code as a Python built-in, which must be unique.
            state["cr"] = state["cr"]._replace(cfunc=[].append)
            state.targetctx.insert_user_function(state["cr"].cfunc, state["cr"].fndesc, [library])
            return True

    # Passes for what no op has (closures, exceptions, array expressions, …), each of which would analyse
    # every function anew.
    unused = {
        "WithLifting",
        "InlineClosureLikes",
        "RewriteDynamicRaises",
        "MakeFunctionToJitFunction",
        "LiteralUnroll",
        "LiteralPropagationSubPipelinePass",
        "InlineOverloads",
        "NopythonRewrites",
    }

    class Pipeline(CompilerBase):
        def define_pipelines(self):
            manager = DefaultPassBuilder.define_nopython_pipeline(self.state)
            manager.passes = [
                (Lowering if each is NativeLowering else each, why)
                for each, why in manager.passes
                if each.__name__ not in unused
            ]
            manager.finalize()
            return [manager]

    return Pipeline


def compile_object(groups: Sequence[Group], function: Callable) -> bytes:
    """The object code of `tapeless_entry(table)`, which calls `function` on the table's groups."""
    from tapeless.ops.cpu.groups import make_bind

    bind = make_bind(groups)

    def entry(table):
        function(bind(table))

    return _emit(entry, "tapeless_entry", 1)


def _emit(function: Callable, name: str, arguments: int) -> bytes:
    """The object code of a C function of this name that calls `function` with int64 arguments."""
    import numba

    from tapeless.ops.cpu.routines import ROUTINES, symbol

    dispatcher = jit(function)
    signature = (numba.int64,) * arguments
    dispatcher.compile(signature)
    compiled = dispatcher.overloads[signature]
    # Numba's own C wrapper calls back into Python to report errors. This code has none to report.
    inner = compiled.fndesc.mangled_name
    parameters = ", ".join(f"i64 %a{i}" for i in range(arguments))
    wrapper = f"""
        declare i32 @{inner}(ptr, ptr{", i64" * arguments})
        define void @{name}({parameters}) {{
            %result = alloca ptr
            %error = alloca ptr
            call i32 @{inner}(ptr %result, ptr %error, {parameters})
            ret void
        }}
    """
    module = compiled.library._final_module
    module.link_in(llvm.parse_assembly(wrapper))
    for f in module.functions:
        if not f.is_declaration and f.name != name:
            f.linkage = "internal"  # nobody else calls it: inlined and dropped
    machine = _target_machine()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    outside = {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")}
    if strange := sorted(outside - LIBRARY - {symbol(name) for name in ROUTINES}):
        raise RuntimeError(f"compiled code calls {', '.join(strange)}, which another process will not have")
    return machine.emit_object(module)


def link_routines(code: bytes) -> None:
    """Make the routines that this object code calls known to LLVM."""
    from tapeless.ops.cpu.routines import ROUTINES, symbol

    for name in ROUTINES:
        if symbol(name).encode() + b"\0" in code:
            link_routine(name)


def link_routine(name: str) -> int:
    """The routine's address, known to LLVM; compiled once for all programs, and all processes."""
    with _compiling:
        return _linked(name)


@cache
def _linked(name: str) -> int:
    from tapeless.ops.cpu.routines import ROUTINES, make_routine, symbol

    def compile_it() -> bytes:
        return _emit(make_routine(name), symbol(name), len(ROUTINES[name]))

    address = _load(cached(f"routine-{name}", compile_it), symbol(name))
    llvm.add_symbol(symbol(name), address)
    return address


# ---------------------------------------------------------------- the processor


def _target_machine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    cpu, features = processor()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=cpu, features=features, opt=3, jit=True)


def processor() -> tuple[str, str]:
    """Name and feature list of the processor to compile for. As in Numba, the environment variables
    NUMBA_CPU_NAME and NUMBA_CPU_FEATURES override what the machine is.

    Raises `ConfigError` for a list that LLVM would not read.
    """
    name = os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if features is None:
        found = llvm.get_host_cpu_features()
        if is_arm():  # NEON is part of it, whether or not LLVM could ask the system
            found["neon"] = True
        return name, found.flatten()
    if strange := [word for word in features.split(",") if word and word[0] not in "+-"]:
        raise ConfigError(f"NUMBA_CPU_FEATURES must be a list like +avx2,-fma: {strange[0]!r} has no sign.")
    return name, features


def is_arm() -> bool:
    """Whether this is a 64-bit ARM processor."""
    return llvm.get_default_triple().startswith(("aarch64", "arm64"))


def simd() -> str:
    """The widest vectors that compiled code uses here, for people: "AVX-512", "AVX2", "NEON", "SSE2"."""
    features = processor()[1].split(",")
    for flag, label in (
        ("avx512f", "AVX-512"),
        ("avx2", "AVX2"),
        ("avx", "AVX"),
        ("neon", "NEON"),
        ("sse2", "SSE2"),
    ):
        if f"+{flag}" in features:
            return label
    return "scalar"


def bf16_path() -> str:
    """How products of bfloat16 are computed here, for people: "AVX512-BF16", or "emulated"."""
    return "AVX512-BF16" if "+avx512bf16" in processor()[1].split(",") else "emulated"


# ---------------------------------------------------------------- keeping and loading


def cached(key: str, make: Callable[[], bytes], notice: Callable[[], None] = lambda: None) -> bytes:
    """The object code kept under this key (which begins with a word for the file's name), made and kept if it
    is not there. `notice` is called before that, without the lock. Raises `ConfigError` where nothing can be
    compiled."""
    from importlib.metadata import version

    # Bounds checks are the one setting of Numba that changes code and cannot be given with a function.
    checks = os.environ.get("NUMBA_BOUNDSCHECK")
    machine = llvm.get_default_triple(), *processor()
    file = code_cache.file_name(key, version("numba"), llvmlite.__version__, *machine, checks)
    code = code_cache.find(file)
    if code is None:
        check_compiler()
        notice()
        with _compiling:
            code = code_cache.find(file)  # another thread may have made it meanwhile
            if code is None:
                code = make()
                code_cache.keep(file, code)
    return code


_ENGINES: list[Any] = []  # LLVM execution engines own the code; they live as long as the process


def _load(code: bytes, symbol: str) -> int:
    """The address of a function of this object code."""
    with _compiling:
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine())
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        _ENGINES.append(engine)
        return engine.get_function_address(symbol)
