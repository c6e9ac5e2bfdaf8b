"""The `quantization_config` block of config.json (SPEC.md, "Configuration")."""

import json
from typing import Any, Final, Literal, Self

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from tacq_vllm.config import StorageDtype, one_line
from tacq_vllm.format.clusters import BLOCK, BLOCK_WORDS
from tacq_vllm.format.outliers import MAX_IN_FEATURES
from tacq_vllm.format.packing import WORD_BITS

LayoutName = Literal["planes", "clusters"]

QUANT_METHOD: Final = "tacq"
FORMAT_VERSIONS: Final[dict[LayoutName, Literal[1, 2]]] = {"planes": 1, "clusters": 2}
"""The first version that knows a layout, which is what a writer states."""

STORAGE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""By their names in the configuration."""

DEFAULT_CIRCUIT = "default"

_MAX_COUNT = 2**31 - 1
"""Row offsets are int32."""

_MAX_LINE = 2000
"""Characters of a message."""


class FormatError(ValueError):
    """A checkpoint that is not what SPEC.md describes; the message says where.

    It is one line that is safe to print, whatever names the checkpoint has made up.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Escape line ends, control characters and half surrogates; cut very long texts."""
    line = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text[:_MAX_LINE]
    )
    return line if len(text) <= _MAX_LINE else f"{line} …"


class QuantizationSchema(BaseModel):
    """What a loader must know before it reads a weight."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    quant_method: Literal["tacq"] = QUANT_METHOD
    format_version: Literal[1, 2] = FORMAT_VERSIONS["planes"]
    layout: LayoutName = Field(
        "planes", description="How codes are stored; version 1 knows planes alone."
    )
    bits: Literal[2, 3, 4] = Field(
        description="Bits of a code; of clusters 2, without those beside an outlier."
    )
    group_size: int = Field(
        ge=-1, description="Input columns that share a scale; -1: the whole row."
    )
    dtype: StorageDtype = Field(description="Type of scales and kept weights.")
    linears: dict[str, tuple[int, int]] = Field(
        min_length=1,
        description="[out_features, in_features] of every quantized linear, by name.",
    )
    circuits: dict[str, dict[str, int]] = Field(
        description="Kept weights per linear; the only table is `default`."
    )
    tensor_parallel_sizes: tuple[PositiveInt, ...] | None = Field(
        None, description="Numbers of ranks that the linears can be cut for, if known."
    )
    recipe: dict[str, Any] = Field(
        {}, description="How the checkpoint was made; for people, not for loaders."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.format_version != FORMAT_VERSIONS[self.layout]:
            raise ValueError(
                f"layout {self.layout}: not that of format_version "
                f"{self.format_version}"
            )
        if self.layout == "clusters" and self.bits != 2:
            raise ValueError(f"bits {self.bits}: clusters have 2")
        check_group_size(self.group_size, self.layout)
        if set(self.circuits) != {DEFAULT_CIRCUIT}:
            raise ValueError("circuits: there is exactly one table, `default`")
        if self.circuits[DEFAULT_CIRCUIT].keys() != self.linears.keys():
            raise ValueError("circuits and linears name different modules")
        for name, (out_features, in_features) in self.linears.items():
            check_linear_shape(name, out_features, in_features, self.group_size)
            most = min(out_features * in_features, _MAX_COUNT)
            if not 0 <= self.num_outliers(name) <= most:
                raise ValueError(f"{name}: {self.num_outliers(name)} kept weights")
        return self

    @model_serializer(mode="wrap")
    def _leave_out_defaults(
        self, handler: SerializerFunctionWrapHandler
    ) -> dict[str, Any]:
        block: dict[str, Any] = handler(self)
        if self.layout == "planes":
            del block["layout"]
        if self.tensor_parallel_sizes is None:
            del block["tensor_parallel_sizes"]
        return block

    @property
    def torch_dtype(self) -> torch.dtype:
        """The storage type as a torch dtype."""
        return storage_dtype(self.dtype)

    @property
    def num_weights(self) -> int:
        """Weights of all quantized linears together."""
        return sum(out * in_ for out, in_ in self.linears.values())

    def num_outliers(self, name: str) -> int:
        """Kept weights of one linear."""
        return self.circuits[DEFAULT_CIRCUIT][name]

    @property
    def outlier_ratio(self) -> float:
        """Share of all weights of the quantized linears that are kept."""
        return sum(self.circuits[DEFAULT_CIRCUIT].values()) / self.num_weights

    @property
    def code_bits(self) -> float:
        """Bits that the codes take per weight, without padding."""
        if self.layout == "clusters":
            return BLOCK_WORDS * WORD_BITS / BLOCK
        return self.bits

    @property
    def paper_bits(self) -> float:
        """Bits per weight by the paper's formula N - N·r + 32·r (appendix A)."""
        return self.code_bits * (1 - self.outlier_ratio) + 32 * self.outlier_ratio


def storage_dtype(name: StorageDtype) -> torch.dtype:
    """The torch dtype of a storage type's name."""
    return STORAGE_DTYPES[name]


def check_group_size(group_size: int, layout: LayoutName) -> None:
    """Refuse a size of groups that a layout cannot have.

    Raises:
        ValueError: naming those that it can.
    """
    multiple = BLOCK if layout == "clusters" else 16
    if group_size == 0 or (group_size > 0 and group_size % multiple):
        raise ValueError(
            f"group_size {group_size}: not -1 or {multiple}, {2 * multiple}, …"
        )


def check_linear_shape(
    name: str, out_features: int, in_features: int, group_size: int
) -> None:
    """Refuse a linear that the format cannot hold.

    Raises:
        ValueError: naming the linear, the sizes and the remedy.
    """
    if not 0 < out_features <= _MAX_COUNT or in_features < 1:
        raise ValueError(f"{name}: shape [{out_features}, {in_features}]")
    if in_features > MAX_IN_FEATURES:
        raise ValueError(
            f"{name}: {in_features} input features, more than {MAX_IN_FEATURES}"
        )
    if group_size != -1 and in_features % group_size:
        raise ValueError(
            f"{name}: group_size {group_size} does not divide its {in_features} input "
            "features; choose a divisor, or -1 for one scale per row"
        )


def num_groups(in_features: int, group_size: int) -> int:
    """Scales per row."""
    return 1 if group_size == -1 else in_features // group_size


def parse_schema(block: object) -> QuantizationSchema:
    """Read the `quantization_config` block of a config.json.

    Raises:
        FormatError: not a TaCQ block, of a later version, or contradicting itself.
    """
    if not isinstance(block, dict) or block.get("quant_method") != QUANT_METHOD:
        raise FormatError(
            "config.json: no quantization_config with quant_method 'tacq': "
            "not a TaCQ checkpoint"
        )
    version = block.get("format_version")
    if type(version) is not int or version not in FORMAT_VERSIONS.values():
        raise FormatError(
            f"config.json: format_version {version!r} is not known to this tacq-vllm, "
            f"which reads {' and '.join(map(str, FORMAT_VERSIONS.values()))}: install "
            "a newer tacq-vllm"
        )
    try:
        # JSON mode: lists become tuples, nothing else is converted.
        return QuantizationSchema.model_validate_json(_to_json(block))
    except ValidationError as error:
        raise FormatError(
            f"config.json: quantization_config: {one_line(error)}"
        ) from error


def _to_json(block: dict[str, Any]) -> str:
    try:
        return json.dumps(block)
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(
            f"config.json: quantization_config is not JSON: {error}"
        ) from error
