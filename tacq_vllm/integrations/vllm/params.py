"""Parameters that know their cut of a stored tensor and whether it has come.

vLLM does not notice a tensor of a quantized model that is missing from the
checkpoint, so every parameter here counts the shards it was given.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
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
from tacq_vllm.integrations.vllm.errors import refuse


class TrackedParameter(BasevLLMParameter):
    """Remembers which logical shards (q, k, v; gate, up) have been loaded."""

    def __init__(self, **kwargs: Any) -> None:
        self.loaded_shards: set[int | str | None] = set()
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


class PackedParameter(TrackedParameter, PackedvLLMParameter):
    """Packed codes, or zero-points of groups: cut along both axes."""


class PackedChannelParameter(TrackedParameter, PackedColumnParameter):
    """Packed zero-points of whole rows: cut along `out` only."""


class GroupScaleParameter(TrackedParameter, GroupQuantScaleParameter):
    """Scales of groups: cut along both axes."""


class ChannelScaleParameter(TrackedParameter, ChannelQuantScaleParameter):
    """Scales of whole rows: cut along `out` only."""


@dataclass(frozen=True)
class OutlierShard:
    """One logical shard's part of the staged outlier table."""

    name: str
    """The linear in the checkpoint."""
    out_features: int
    """Rows in the checkpoint."""
    local_out_features: int
    """Rows on this rank."""
    nnz: int
    """Kept weights in the checkpoint, an upper bound for a rank."""

    @property
    def capacity(self) -> int:
        """Words staged: row offsets and room for every entry."""
        return self.local_out_features + 1 + self.nnz


class OutlierParameter(TrackedParameter):
    """Staging area for the tables of a (fused) linear, one segment per shard.

    A rank's share of the entries is not known before the table is read, so each
    segment has room for all of them; `merged` gives the one exact table.
    """

    def __init__(
        self,
        shards: list[OutlierShard],
        in_features: int,
        local_in_features: int,
        value_dtype: torch.dtype,
        **kwargs: Any,
    ) -> None:
        self.shards = shards
        self.in_features = in_features
        self.local_in_features = local_in_features
        self.value_dtype = value_dtype
        super().__init__(**kwargs)

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        """Keep the rows of this rank."""
        self._load_rows(0, loaded_weight, self.tp_rank)
        self.loaded_shards.add(None)

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        """Keep the rows of this rank of one logical shard."""
        shard_id = kwargs["shard_id"]
        self._load_rows(self._shard_id_as_int(shard_id), loaded_weight, self.tp_rank)
        self.loaded_shards.add(shard_id)

    def load_qkv_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        """Keep the heads of this rank; `num_heads` ranks share a head of k and v."""
        shard_id = kwargs["shard_id"]
        rank = self.tp_rank if shard_id == "q" else self.tp_rank // kwargs["num_heads"]
        self._load_rows(self._shard_id_as_int(shard_id), loaded_weight, rank)
        self.loaded_shards.add(shard_id)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        """Keep the columns of this rank."""
        start = self.tp_rank * self.local_in_features
        outliers = self._decode(self.shards[0], loaded_weight)
        self._store(
            0, slice_outlier_columns(outliers, start, start + self.local_in_features)
        )
        self.loaded_shards.add(None)

    def load_replicated_weight(self, loaded_weight: Tensor) -> None:
        """Keep the whole table."""
        self._load_rows(0, loaded_weight, 0)
        self.loaded_shards.add(None)

    def merged(self) -> Tensor:
        """The whole (fused) linear's table on this rank, as SPEC.md lays it out."""
        parts = [
            self._decode_segment(segment, shard)
            for segment, shard in zip(self._segments(), self.shards, strict=True)
        ]
        return encode_outliers(merge_outliers(parts))

    def dummy(self) -> Tensor:
        """A table of the right size for `--load-format dummy`, its values zero."""
        parts = [self._dummy_outliers(shard) for shard in self.shards]
        return encode_outliers(merge_outliers(parts)).to(self.device)

    def _load_rows(self, index: int, table: Tensor, rank: int) -> None:
        shard = self.shards[index]
        start = rank * shard.local_out_features
        outliers = self._decode(shard, table)
        self._store(
            index,
            slice_outlier_rows(outliers, start, start + shard.local_out_features),
        )

    def _decode(self, shard: OutlierShard, table: Tensor) -> Outliers:
        fault = check_outliers(
            table, shard.out_features, self.in_features, self.value_dtype
        )
        if fault is None and table.numel() != shard.out_features + 1 + shard.nnz:
            fault = f"has {table.numel()} words, not those of {shard.nnz} entries"
        if fault:
            refuse(f"{shard.name}.outliers: {fault}")
        return decode_outliers(table, shard.out_features, self.value_dtype)

    def _store(self, index: int, outliers: Outliers) -> None:
        table = encode_outliers(outliers)
        padding = table.new_zeros(self.shards[index].capacity - table.numel())
        self._segments()[index].copy_(torch.cat((table, padding)))

    def _segments(self) -> list[Tensor]:
        return list(self.data.split([shard.capacity for shard in self.shards]))

    def _decode_segment(self, segment: Tensor, shard: OutlierShard) -> Outliers:
        rows = shard.local_out_features
        used = rows + 1 + int(segment[rows])
        return decode_outliers(segment[:used], rows, self.value_dtype)

    def _dummy_outliers(self, shard: OutlierShard) -> Outliers:
        """This rank's share of entries, spread evenly over its rows, valued zero."""
        rows = shard.local_out_features
        cut = rows * self.local_in_features / (shard.out_features * self.in_features)
        nnz = int(shard.nnz * cut)
        offsets = (torch.arange(rows + 1) * nnz // rows).to(torch.int32)
        columns = torch.arange(nnz) - offsets[:-1].repeat_interleave(offsets.diff())
        return Outliers(
            offsets, columns.to(torch.int32), torch.zeros(nnz, dtype=self.value_dtype)
        )
