"""Which groups are shown, and in which order their images stand."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mixed_run import blended_digits
from published_set import publish_rows

from diffcal.data.ladders import select_ladders
from diffcal.data.soft_labels import SoftLabelSet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Fifty groups of five: every pair of digits, five pairs twice; do not write into it."""
    return publish_rows(tmp_path_factory.mktemp("set") / "dataset", groups=50)


def test_ladders_go_from_pure_to_pure(folder):
    columns, annotation = blended_digits(50, 5)
    ladders = select_ladders(folder, 45)
    assert sorted(ladder.classes for ladder in ladders) == sorted(
        (a, b) for a in range(10) for b in range(a + 1, 10)
    )
    for ladder in ladders:
        assert ladder.group < 45  # the first group of its pair
        assert [step.weights[0] for step in ladder.steps] == [1, 0.75, 0.5, 0.25, 0]
        assert ladder.names == tuple(str(label) for label in ladder.classes)
        for step in ladder.steps:
            assert columns["group"][step.row] == ladder.group
            assert step.image == columns["image"][step.row]["bytes"]
            assert list(step.soft_label) == annotation["soft_label"][step.row]
            assert step.lambda_hat == pytest.approx(annotation["lambda_hat"][step.row], abs=1e-6)
            assert [p for _, p in step.top] == sorted(
                (p for p in step.soft_label if p >= 0.01), reverse=True
            )
            assert all(step.soft_label[int(name)] == p for name, p in step.top)


def test_few_ladders_show_many_classes(folder):
    for seed in range(4):
        ladders = select_ladders(folder, 5, seed)
        assert len({label for ladder in ladders for label in ladder.classes}) == 10
    assert select_ladders(folder, 5) == select_ladders(SoftLabelSet(folder), 5)
    assert select_ladders(folder, 5) != select_ladders(folder, 5, seed=1)


def test_complete_groups_come_before_thinned_ones(folder, tmp_path):
    table = pq.read_table(folder / "data")
    (tmp_path / "data").mkdir()
    # of the pair of group 0 only group 45 keeps all its images
    assert table["classes"][0].as_py() == table["classes"][45 * 5].as_py()
    pq.write_table(
        pa.concat_tables([table.slice(1, 4), table.slice(225, 5)]), tmp_path / "data/a.parquet"
    )
    (ladder,) = select_ladders(tmp_path)
    assert (ladder.group, len(ladder.steps)) == (45, 5)


def test_three_classes_follow_pairs_and_single_images_are_left_out(folder, tmp_path):
    table = pq.read_table(folder / "data").slice(0, 11)
    (tmp_path / "data").mkdir()
    triples = table["classes"].to_pylist()[:5] + [[1, 2, 3]] * 5 + [[4, 5]]
    weights = table["weights"].to_pylist()[:5] + [[0.2 * i, 0.3, 0.7 - 0.2 * i] for i in range(5)]
    for name, values in (("classes", triples), ("weights", [*weights, [1, 0]])):
        index = table.schema.get_field_index(name)
        kind = table.schema.field(name).type
        table = table.set_column(index, name, pa.array(values, kind))
    pq.write_table(table, tmp_path / "data" / "a.parquet")
    pair, triple = select_ladders(tmp_path)
    assert (len(pair.classes), triple.classes) == (2, (1, 2, 3))
    assert [round(step.weights[0], 1) for step in triple.steps] == [0.8, 0.6, 0.4, 0.2, 0]
    assert triple.caption == "Between 1, 2, 3 (group 1)."
