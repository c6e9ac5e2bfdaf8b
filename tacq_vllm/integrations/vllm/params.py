"""Parameters that know their cut of a stored tensor and whether it has come.

vLLM does not notice a tensor of a quantized model that is missing from the
checkpoint, so every parameter here counts the shards it was given.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
)

from tacq_vllm.format.outliers import (
    Outliers,
    check_outliers,
    decode_outliers,
    encode_outliers,
    merge_outliers,
    slice_outlier_columns,
    slice_outlier_rows,
)
from tacq_vllm.format.validation import fault_line
from tacq_vllm.format.values import LinearFault
from tacq_vllm.integrations.vllm.errors import refuse

ShardId = int | str | tuple[int, ...] | None
"""What vLLM calls the part, or parts, that a tensor is for; None: the whole linear."""


class TrackedParameter(BasevLLMParameter):
    """Remembers which logical shards (q, k, v; gate, up) have been loaded."""

    def __init__(self, **kwargs: Any) -> None:
        self.loaded_shards: set[ShardId] = set()
        super().__init__(**kwargs)

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        """Load the rows of this rank."""
        super().load_column_parallel_weight(loaded_weight)
        self.loaded_shards.add(None)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        """Load the columns of this rank."""
        super().load_row_parallel_weight(loaded_weight)
        self.loaded_shards.add(None)

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        """Load the rows of this rank of one logical shard."""
        super().load_merged_column_weight(loaded_weight, **kwargs)
        self.loaded_shards.add(kwargs["shard_id"])

    def load_qkv_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        """Load the heads of this rank of q, k or v."""
        super().load_qkv_weight(loaded_weight, **kwargs)
        self.loaded_shards.add(kwargs["shard_id"])

    def load_replicated_weight(self, loaded_weight: Tensor) -> None:
        """Load the whole tensor."""
        self._assert_and_load(loaded_weight)
        self.loaded_shards.add(None)


class CodesParameter(TrackedParameter, ModelWeightParameter):
    """Packed codes, of which a row is words of its own: cut along both axes."""


class PackedParameter(TrackedParameter, PackedvLLMParameter):
    """Packed zero-points of groups: cut along both axes."""


class PackedChannelParameter(TrackedParameter, PackedColumnParameter):
    """Packed zero-points of whole rows: cut along `out` only."""


class GroupScaleParameter(TrackedParameter, GroupQuantScaleParameter):
    """Scales of groups: cut along both axes."""


class ChannelScaleParameter(TrackedParameter, ChannelQuantScaleParameter):
    """Scales of whole rows: cut along `out` only."""


@dataclass(frozen=True)
class Part:
    """One logical shard of a linear: q, k or v; gate or up; or all of it."""

    rows: int
    """Of all ranks together."""
    local_rows: int
    """Of this rank, which may share them with others."""


@dataclass(frozen=True)
class StoredTable:
    """The outlier table of one linear in the checkpoint."""

    name: str
    """The linear."""
    parts: tuple[Part, ...]
    """Several where the file has them fused, as those of Phi-3 are."""
    nnz: int
    """Kept weights, an upper bound for a rank."""

    @property
    def rows(self) -> int:
        """Rows in the checkpoint."""
        return sum(part.rows for part in self.parts)

    @property
    def local_rows(self) -> int:
        """Rows on this rank."""
        return sum(part.local_rows for part in self.parts)

    @property
    def capacity(self) -> int:
        """Words staged: row offsets and room for every entry."""
        return self.local_rows + 1 + self.nnz


class OutlierParameter(TrackedParameter):
    """Staging area for the tables of a (fused) linear, one segment per table.

    A rank's share of the entries is not known before the table is read, so each
    segment has room for all of them; `merged` gives the one exact table.
    """

    def __init__(
        self,
        tables: list[StoredTable],
        in_features: int,
        local_in_features: int,
        value_dtype: torch.dtype,
        files: Mapping[str, str],
        **kwargs: Any,
    ) -> None:
        self.tables = tables
        self.files = files
        self.in_features = in_features
        self.local_in_features = local_in_features
        self.value_dtype = value_dtype
        # vLLM's own loader cannot split a table whose parts the file has fused.
        super().__init__(weight_loader=load_outliers, **kwargs)

    def load_table(self, stored: Tensor, shard_id: ShardId) -> None:
        """Keep the rows and columns of this rank.

        Args:
            stored: one linear's table as the checkpoint has it.
            shard_id: which parts it is for; None: all.
        """
        first = shard_id[0] if isinstance(shard_id, tuple) else shard_id
        wanted = 0 if first is None else self._shard_id_as_int(first)
        begin = 0
        for index, table in enumerate(self.tables):
            parts = range(begin, begin + len(table.parts))
            if wanted in parts:
                self._store(index, self._cut(table, self._decode(table, stored)))
                self.loaded_shards.update(parts)
            begin = parts.stop

    def merged(self) -> Tensor:
        """The whole (fused) linear's table on this rank, as SPEC.md lays it out."""
        parts = [
            self._decode_segment(segment, table.local_rows)
            for segment, table in zip(self._segments(), self.tables, strict=True)
        ]
        return encode_outliers(merge_outliers(parts))

    def dummy(self) -> Tensor:
        """A table of the right size for `--load-format dummy`, its values zero."""
        parts = [self._dummy_outliers(table) for table in self.tables]
        return encode_outliers(merge_outliers(parts)).to(self.device)

    def _decode(self, table: StoredTable, stored: Tensor) -> Outliers:
        fault = check_outliers(stored, table.rows, self.in_features, self.value_dtype)
        if fault is None and stored.numel() != table.rows + 1 + table.nnz:
            fault = f"has {stored.numel()} words, not those of {table.nnz} entries"
        if fault:
            refuse(fault_line(self.files, table.name, LinearFault("outliers", fault)))
        return decode_outliers(stored, table.rows, self.value_dtype)

    def _cut(self, table: StoredTable, outliers: Outliers) -> Outliers:
        """The rows of this rank of every part, and its columns."""
        first, cuts = 0, []
        for part in table.parts:
            start = first + self._start(part.rows, part.local_rows)
            cuts.append(slice_outlier_rows(outliers, start, start + part.local_rows))
            first += part.rows
        start = self._start(self.in_features, self.local_in_features)
        return slice_outlier_columns(
            merge_outliers(cuts), start, start + self.local_in_features
        )

    def _start(self, length: int, local_length: int) -> int:
        """Where this rank's part of an axis begins; some ranks may have the same."""
        rank, size = int(self.tp_rank), int(self.tp_size)
        sharing = local_length * size // length
        return rank // sharing * local_length

    def _store(self, index: int, outliers: Outliers) -> None:
        words = encode_outliers(outliers)
        padding = words.new_zeros(self.tables[index].capacity - words.numel())
        self._segments()[index].copy_(torch.cat((words, padding)))

    def _segments(self) -> list[Tensor]:
        return list(self.data.split([table.capacity for table in self.tables]))

    def _decode_segment(self, segment: Tensor, rows: int) -> Outliers:
        used = rows + 1 + int(segment[rows])
        return decode_outliers(segment[:used], rows, self.value_dtype)

    def _dummy_outliers(self, table: StoredTable) -> Outliers:
        """This rank's share of entries, spread evenly over its rows, valued zero."""
        rows = table.local_rows
        cut = rows * self.local_in_features / (table.rows * self.in_features)
        nnz = int(table.nnz * cut)
        offsets = (torch.arange(rows + 1) * nnz // rows).to(torch.int32)
        columns = torch.arange(nnz) - offsets[:-1].repeat_interleave(offsets.diff())
        return Outliers(
            offsets, columns.to(torch.int32), torch.zeros(nnz, dtype=self.value_dtype)
        )


def load_outliers(
    param: OutlierParameter,
    loaded_weight: Tensor,
    loaded_shard_id: ShardId = None,
) -> None:
    """Load a table; the parameter's `weight_loader`, as vLLM calls it.

    Reloading, vLLM puts another parameter in the place of the argument named `param`.
    """
    param.load_table(loaded_weight, loaded_shard_id)
