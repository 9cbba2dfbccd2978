"""Takes every kernel through the front end of Triton's compiler, for a GPU that need not be there. Run as a script."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import sys
from collections.abc import Iterator

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from logitless.backends import triton as package

SIZES = {
    "BM": 128,
    "BN": 256,
    "BK": 64,
    "GROUP": 16,
    "BLOCK": 256,
    "ROWS": 16,
    "COLUMNS": 64,
    "STEP": 4096,
    "BLOCKS": 64,
    "STAGES": 3,
    "TILE": 64,
    "BD": 64,
    "BP": 64,
    "GROUPS": 16,
    "SEGMENT": 64,
    "LOUD": 32,
    "SLOTS": 128,
    "PADDING": 16,
    "SEGMENTS": 16,
}
PRECISION = "ieee"
DESCRIPTORS = {
    "scan_kernel": {"hidden": "[128,64]", "weight": "[256,64]", "softmax": "[1,128,256]"},
    "window_gradient_kernel": {"hidden": "[128,64]", "weight": "[256,64]", "gradient": "[128,256]"},
    "pair_gradient_kernel": {"weight": "[256,64]"},
    "pair_sums_kernel": {"weight": "[256,64]"},
    "pair_hidden_gradient_kernel": {"weight": "[256,64]"},
    "pair_hidden_gradient_in_order_kernel": {"weight": "[256,64]"},
}
TENSORS = {
    "*i1": ("counted",),
    "*i8": ("own",),
    "*fp8e4nv": ("values",),
    "*i32": (
        *("order", "count", "rank", "largest_index", "packed_target", "target"),
        *("bits", "counts", "pairs", "starts", "tile_starts", "tile_blocks"),
        "kept_blocks",
    ),
    "*i64": ("prediction", "step_sums", "channels"),
    "*fp64": ("offsets",),
    "*bf16": ("softmax", "gradient", "source", "result", "products", "hidden", "matrix"),
}
TYPES = {name: kind for kind, names in TENSORS.items() for name in names}
WIDE_TARGETS = ("order_rows_kernel", "row_kernel", "pair_gradient_kernel", "pair_sums_kernel")
WIDE_RESULTS = ("pair_hidden_gradient_kernel", "pair_hidden_gradient_in_order_kernel")
NUMBERS = ("uniform_smoothing", "uniform", "scale", "softcap", "inverse_threshold")
INTEGERS = (
    *("rows", "rows_here", "first_row", "columns", "vocabulary", "first_column", "end_column", "window", "blocks"),
    *("hidden_size", "programs", "stride", "table_stride", "softmax_stride", "gradient_stride", "source_stride"),
    *("hidden_stride", "segment", "most", "tokens", "groups", "segments", "width", "taken", "padding", "slots"),
)
TARGET = GPUTarget("cuda", 90, 32)


def kernels() -> Iterator[tuple[str, triton.JITFunction]]:
    for module in pkgutil.iter_modules(package.__path__):
        found = vars(importlib.import_module(f"{package.__name__}.{module.name}"))
        yield from ((name, value) for name, value in found.items() if name.endswith("_kernel"))


def front_end(kernel: triton.JITFunction, signature: dict[str, str], constants: dict[str, object]) -> None:
    """From source to Triton's intermediate representation."""
    backend = make_backend(TARGET)
    names = [parameter.name for parameter in kernel.params]
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    options = backend.parse_options({"num_warps": 8, "num_stages": 3})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    source.make_ir(TARGET, options, functions, backend.get_module_map(), context)


def variants(name: str, kernel: triton.JITFunction) -> Iterator[tuple[str, dict[str, str], dict[str, object]]]:
    """Descriptions, types and constants: each flag off, on and alone on; each integer and number as a constant of 1."""
    types, flags = {}, []
    for parameter in kernel.params:
        argument = parameter.name
        if parameter.is_constexpr:
            types[argument] = "constexpr"
            if argument not in SIZES and argument != "PRECISION":
                flags.append(argument)
        elif argument in DESCRIPTORS.get(name, {}):
            types[argument] = f"tensordesc<bf16{DESCRIPTORS[name][argument]}>"
        elif argument in INTEGERS or argument in NUMBERS:
            types[argument] = "i32" if argument in INTEGERS else "fp32"
        else:
            types[argument] = TYPES.get(argument, "*fp32")
    if name in WIDE_TARGETS:
        types["target"] = "*i64"
    if name in WIDE_RESULTS:
        types["result"] = "*fp32"
    integers = [argument for argument, kind in types.items() if kind in ("i32", "fp32")]
    fixed = {argument: SIZES.get(argument, PRECISION) for argument in types if types[argument] == "constexpr"}
    settings = {"all on": dict.fromkeys(flags, True), "all off": dict.fromkeys(flags, False)}
    settings |= {f"{flag} on": {**dict.fromkeys(flags, False), flag: True} for flag in flags}
    settings |= {f"{flag} off": {**dict.fromkeys(flags, True), flag: False} for flag in flags}
    for (how, setting), one in itertools.product(settings.items(), [None, *integers]):
        # With every flag on, but for the one that leaves out all the others' code.
        if one is not None and how != ("RANK off" if "RANK" in flags else "all on"):
            continue
        if one is not None and one.endswith("stride"):  # rows are padded
            continue
        as_constant = {} if one is None else {one: 1}
        yield (
            how if one is None else f"{how}, {one} = 1",
            types | dict.fromkeys(as_constant, "constexpr"),
            fixed | setting | as_constant,
        )


def main() -> int:
    count, failures = 0, {}
    for name, kernel in kernels():
        for description, types, constants in variants(name, kernel):
            count += 1
            try:
                front_end(kernel, types, constants)
            except Exception as error:
                cause: BaseException = error
                while cause.__cause__ or cause.__context__:
                    cause = cause.__cause__ or cause.__context__ or cause
                failures.setdefault((name, repr(cause)[:200]), []).append(description)
    for (name, cause), descriptions in failures.items():
        print(f"{name}: {cause} with {'; '.join(descriptions[:4])} and {len(descriptions[4:])} others")
    print(f"{count} variants")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
