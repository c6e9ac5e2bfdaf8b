"""How engines fuse and cut linears, and for how many ranks (SPEC.md, note 3)."""

from collections.abc import Container, Iterable, Iterator, Mapping

from tacq_vllm.format.stored import Layout

_FUSED_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that engines put into one module; cut along `out`: see `_row_parts`."""

_FUSED_ON_DISK = ("qkv_proj", "gate_up_proj")

_CUT_BY_COLUMNS = ("o_proj", "down_proj")
"""Cut along `in`: they take what the other linears of their block give."""


def fused_modules(linears: Iterable[str]) -> list[tuple[str, ...]]:
    """Group linears, by full name, as engines fuse them; most are alone."""
    modules: dict[tuple[str, ...], list[str]] = {}
    for name in linears:
        parent, _, leaf = name.rpartition(".")
        group = next((group for group in _FUSED_GROUPS if leaf in group), (leaf,))
        modules.setdefault((parent, *group), []).append(name)
    return [tuple(names) for names in modules.values()]


def half_quantized(module: Iterable[str], quantized: Container[str]) -> tuple[str, ...]:
    """Say which linears of a fused module are not quantized although others are.

    Args:
        module: full names of the linears that engines fuse.
        quantized: has the names of all quantized linears.

    Returns:
        A line for each linear that is left out.
    """
    parts = tuple(module)
    done = next((name for name in parts if name in quantized), None)
    if done is None:
        return ()
    return tuple(
        f"{name}: not quantized, but {done}, with which engines fuse it, is: quantize "
        "both or neither"
        for name in parts
        if name not in quantized
    )


def tensor_parallel_sizes(
    linears: Mapping[str, tuple[int, int]],
    group_size: int,
    num_heads: int,
    num_kv_heads: int,
    layout: Layout,
) -> tuple[int, ...] | None:
    """The numbers of ranks for which no cut goes through a head, a word or a group.

    Args:
        linears: [out, in] by name.
        group_size: input columns that share a scale; -1: the whole row.
        num_heads: attention heads; a rank has at least one.
        num_kv_heads: heads of keys and values; ranks may share one.
        layout: how the codes are stored, which says where words end.

    Returns:
        Ascending sizes, or None: how an engine cuts one of the linears is not known.
    """
    shapes = {(name.rpartition(".")[2], shape) for name, shape in linears.items()}
    known = {*sum(_FUSED_GROUPS, ()), *_FUSED_ON_DISK, *_CUT_BY_COLUMNS}
    if any(leaf not in known for leaf, _ in shapes):
        return None
    return tuple(
        size
        for size in range(1, num_heads + 1)
        if num_heads % size == 0
        and (num_kv_heads % size == 0 or size % num_kv_heads == 0)
        and all(
            _is_cut_by_columns(in_features, size, group_size, layout)
            if leaf in _CUT_BY_COLUMNS
            else _is_cut_by_rows(
                leaf, out_features, size, num_heads, num_kv_heads, layout
            )
            for leaf, (out_features, in_features) in shapes
        )
    )


def _is_cut_by_columns(
    in_features: int, size: int, group_size: int, layout: Layout
) -> bool:
    return size == 1 or (
        in_features % (layout.column_multiple * size) == 0
        and in_features % (max(group_size, 1) * size) == 0
    )


def _is_cut_by_rows(
    leaf: str,
    out_features: int,
    size: int,
    num_heads: int,
    num_kv_heads: int,
    layout: Layout,
) -> bool:
    # Even where nothing is cut the parts lie one after the other.
    parts = _row_parts(leaf, out_features, size, num_heads, num_kv_heads)
    return all(rows % (layout.row_multiple * cuts) == 0 for rows, cuts in parts)


def _row_parts(
    leaf: str, out_features: int, size: int, num_heads: int, num_kv_heads: int
) -> Iterator[tuple[int, int]]:
    """Rows of each logical part of a linear, and into how many cuts they go."""
    kv_cuts = min(size, num_kv_heads)
    if leaf == "qkv_proj":
        head = out_features // (num_heads + 2 * num_kv_heads)
        yield num_heads * head, size
        yield num_kv_heads * head, kv_cuts
    elif leaf == "gate_up_proj":
        yield out_features // 2, size
    else:
        yield out_features, kv_cuts if leaf in ("k_proj", "v_proj") else size
