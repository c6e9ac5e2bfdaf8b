"""The linear method: parameters on vLLM's v2 loader, and the forward pass."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    register_weight_loader_v2_supported_method,
)

from tacq_vllm.format.layouts import layout_of, tensor_names
from tacq_vllm.format.linear import PLANE_SUFFIXES
from tacq_vllm.format.packing import PLANE_WIDTHS, WORD_BITS
from tacq_vllm.format.schema import QuantizationSchema, num_groups
from tacq_vllm.format.stored import Layout, StoredLinear
from tacq_vllm.format.validation import fault_line
from tacq_vllm.format.values import LinearFault, check_range, check_scales
from tacq_vllm.integrations.vllm.errors import refuse
from tacq_vllm.integrations.vllm.params import (
    ChannelScaleParameter,
    CodesParameter,
    GroupScaleParameter,
    OutlierParameter,
    PackedChannelParameter,
    PackedParameter,
    Part,
    StoredTable,
    TrackedParameter,
)
from tacq_vllm.integrations.vllm.summary import LoadSummary
from tacq_vllm.kernels.ops import arrange, prepare, quantized_linear
from tacq_vllm.kernels.tiles import TiledLayout


@register_weight_loader_v2_supported_method
class TacqLinearMethod(LinearMethodBase):
    """One (fused) linear: holds the packed tensors and computes from them.

    Args:
        schema: the checkpoint's quantization block.
        names: the linears in the checkpoint that make up this one.
        files: the file of each of their tensors, where that is known.
        summary: what is told when the weights are there.
    """

    def __init__(
        self,
        schema: QuantizationSchema,
        names: list[str],
        files: Mapping[str, str],
        summary: LoadSummary,
    ) -> None:
        self.schema = schema
        self.layout = layout_of(schema)
        self.arranged_layout: Layout | TiledLayout = self.layout
        self.arranged_shapes: dict[str, torch.Size] = {}
        self.names = names
        self.files = files
        self.summary = summary
        summary.expect_linear()

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the tensors of SPEC.md, cut to this rank, as parameters.

        Raises:
            ValueError: the linear is not the stored one, or the cut goes through words
                or groups; or vLLM is to quantize it once more.
        """
        if getattr(layer, "quant_method", self) is not self:
            refuse(
                f"{', '.join(self.names)}: is quantized, and --quantization-config "
                "would quantize it once more: give it for experts alone (`moe`)"
            )
        load_format = get_current_vllm_config().load_config.load_format
        parts = _parts(layer, output_size, output_partition_sizes)
        self.is_dummy_load = load_format == "dummy"
        self.num_parts = len(parts)
        self.tables = self._stored_tables(parts, input_size)
        self.in_features = input_size_per_partition
        self.x_dtype = params_dtype
        self._check_cut(input_size_per_partition, input_size, parts)
        loader = extra_weight_attrs["weight_loader"]
        if isinstance(layer, ReplicatedLinear):
            loader = _load_replicated
        self._register_codes(layer, sum(output_partition_sizes), loader)
        capacity = sum(table.capacity for table in self.tables)
        layer.register_parameter(
            "outliers",
            OutlierParameter(
                data=torch.empty(capacity, dtype=torch.int32),
                tables=self.tables,
                in_features=input_size,
                local_in_features=input_size_per_partition,
                value_dtype=self.schema.torch_dtype,
                files=self.files,
            ),
        )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check that every tensor came, and merge the shards' outlier tables.

        Raises:
            ValueError: a tensor is missing, or has values that kernels cannot take.
        """
        outliers = getattr(layer, "outliers", None)
        if not isinstance(outliers, OutlierParameter):
            return
        if self.is_dummy_load and not outliers.loaded_shards:
            table = outliers.dummy()
        else:
            self._check_loaded(layer)
            self._check_scales(layer.scales.data)
            table = outliers.merged()
        for name in tensor_names(self.schema):
            # A reload begins with copies of the parameters, which share it.
            getattr(layer, name).loaded_shards.clear()
        layer.outliers = Parameter(table, requires_grad=False)
        packed = self._packed(layer)
        fault = check_range(packed, self.x_dtype)
        if fault:
            refuse(f"{', '.join(self.names)}: {fault}")
        arranged = arrange(packed, self.x_dtype)
        shapes = {name: t.shape for name, t in arranged.tensors().items()}
        if self.arranged_shapes not in ({}, shapes):
            refuse(
                f"{', '.join(self.names)}: its kept weights take other memory than "
                "those that the server was started with: start it again"
            )
        self.arranged_shapes = shapes
        if arranged is not packed:
            for name in packed.tensors():
                delattr(layer, name)
            for name, tensor in arranged.tensors().items():
                layer.register_parameter(name, Parameter(tensor, requires_grad=False))
            self.arranged_layout = arranged.layout
        prepare(arranged, self.x_dtype, _added_bias(layer))
        self.summary.add_linear(arranged, self.x_dtype)

    def apply(
        self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Multiply x [..., in] with this rank's weight."""
        return quantized_linear(x, layer, self.arranged_layout, bias)

    def _packed(self, layer: torch.nn.Module) -> StoredLinear:
        tensors = {name: getattr(layer, name) for name in tensor_names(self.schema)}
        return self.layout.linear(tensors, self.in_features)

    def _register_codes(
        self, layer: torch.nn.Module, out_features: int, loader: Callable[..., None]
    ) -> None:
        """Register codes, scales and zero-points; those of whole rows have one axis."""
        schema = self.schema
        groups = num_groups(self.in_features, schema.group_size)
        if schema.group_size == -1:
            scale_type, zero_type = ChannelScaleParameter, PackedChannelParameter
            axes = {"output_dim": 0}
        else:
            scale_type, zero_type = GroupScaleParameter, PackedParameter
            axes = {"output_dim": 0, "input_dim": 1}
        scales = torch.empty(out_features, groups, dtype=schema.torch_dtype)
        layer.register_parameter(
            "scales", scale_type(data=scales, weight_loader=loader, **axes)
        )
        rows_per_word = {
            f"qzeros{suffix}": WORD_BITS // width
            for width, suffix in zip(
                PLANE_WIDTHS[schema.bits], PLANE_SUFFIXES, strict=False
            )
        }
        specs = self.layout.code_specs(out_features, self.in_features, groups)
        for name, spec in specs.items():
            data = torch.empty(spec.shape, dtype=spec.dtype)
            if name in rows_per_word:
                parameter = zero_type(
                    data=data,
                    packed_dim=0,
                    packed_factor=rows_per_word[name],
                    weight_loader=loader,
                    **axes,
                )
            else:
                parameter = CodesParameter(
                    data=data, input_dim=1, output_dim=0, weight_loader=loader
                )
            layer.register_parameter(name, parameter)

    def _stored_tables(self, parts: list[Part], in_features: int) -> list[StoredTable]:
        """Which parts of the model's linear each stored linear holds."""
        shapes = {name: self.schema.linears[name] for name in self.names}
        left, tables = list(parts), []
        for name, (rows, _) in shapes.items():
            held: list[Part] = []
            while left and sum(part.rows for part in held) < rows:
                held.append(left.pop(0))
            num_outliers = self.schema.num_outliers(name)
            tables.append(StoredTable(name, tuple(held), num_outliers))
        if left or any((t.rows, in_features) != shapes[t.name] for t in tables):
            stored = [list(shape) for shape in shapes.values()]
            refuse(
                f"{', '.join(self.names)}: stored as {stored}, but the model has "
                f"{in_features} input features and parts of "
                f"{[part.rows for part in parts]} output features"
            )
        return tables

    def _check_cut(self, local_in: int, in_features: int, parts: list[Part]) -> None:
        """Refuse a cut that does not fall between words and groups."""
        columns, rows = self.layout.column_multiple, self.layout.row_multiple
        group_size = max(self.schema.group_size, 1)
        if local_in != in_features and (local_in % columns or local_in % group_size):
            refuse(
                f"{', '.join(self.names)}: tensor parallelism leaves {local_in} of "
                f"{in_features} input features to a rank, which cuts through words "
                f"of {columns} or a group of {self.schema.group_size}"
            )
        local_rows = [part.local_rows for part in parts]
        is_whole = len(parts) == 1 and local_rows == [parts[0].rows]
        if not is_whole and any(count % rows for count in local_rows):
            refuse(
                f"{', '.join(self.names)}: {local_rows} output features on a rank, "
                f"which cuts through words of {rows}"
            )

    def _check_scales(self, scales: Any) -> None:
        """Refuse what no weight has; the tables were checked when they came."""
        rows = [table.local_rows for table in self.tables]
        for table, own in zip(self.tables, scales.split(rows), strict=True):
            reason = check_scales(own, self.layout)
            if reason:
                fault = LinearFault("scales", reason)
                refuse(fault_line(self.files, table.name, fault))

    def _check_loaded(self, layer: torch.nn.Module) -> None:
        for name in tensor_names(self.schema):
            missing = self.num_parts - len(getattr(layer, name).loaded_shards)
            if missing:
                refuse(
                    f"{', '.join(self.names)}: {missing} of {self.num_parts} parts of "
                    f"{name} are missing from the checkpoint"
                )


