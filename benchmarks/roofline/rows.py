"""Rows of results from profiles: time, bytes and FLOPs of each kernel, and whether they can be trusted."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable

from benchmarks.harness import library_seams
from benchmarks.harness.results import Row
from benchmarks.roofline.profiling import Product, Profile, Sizes

FLOAT = 4  # bytes of a float32
ROLES = ("logits", "d hidden", "d weight")  # of products
IDLE, CALL = "idle", "the whole call"

# Bytes of each kernel in one call, given its sizes and the number of launches. Each formula is that of the case in
# benchmarks/traffic/ that counts the kernel; comments name the function there.

BYTES: dict[str, Callable[[Sizes, float], float]] = {
    # _linear_cases: float32 logits read; probabilities, which have the inputs' dtype, written in the same read. Of
    # sparse gradients, which are counted where there are entries, the maxima of groups instead (_sparse_case).
    "selective_logprobs_fwd_kernel": lambda s, _: (
        s.tokens * s.vocab * FLOAT + s.cached * s.vocab * s.itemsize + bool(s.entries) * s.tokens * s.vocab / 2
    ),
    "selective_logprobs_bwd_kernel": lambda s, _: s.recomputed * s.vocab * (FLOAT + s.itemsize),
    # _label_kernels, _scaled_row: d hidden from float32, and of cached tokens a row of the weight and the hidden states
    "linear_logprobs_scaled_rows_kernel": lambda s, _: (
        s.tokens * (s.hidden * (FLOAT + s.itemsize) + 12) + s.cached * (s.hidden * 3 * s.itemsize + 24)
    ),
    # _sparse_case, without the groups that have candidates
    "linear_logprobs_candidates_kernel": lambda s, _: s.tokens * (s.vocab / 2 + 32) + 4 * s.entries,
    "linear_logprobs_select_kernel": lambda s, _: 36 * s.tokens + (4 + 4 + 8) * s.entries,
    # _sparse_case: lists by token and by column, rows of the weight and of the hidden states, both gradients read and
    # written; and _label_kernels: of each cached token an entry with its hidden states, added to rows of d weight
    "linear_logprobs_weighted_rows_kernel": lambda s, _: (
        2 * s.entries * (8 + 8 + 4 + s.hidden * s.itemsize)
        + (s.tokens - s.cached - s.recomputed) * FLOAT * s.hidden  # written where zeros were, as d weight if alone
        + s.columns * s.hidden * (2 * FLOAT if s.cached or s.recomputed else s.itemsize)
        + s.cached * (8 + 8 + 4 + s.hidden * s.itemsize)
        + s.labels * 2 * s.itemsize * s.hidden
    ),
    # _equal_labels_case: at least three places of each piece
    "linear_logprobs_open_rows_kernel": lambda s, _: (2 * s.entries + s.cached) / 64 * 3 * 8,
    # _policy_cases, at token level: two inputs and the gradient, and here a mask, in each launch
    "policy_loss_fwd_bwd_kernel": lambda s, launches: launches * s.tokens * (3 * FLOAT + 1),
}


def short_name(name: str) -> str:
    """Return a kernel's name without return type, namespaces and template arguments, but with its functor.

    Kernels that differ only in template arguments share a name.
    """
    for ours in library_seams.kernel_names():
        if re.match(ours + r"(?![A-Za-z])", name):  # a number may follow
            return ours
    if found := re.match(r"Memset|Memcpy \w+", name):
        return found[0]
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    base = re.split(r"[<(]", name, maxsplit=1)[0].rpartition("at::native::")[2]
    base = base if base.startswith("aten::") else base.rpartition("::")[2]
    inner = re.search(r"\w*Functor\w*|\w+_kernel_(?:cuda|impl)(?!_)|cutlass_\w+", name.partition("<")[2])
    return (f"{base} {inner[0]}" if inner else base)[:60]


def is_product(name: str) -> bool:
    """Tell whether a kernel's name is that of a matrix product of cuBLAS, CUTLASS or rocBLAS."""
    return re.search(r"nvjet|gemm|cutlass|xmma|Cijk_|aten::(?:add)?mm$", name, re.IGNORECASE) is not None


def is_our_kernel(short: str) -> bool:
    """Tell whether a short name is that of a kernel of this library."""
    return short in library_seams.kernel_names()


