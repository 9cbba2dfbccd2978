"""Compiles every variant of every kernel that calls launch, for GPUs that need not be there. Run as a script.

``launches.py`` says which variants there are. Those of every combination of dtypes, precision and flags pass the
compiler's front end, which is where such things show that do not go together; of those that differ in sizes alone, so
many that every two values of a kernel's arguments meet in one of them. ``--all`` takes all, for Ampere too.
``--machine-code`` goes on to the assembler, with as many as have each value once, and looks whether they fit shared
memory.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import multiprocessing
import os
import pkgutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction

from launches import CAPABILITIES, Capability, Variant, asked_by_conformance_tests, every_call, recorded
from logitless.backends import triton as package

# Bytes of shared memory that a block of threads may have.
SHARED_MEMORY = {(8, 0): 163 << 10, (8, 9): 99 << 10, (9, 0): 227 << 10}
PARTS = 8


def kernels() -> set[str]:
    """Names of all kernels of the package."""
    found: set[str] = set()
    for module in pkgutil.iter_modules(package.__path__):
        values = vars(importlib.import_module(f"{package.__name__}.{module.name}"))
        found |= {name for name, value in values.items() if name.endswith("_kernel") and isinstance(value, JITFunction)}
    return found


# --- which ------------------------------------------------------------------------------------------------------------


def record_part(capability: Capability, part: int) -> tuple[list[Variant], int]:
    """The variants of one call in so many."""
    torch.set_num_threads(1)
    return recorded(capability, itertools.islice(every_call(), part, None, PARTS))


def values(variant: Variant) -> list[tuple]:
    """What a variant is told by: its kernel's arguments and their types or constants."""
    constants = dict(variant.constants)
    return [(variant.kernel, name, constants.get(name, kind)) for name, kind in variant.types]


def covering(variants: Iterable[Variant], together: int) -> list[Variant]:
    """Some of the variants, in which as many values of one kernel's arguments meet as meet in all of them."""
    seen: set[tuple] = set()
    chosen = []
    for variant in variants:
        meetings = {*itertools.combinations(values(variant), together)}
        if not meetings <= seen:
            seen |= meetings
            chosen.append(variant)
    return chosen


def of_every_form(variants: Iterable[Variant]) -> list[Variant]:
    """One variant of each form."""
    return [*{variant.form: variant for variant in variants}.values()]


def unknown(asked: Iterable[Variant], known: Iterable[Variant]) -> list[Variant]:
    """Variants that were asked for and differ from all known ones in more than sizes."""
    forms = {variant.form for variant in known}
    return [variant for variant in asked if variant.form not in forms]


# --- compiling --------------------------------------------------------------------------------------------------------


def compile_variant(capability: Capability, variant: Variant, machine_code: bool) -> str | None:
    """To Triton's intermediate representation, or to machine code; the reason why that fails, or None."""
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    backend = make_backend(target)
    kernel = getattr(importlib.import_module(variant.module), variant.kernel)
    place = {parameter.name: index for index, parameter in enumerate(kernel.params)}
    constants = {(place[name],): value for name, value in variant.constants}
    aligned = {(index,): [["tt.divisibility", 16]] for index in variant.aligned}
    source = ASTSource(kernel, dict(variant.types), constants, aligned)
    options = backend.parse_options(dict(variant.options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    try:
        module = source.make_ir(target, options, functions, backend.get_module_map(), context)
        if not machine_code:
            return None
        metadata, stages = {"target": target, **vars(options)}, {}
        backend.add_stages(stages, options, source.language)
        for stage in stages.values():
            module = stage(module, metadata)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__ or cause
        return repr(cause)[:200]
    if metadata["shared"] > SHARED_MEMORY[capability]:
        return f"{metadata['shared']} bytes of shared memory, of {SHARED_MEMORY[capability]}"
    return None


def failures(
    pool: ProcessPoolExecutor, capability: Capability, variants: list[Variant], machine_code: bool = False
) -> Iterator[tuple[Variant, str]]:
    """Variants that do not compile, and why."""
    arguments = [capability] * len(variants), variants, [machine_code] * len(variants)
    for variant, reason in zip(variants, pool.map(compile_variant, *arguments, chunksize=16), strict=True):
        if reason is not None:
            yield variant, reason


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every variant for every generation")
    parser.add_argument("--machine-code", action="store_true", help="to machine code, variants with each value once")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, and there is nothing to compile then")
    capabilities = CAPABILITIES if arguments.all or arguments.machine_code else CAPABILITIES[1:]
    reasons: dict[tuple, list[Variant]] = {}
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        for capability in capabilities:
            parts = [*pool.map(record_part, [capability] * PARTS, range(PARTS))]
            known = [*dict.fromkeys(variant for variants, _ in parts for variant in variants)]
            calls = sum(made for _, made in parts)
            for variant in unknown(asked_by_conformance_tests(capability), known):
                reasons.setdefault((capability, variant.kernel, "only other calls ask for it"), []).append(variant)
            chosen = known
            if arguments.machine_code:
                chosen = covering(known, 1)
            elif not arguments.all:
                forms = of_every_form(known) if capability == CAPABILITIES[-1] else []
                chosen = [*dict.fromkeys((*covering(known, 2), *forms))]
            for variant, reason in failures(pool, capability, chosen, arguments.machine_code):
                reasons.setdefault((capability, variant.kernel, reason), []).append(variant)
            print(f"{capability}: {calls} calls launch {len(known)} variants, of which {len(chosen)} are compiled")
    for name in kernels() - {variant.kernel for variant in known}:
        reasons[capability, name, "no call launches it"] = []
    for (capability, kernel, reason), variants in reasons.items():
        print(f"{capability}: {kernel}: {reason}")
        print(*(f"    {variant}" for variant in variants[:2]), f"    and {len(variants[2:])} others", sep="\n")
    return bool(reasons)


if __name__ == "__main__":
    sys.exit(main())
