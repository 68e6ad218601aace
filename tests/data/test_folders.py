"""Folders are read as the tools left them that wrote them: by shards, cards, names of splits, and ``save_to_disk``."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from support.refusals import refused

from mlx_cpo_plugin.data.folders import pick_splits, split_files
from mlx_cpo_plugin.data.reading import read_splits
from mlx_cpo_plugin.errors import DataError
from mlx_cpo_plugin.settings.config import RunSettings

ROWS = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."} for i in range(10)]
ALL = ("train", "valid", "test")


def write(path: Path, rows: list[Any] = ROWS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if ".parquet" in path.name:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(text) if path.name.endswith(".gz") else text)


def read(folder: Path) -> Mapping[str, list[Any]]:
    splits = read_splits(RunSettings.of({"data": str(folder)}), ALL)
    return {split: [row.value for group in groups for row in group.rows] for split, groups in splits.items()}


def found(folder: Path) -> dict[str, list[str]]:
    return {
        split: [file.relative_to(folder).as_posix() for file in files] for split, files in split_files(folder).items()
    }


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (
            [
                "data/train-00000-of-00002.parquet",
                "data/train-00001-of-00002.parquet",
                "data/test-00000-of-00001.parquet",
            ],
            {
                "train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
                "test": ["data/test-00000-of-00001.parquet"],
            },
        ),
        (
            ["default/train/0000.parquet", "default/validation/0000.parquet"],
            {"train": ["default/train/0000.parquet"], "valid": ["default/validation/0000.parquet"]},
        ),
        (
            [f"data/{split}_{kind}-00000-of-00001.parquet" for split in ("train", "test") for kind in ("prefs", "sft")],
            {
                "train": ["data/train_prefs-00000-of-00001.parquet"],
                "test": ["data/test_prefs-00000-of-00001.parquet"],
            },
        ),
        (["train_prefs.jsonl", "test_prefs.jsonl"], {"train": ["train_prefs.jsonl"], "test": ["test_prefs.jsonl"]}),
        (["train.jsonl.gz", "eval.csv"], {"train": ["train.jsonl.gz"], "valid": ["eval.csv"]}),
        (
            ["train-2.jsonl", "train-10.jsonl", "train-1.json"],
            {"train": ["train-1.json", "train-2.jsonl", "train-10.jsonl"]},
        ),
        (
            ["train/b.jsonl", "train/a.parquet", "dev.jsonl"],
            {"train": ["train/a.parquet", "train/b.jsonl"], "valid": ["dev.jsonl"]},
        ),
        (
            ["ultrafeedback_train.jsonl", "ultrafeedback_val.jsonl"],
            {"train": ["ultrafeedback_train.jsonl"], "valid": ["ultrafeedback_val.jsonl"]},
        ),
        # One set in two forms, and one beside its shards, is read once.
        (["train.jsonl", "train.parquet", "train.jsonl.gz"], {"train": ["train.jsonl"]}),
        (["train.jsonl", "train/0.jsonl", "train-1.jsonl"], {"train": ["train.jsonl"]}),
        (["valid.jsonl", "dev.jsonl"], {"valid": ["valid.jsonl"]}),
        # Without the name of a split all of it is the training set.
        (["preferences.jsonl", "README.md", "dataset_info.json"], {"train": ["preferences.jsonl"]}),
        (["data/part-0.parquet", "data/part-1.parquet"], {"train": ["data/part-0.parquet", "data/part-1.parquet"]}),
        (["a.jsonl", "b.jsonl"], {}),
        # What other programs leave beside the rows is no data.
        ([".cache/train.jsonl", "en/train.jsonl"], {"train": ["en/train.jsonl"]}),
        ([".train.jsonl", "train.txt", "trainer_state.json", "test_results.json"], {}),
    ],
)
def test_files_belong_to_the_split_that_they_are_named_after(
    files: list[str], splits: dict[str, list[str]], tmp_path: Path
) -> None:
    for name in files:
        write(tmp_path / name)

    assert found(tmp_path) == splits


def test_a_set_of_which_shards_are_missing_is_refused(tmp_path: Path) -> None:
    for number in (0, 2):
        write(tmp_path / f"data/train-0000{number}-of-00003.jsonl")
    write(tmp_path / "data/test-00000-of-00002.jsonl")

    with refused(DataError, r"holds 2 of 3 shards \(train-00000-of-00003.jsonl, train-00002", key="data"):
        read(tmp_path)
    write(tmp_path / "data/train-00001-of-00003.jsonl")
    assert "train" in read_splits(RunSettings.of({"data": str(tmp_path)}), ("train", "valid"))
    with refused(DataError, "holds 1 of 2 shards", key="data"):
        read(tmp_path)


def test_shards_in_folders_of_their_own_are_one_set_and_a_number_counts_once(tmp_path: Path) -> None:
    for name in ("a/train_part1/rows-1-of-2.jsonl", "a/train_part2/rows-2-of-2.jsonl"):
        write(tmp_path / name)
    for name in ("b/train-1-of-2.jsonl", "b/train-01-of-2.jsonl"):
        write(tmp_path / name)

    assert len(read(tmp_path / "a")["train"]) == 2 * len(ROWS)
    with refused(DataError, "holds 1 of 2 shards", key="data"):
        read(tmp_path / "b")


def test_a_link_that_leads_nowhere_is_refused_by_whoever_reads_it(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    (tmp_path / "valid.jsonl").symlink_to(tmp_path / "gone.jsonl")

    with refused(DataError, r"valid.jsonl cannot be read \(No such file"):
        read(tmp_path)


def test_a_link_without_a_claim_that_leads_nowhere_is_nothing(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl")
    (tmp_path / "old.jsonl").symlink_to(tmp_path / "gone.jsonl")

    assert found(tmp_path) == {"train": ["rows.jsonl"]}


def test_files_that_could_have_been_meant_are_noted(tmp_path: Path) -> None:
    for name in ("train.jsonl", "train2.jsonl", "train.csv", "train_sft.jsonl", "other.jsonl"):
        write(tmp_path / name)
    write(tmp_path / "valid.jsonl")

    splits = read_splits(RunSettings.of({"data": str(tmp_path)}), ALL)

    assert splits["train"][0].note == "train.csv, train2.jsonl are not read."
    assert splits["valid"][0].note == ""


def test_the_names_of_other_trainers_for_a_split_are_its_names() -> None:
    assert pick_splits(["train_dataset", "eval_dataset"]) == {"train": "train_dataset", "valid": "eval_dataset"}
    assert pick_splits(["train_prefs", "train_dataset"]) == {"train": "train_prefs"}


CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: rows/a*
  - split: test_prefs
    path: [rows/b1.jsonl, rows/b2.jsonl]
- config_name: other
  data_files: other.jsonl
---
# My rows
"""