def role(product: Product, sizes: Sizes) -> str:
    """Name what a product computes: logits are [., V], d hidden sums over V, d weight is [V, .]."""
    sides = dict(zip((product.n, product.k, product.m), ROLES, strict=True))
    return sides.get(sizes.vocab, "product")


def rows_of(case: str, seen: Profile, sizes: Sizes, expected: Collection[str] = ()) -> tuple[list[Row], list[str]]:
    """Return the rows of a case, the whole call and its idle time last, and why they cannot be trusted."""
    problems = [] if seen.events else ["the profiler saw nothing"]
    ms: defaultdict[str, float] = defaultdict(float)
    launches: Counter[str] = Counter()
    for event in seen.events:
        name = short_name(event.name)
        ms[name] += event.us / 1000 / seen.calls
        launches[name] += 1
    flops: dict[str, float] = {}
    problems += _split_products(seen, sizes, ms, launches, flops)
    rows = []
    for name in sorted(ms, key=ms.__getitem__, reverse=True):
        row: Row = {"case": case, "kernel": name, "launches": launches[name] / seen.calls, "ms": ms[name]}
        row["of_call"] = row["ms"] / seen.wall_ms
        if is_our_kernel(name):
            if name in BYTES:
                row["bytes"] = BYTES[name](sizes, row["launches"])
                row["gb_s"] = row["bytes"] / row["ms"] / 1e6
            else:
                problems.append(f"nothing says how many bytes {name} moves")
        if name in flops:
            row |= with_rate(flops[name], row["ms"])
        rows.append(row)
    problems += [f"{name} was not launched" for name in expected if name not in ms]
    busy, all_launches = sum(ms.values()), sum(row["launches"] for row in rows)
    idle = {"case": case, "kernel": IDLE, "ms": seen.wall_ms - busy, "of_call": 1 - busy / seen.wall_ms}
    call = {"case": case, "kernel": CALL, "launches": all_launches, "ms": seen.wall_ms, "of_call": 1.0}
    return [*rows, idle, call | with_rate(sum(flops.values()), seen.wall_ms)], problems


def with_rate(flops: float, ms: float) -> Row:
    """Return the columns of FLOPs and their rate."""
    return {"flops": flops, "tflops": flops / ms / 1e9}


def _split_products(
    seen: Profile, sizes: Sizes, ms: dict[str, float], launches: Counter[str], flops: dict[str, float]
) -> list[str]:
    """Rename the kernels of products in ``ms`` and ``launches`` by what the product computes, and fill ``flops``.

    If shapes or kernels are missing, all products share the FLOPs of the call in proportion to their time. Returns why
    the result cannot be trusted.
    """
    products = [product for product in seen.products if product.flops]
    lost = [product for product in products if not product.kernels]
    if lost or not products:
        names = {short_name(event.name) for event in seen.events if is_product(event.name)}
        total = sum(ms[name] for name in names)
        flops |= {name: seen.flops * ms[name] / total for name in names}
        problems = [] if bool(names) == bool(seen.flops) else ["no kernel of its matrix products was found"]
        return problems + ["only some of its matrix products have kernels"] * (0 < len(lost) < len(products))
    for product in products:
        longest = max(product.kernels, key=lambda event: event.us)  # the others clear and reduce
        for event in product.kernels:
            short = short_name(event.name)
            name = f"{role(product, sizes)}: {short}"
            for key, sign in ((short, -1), (name, 1)):
                ms[key] += sign * event.us / 1000 / seen.calls
                launches[key] += sign
            if event is longest:
                flops[name] = flops.get(name, 0.0) + product.flops / seen.calls
    for short in [name for name, count in launches.items() if not count]:
        del ms[short]
    found = sum(product.flops for product in products) / seen.calls
    if abs(found - seen.flops) > 0.01 * seen.flops:
        return [f"products of {found:.4g} operations by their shapes, {seen.flops:.4g} by FlopCounterMode"]
    return []


def relate(rows: Iterable[Row], ceilings: dict[str, float]) -> None:
    """Add the share of the measured ceilings that each row reaches."""
    for row in rows:
        if "gb_s" in row:
            row["of_copy"] = row["gb_s"] / ceilings["copy_gb_s"]
        if "tflops" in row:
            row["of_product"] = row["tflops"] / ceilings["matmul_tflops"]
