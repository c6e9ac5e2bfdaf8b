"""Checkpoints of methods whose parts the format cannot hold.

The weights that they stand for are stored in 16 bits, as in any Transformers folder. A
block of config.json that no loader takes for a quantization says what they would take.
"""

from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tacq_vllm.config import StorageDtype, one_line
from tacq_vllm.format.schema import FormatError, QuantizationSchema

SIMULATED_KEY: Final = "tacq_simulated"
"""The block's key in config.json."""

_Size = Annotated[int, Field(ge=1, le=1 << 48)]


class SimulatedLinear(BaseModel):
    """One quantized linear, and what its parts would take."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    out_features: _Size
    in_features: _Size
    outliers: int = Field(ge=0, description="Weights kept in 16 bits.")
    stored_bytes: _Size = Field(
        description="Bytes of codes, grids or tables, and kept weights."
    )


class SimulatedSchema(BaseModel):
    """What a simulated checkpoint says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    method: str = Field(description="The recipe's method.")
    bits: int = Field(ge=1, le=16, description="Bits of a code, or their average.")
    group_size: int = Field(
        ge=-1, description="Input columns that share a scale; -1: the whole row."
    )
    dtype: StorageDtype = Field(description="Type of the weights.")
    effective_bits: float = Field(
        description="Bits per weight of the quantized linears, everything counted."
    )
    linears: dict[str, SimulatedLinear] = Field(min_length=1)
    recipe: dict[str, Any] = Field(
        {}, description="How the checkpoint was made; for people."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not abs(self.effective_bits - effective_bits(self.linears)) <= 1e-6:
            raise ValueError("effective_bits: not those of the linears")
        return self


AnySchema = QuantizationSchema | SimulatedSchema
"""What a checkpoint, packed or simulated, says of itself."""


def effective_bits(linears: dict[str, SimulatedLinear]) -> float:
    """Bits per weight of linears together."""
    nbytes = sum(linear.stored_bytes for linear in linears.values())
    weights = sum(x.out_features * x.in_features for x in linears.values())
    return nbytes * 8 / weights


def parse_simulated(config: dict[str, Any]) -> SimulatedSchema | None:
    """Read the block of a config.json; None: it is not of a simulated checkpoint.

    Raises:
        FormatError: the block contradicts itself.
    """
    if SIMULATED_KEY not in config:
        return None
    try:
        return SimulatedSchema.model_validate(config[SIMULATED_KEY])
    except ValidationError as error:
        raise FormatError(f"{SIMULATED_KEY}: {one_line(error)}") from error