def _added_bias(layer: torch.nn.Module) -> Tensor | None:
    """The bias that a layer hands to `apply`; where columns are cut one rank does."""
    leaves_it = isinstance(layer, RowParallelLinear) and layer.tp_rank > 0
    bias = None if layer.skip_bias_add or leaves_it else layer.bias
    assert bias is None or isinstance(bias, Tensor)
    return bias


def _parts(
    layer: torch.nn.Module, output_size: int, local_sizes: list[int]
) -> list[Part]:
    """The logical parts of a linear of vLLM's."""
    sizes = getattr(layer, "output_sizes", [output_size])
    if isinstance(layer, QKVParallelLinear):
        # It counts a head of k and v for each rank that shares it.
        kv_heads = layer.total_num_kv_heads
        sizes = [
            layer.total_num_heads * layer.head_size,
            kv_heads * layer.head_size,
            kv_heads * layer.v_head_size,
        ]
    if len(sizes) != len(local_sizes):
        refuse(
            f"{type(layer).__name__}: {len(local_sizes)} parts, where {len(sizes)} are "
            "known: leave this linear in 16 bits"
        )
    return [Part(*pair) for pair in zip(sizes, local_sizes, strict=True)]


def _load_replicated(param: TrackedParameter, loaded_weight: Tensor) -> None:
    param.load_replicated_weight(loaded_weight)
