from pathlib import Path

import numpy as np
import pytest
import torch

import tacq_vllm.accelerator
from tacq_vllm.accelerator import report
from tacq_vllm.accelerator.__main__ import main
from tacq_vllm.accelerator.array import Counts, run_tile
from tacq_vllm.accelerator.costs import (
    Traffic,
    array_area,
    array_energy,
    element_area,
    layer_traffic,
    traffic_energy,
)
from tacq_vllm.accelerator.design import MAC_3, MAC_8, TEMPORAL, ArraySize
from tacq_vllm.accelerator.layers import (
    Layer,
    LayerWork,
    MissingModelError,
    gguf_layers,
    measure_layer,
    quantized_layer,
    random_activations,
    random_layer,
)
from tacq_vllm.accelerator.report import (
    area_table,
    layer_tables,
    replace_tables,
    tile_table,
)

README = Path(tacq_vllm.accelerator.__file__).with_name("README.md")


def test_the_readme_has_the_tables_that_the_command_makes():
    page = README.read_text()

    tables = {"areas": area_table(), "one tile": tile_table()}

    assert replace_tables(page, tables) == page


def test_a_page_without_a_place_is_refused(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("nothing here\n")

    assert main(["--write", str(page)]) == 2

    assert capsys.readouterr().err.startswith("tacq: the page has no place")
    assert page.read_text() == "nothing here\n"


def test_a_missing_model_is_one_line(tmp_path, capsys):
    pytest.importorskip("gguf")

    assert main(["--model", str(tmp_path / "none.gguf")]) == 2

    err = capsys.readouterr().err
    assert "none.gguf" in err
    assert err.count("\n") == 1


def test_layers_are_read_from_a_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    W = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.attn_q.weight", W.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    (layer,) = gguf_layers(path, {"blk.0.attn_q.weight": "q_proj"})

    assert (layer.name, layer.out_features) == ("q_proj", 5)
    assert np.array_equal(layer.codes, quantized_layer("", W, 5).codes)
    with pytest.raises(MissingModelError, match="has no tensor none"):
        list(gguf_layers(path, {"none": "q_proj"}))


def test_areas_by_hand():
    # 24 of 32 bits of an adder, 35 register bits, two gates for each activation bit.
    expected = 137 * 24 / 32 + 35 * 5.981433 + 16 * 50.36996 / 32
    assert element_area(TEMPORAL) == pytest.approx(expected)
    assert element_area(MAC_8) == pytest.approx(137 + 49 * 5.981433 + 282)
    size = ArraySize(4, 4)
    assert array_area(TEMPORAL, size) < array_area(MAC_3, size)
    assert array_area(MAC_3, size) < array_area(MAC_8, size)


def test_traffic_by_hand():
    traffic = layer_traffic(64, 96, ArraySize(32, 8), TEMPORAL)

    # 64 rows of 28 bytes; two tiles read 96 x 8 activations each; 64 x 8 outputs.
    assert traffic.memory_bytes == 64 * 28 + 96 * 8 + 2 * 64 * 8
    assert traffic.buffer_bytes == 64 * 28 + 2 * 96 * 8 + 4 * 64 * 8
    wide = layer_traffic(64, 96, ArraySize(32, 8), MAC_8)
    assert wide.memory_bytes - traffic.memory_bytes == 64 * (96 - 28)


def test_energies_by_hand():
    # 64 bits: 100 pJ from a cache of 1 MB, 1.3 nJ from memory.
    assert traffic_energy(Traffic(16, 8)) == (200, 1300)
    counts = Counts(cycles=9, multiplications=2, additions=5, clocked_bits=7)
    shared = 7 * 7.936518e-3 + 3 * 1.062977e-3
    assert array_energy(counts, 3, MAC_8) == pytest.approx(2 * 0.2 + 5 * 0.1 + shared)
    smaller = 2 * 0.2 * 3 / 8 + 5 * 0.1 * 24 / 32
    assert array_energy(counts, 3, MAC_3) == pytest.approx(smaller + shared)


def test_what_designs_do_is_compared_by_hand(monkeypatch):
    layer = random_layer("layer", 4, 24, rows=4)
    works = {
        design: LayerWork(
            Counts(1000 * cycles, 1e6 * cycles, 2e6 * cycles, 0),
            toggles=3e6 * cycles,
            traffic=Traffic(4e6 * cycles, 5e6 * cycles),
            array_pj=array_pj,
            buffer_pj=2e6,
            memory_pj=memory_pj,
        )
        for design, cycles, array_pj, memory_pj in (
            (TEMPORAL, 4, 1e6, 4e6),
            (MAC_8, 2, 2e6, 10e6),
            (MAC_3, 1, 4e6, 1e6),
        )
    }
    monkeypatch.setattr(report, "measure_layer", lambda _, design, size: works[design])

    lines = layer_tables([layer]).splitlines()

    assert lines[2] == (
        "| layer | MAC, 8 x 8 bits | 2.0 | 2.0 | 4.0 | 6.0 | 8.00 | 10.00 | 2.00 "
        "| 2.00 | 10.00 |"
    )
    area = {design: array_area(design, report.SIZE) for design in works}
    for line, design, figures in (
        (lines[8], MAC_8, ("2.00x", "2.00x", "1.33x", "2.00x")),
        (lines[9], MAC_3, ("4.00x", "4.00x", "2.00x", "1.00x")),
    ):
        cycles = works[design].counts.cycles / works[TEMPORAL].counts.cycles
        per_area = f"{cycles * area[design] / area[TEMPORAL]:.2f}x"
        cells = ("layer", design.name, figures[0], per_area, *figures[1:])
        assert line == f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("design", [TEMPORAL, MAC_3], ids=lambda design: design.name)
def test_a_whole_layer_is_the_sum_of_its_tiles(design):
    size = ArraySize(4, 3)
    layer = random_layer("layer", 10, 24, rows=10)
    activations = random_activations(24, 3)

    work = measure_layer(layer, design, size)

    filled = np.pad(layer.codes, ((0, 2), (0, 0)))
    runs = [run_tile(filled[i : i + 4], activations, design) for i in range(0, 12, 4)]
    assert work.counts.cycles == sum(run.counts.cycles for run in runs)
    assert work.counts.additions == sum(run.counts.additions for run in runs)
    assert work.counts.clocked_bits == sum(run.counts.clocked_bits for run in runs)
    assert work.toggles == 3 * runs[0].toggles
    assert work.array_pj == array_energy(work.counts, work.toggles, design)
    assert (work.buffer_pj, work.memory_pj) == traffic_energy(work.traffic)


def test_sampled_rows_stand_for_all():
    size = ArraySize(4, 3)
    tile = random_layer("layer", 4, 24, rows=4).codes
    whole = Layer("whole", 12, np.concatenate([tile] * 3))
    sampled = Layer("sampled", 12, tile)

    assert measure_layer(sampled, TEMPORAL, size) == measure_layer(
        whole, TEMPORAL, size
    )
