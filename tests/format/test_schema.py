from typing import Any

import pytest
import torch

from tacq_vllm.format.schema import FormatError, num_groups, parse_schema


def make_block(**fields: Any) -> dict[str, Any]:
    """A valid block of two linears, with some fields changed."""
    return {
        "quant_method": "tacq",
        "format_version": 1,
        "bits": 3,
        "group_size": 32,
        "dtype": "bfloat16",
        "linears": {"a": [10, 64], "b": [6, 160]},
        "circuits": {"default": {"a": 12, "b": 4}},
        "recipe": {"bits": 3},
    } | fields


def test_a_valid_block_survives_a_round_trip() -> None:
    block = make_block()

    schema = parse_schema(block)

    assert schema.model_dump(mode="json") == block
    assert schema.torch_dtype == torch.bfloat16
    assert schema.linears["b"] == (6, 160)
    assert schema.num_outliers("a") == 12
    assert schema.num_weights == 10 * 64 + 6 * 160


def test_tensor_parallel_sizes_are_optional() -> None:
    block = make_block(tensor_parallel_sizes=[1, 2])

    assert parse_schema(block).tensor_parallel_sizes == (1, 2)
    assert parse_schema(block).model_dump(mode="json") == block
    assert parse_schema(make_block()).tensor_parallel_sizes is None


def test_paper_bits_follow_the_formula() -> None:
    ratio = 16 / 1600

    assert parse_schema(make_block()).paper_bits == pytest.approx(
        3 - 3 * ratio + 32 * ratio
    )


@pytest.mark.parametrize(
    ("group_size", "groups"), [(-1, 1), (16, 12), (64, 3), (192, 1)]
)
def test_num_groups(group_size: int, groups: int) -> None:
    assert num_groups(192, group_size) == groups


@pytest.mark.parametrize("block", [None, [], "tacq", {}, {"quant_method": "gptq"}])
def test_other_methods_are_not_ours(block: object) -> None:
    with pytest.raises(FormatError, match="not a TaCQ checkpoint"):
        parse_schema(block)


@pytest.mark.parametrize("version", [3, 0, "1", True, 1.0, None, 99])
def test_other_versions_are_refused_with_the_remedy(version: object) -> None:
    with pytest.raises(FormatError, match=r"format_version .* install a newer"):
        parse_schema(make_block(format_version=version))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"bits": 5}, "bits: Input should be 2, 3 or 4"),
        ({"bits": "3"}, "bits: "),
        ({"dtype": "float32"}, "dtype: "),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": -2}, "group_size: "),
        ({"group_size": 24}, "group_size 24"),
        ({"group_size": 64}, "b: group_size 64 does not divide its 160 input features"),
        ({"linears": {}, "circuits": {"default": {}}}, "linears: "),
        ({"linears": {"a": [10, 64], "b": [6]}}, "linears.b"),
        ({"linears": {"a": [10, 64], "b": [0, 160]}}, r"b: shape \[0, 160\]"),
        ({"linears": {"a": [10, 64], "b": [-6, 160]}}, r"b: shape \[-6, 160\]"),
        (
            {"linears": {"a": [10, 64], "b": [6, 65537]}},
            "b: 65537 input features, more than 65536",
        ),
        ({"circuits": {"default": {"a": 12}}}, "name different modules"),
        ({"circuits": {"default": {"a": 1, "b": 1, "c": 1}}}, "name different modules"),
        ({"circuits": {}}, "exactly one table"),
        (
            {"circuits": {"default": {"a": 1, "b": 1}, "sql": {"a": 1, "b": 1}}},
            "exactly one table",
        ),
        ({"circuits": {"default": {"a": 641, "b": 4}}}, "a: 641 kept weights"),
        ({"circuits": {"default": {"a": -1, "b": 4}}}, "a: -1 kept weights"),
        (
            {
                "linears": {"a": [65536, 65536], "b": [6, 160]},
                "circuits": {"default": {"a": 2**31, "b": 4}},
            },
            "a: 2147483648 kept weights",
        ),
        ({"tensor_parallel_sizes": [1, 0]}, "tensor_parallel_sizes.1: "),
        ({"tensor_parallel_sizes": 2}, "tensor_parallel_sizes: "),
        ({"recipe": {"x": object()}}, "not JSON"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        parse_schema(make_block(**fields))


CLUSTERS = {"format_version": 2, "layout": "clusters", "bits": 2, "group_size": -1}


def test_clusters_are_version_2() -> None:
    block = make_block(**CLUSTERS)

    schema = parse_schema(block)

    assert schema.model_dump(mode="json").items() >= CLUSTERS.items()
    assert schema.code_bits == pytest.approx(7 / 3)
    ratio = schema.outlier_ratio
    assert schema.paper_bits == pytest.approx(7 / 3 * (1 - ratio) + 32 * ratio)
    assert "layout" not in parse_schema(make_block()).model_dump(mode="json")


@pytest.mark.parametrize("field", ["bits", "group_size", "dtype", "linears"])
def test_missing_fields_are_refused(field: str) -> None:
    block = make_block()
    del block[field]

    with pytest.raises(FormatError, match=f"{field}: Field required"):
        parse_schema(block)


def test_a_recipe_without_end_is_refused() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]

    with pytest.raises(FormatError, match="not JSON"):
        parse_schema(make_block(recipe={"x": nested}))


def test_errors_are_one_line() -> None:
    with pytest.raises(FormatError) as caught:
        parse_schema(make_block(bits=9, dtype="int8"))

    assert "\n" not in str(caught.value)