@pytest.fixture
def offline_datasets(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real ``datasets`` library, with its cache in the test's own folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.usefixtures("offline_datasets")
def test_the_card_of_a_hub_repository_says_which_files_are_which(tmp_path: Path) -> None:
    for number, name in enumerate(("rows/a1.jsonl", "rows/a2.jsonl", "rows/b1.jsonl", "rows/b2.jsonl")):
        write(tmp_path / name, ROWS[number : number + 1])
    for name in ("other.jsonl", "train.jsonl"):
        write(tmp_path / name, ROWS[5:])
    (tmp_path / "README.md").write_text(CARD)

    assert read(tmp_path) == {"train": ROWS[:2], "valid": [], "test": ROWS[2:4]}


@pytest.mark.usefixtures("offline_datasets")
def test_a_card_with_several_configurations_is_refused_with_their_names(tmp_path: Path) -> None:
    for name in ("en.jsonl", "de.jsonl"):
        write(tmp_path / name)
    card = "configs:\n- {config_name: en, data_files: en.jsonl}\n- {config_name: de, data_files: de.jsonl}\n"
    (tmp_path / "README.md").write_text(f"---\n{card}---\n")

    with refused(DataError, r"\['en', 'de'\]", place=str(tmp_path)):
        read(tmp_path)


@pytest.mark.parametrize(
    "card",
    [
        "# no front matter",
        "---\nconfigs: [\n---\n",
        "---\nlicense: mit\n---\n",
    ],
)
def test_a_card_that_names_no_files_here_leaves_the_names_to_decide(card: str, tmp_path: Path) -> None:
    write(tmp_path / "outside.jsonl")
    write(tmp_path / "set" / "train.jsonl")
    (tmp_path / "set" / "README.md").write_text(card)

    assert found(tmp_path / "set") == {"train": ["train.jsonl"]}


def test_a_folder_with_several_data_sets_is_one_sentence(tmp_path: Path) -> None:
    for name in ("en", "de"):
        write(tmp_path / name / "train.jsonl")

    with refused(DataError, key="data", place=str(tmp_path), allowed="de, en"):
        split_files(tmp_path)


def test_two_sets_with_an_equal_claim_are_not_mixed(tmp_path: Path) -> None:
    for name in ("train_dpo.jsonl", "train_prefs.jsonl"):
        write(tmp_path / name)

    with refused(DataError, "the train split", key="data", allowed="train_dpo.jsonl, train_prefs.jsonl"):
        split_files(tmp_path)


def test_what_save_to_disk_wrote_has_the_same_rows_as_the_lines_it_came_from(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=rows, validation=rows.select([1, 3])).save_to_disk(
        str(tmp_path / "both"), num_shards={"train": 2, "validation": 1}
    )
    rows.shuffle(seed=1).save_to_disk(str(tmp_path / "one"))

    assert read(tmp_path / "both") == {"train": ROWS, "valid": [ROWS[1], ROWS[3]], "test": []}
    assert read(tmp_path / "both" / "validation")["train"] == [ROWS[1], ROWS[3]]
    assert sorted(row["prompt"] for row in read(tmp_path / "one")["train"]) == [row["prompt"] for row in ROWS]


def test_a_saved_data_set_that_is_damaged_is_one_sentence(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path))
    next(tmp_path.glob("*.arrow")).unlink()

    with refused(DataError, place=str(tmp_path)):
        read(tmp_path)


def test_rows_of_shards_know_their_file(tmp_path: Path) -> None:
    for name in ("train/0000.parquet", "test/0000.parquet"):
        write(tmp_path / name, ROWS[:2])

    splits = read_splits(RunSettings.of({"data": str(tmp_path)}), ("train", "test"))

    sources = [row.source for groups in splits.values() for group in groups for row in group.rows]
    assert sources == ["train/0000.parquet:1", "train/0000.parquet:2", "test/0000.parquet:1", "test/0000.parquet:2"]
