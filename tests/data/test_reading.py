"""Files, folders and data sets of the Hugging Face library become rows that know where they stand."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pyarrow
import pytest
from pyarrow import parquet
from support.refusals import refused

from mlx_cpo_plugin.data import reading
from mlx_cpo_plugin.data.reading import read_splits
from mlx_cpo_plugin.errors import DataError
from mlx_cpo_plugin.settings.config import RunSettings

ROWS = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."} for i in range(10)]


def settings(data="", hf_dataset=None, **others):
    return RunSettings.of({"data": str(data), "hf_dataset": hf_dataset, **others})


def write(path, rows=ROWS):
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("valid", ["valid", "validation", "val", "dev", "eval"])
def test_a_folder_has_a_file_for_each_split_under_its_usual_names(tmp_path, valid):
    write(tmp_path / "train.jsonl")
    write(tmp_path / f"{valid}.parquet", ROWS[:3])
    write(tmp_path / "test.json", ROWS[:2])

    splits = read_splits(settings(tmp_path), ("train", "valid", "test"))

    assert {split: [len(group.rows) for group in groups] for split, groups in splits.items()} == {
        "train": [10],
        "valid": [3],
        "test": [2],
    }


def test_only_wanted_splits_are_read(tmp_path):
    write(tmp_path / "train.jsonl")
    (tmp_path / "test.jsonl").write_text("broken", encoding="utf-8")

    assert set(read_splits(settings(tmp_path), ("train", "valid"))) == {"train", "valid"}


def test_a_single_file_is_the_training_set(tmp_path):
    path = write(tmp_path / "mine.jsonl")

    splits = read_splits(settings(path), ("train", "valid"))

    assert (len(splits["train"][0].rows), splits["valid"]) == (10, [])


def test_a_folder_without_data_says_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").touch()

    with refused(DataError, "found: notes.txt", key="data", place=str(tmp_path), allowed="train.jsonl or valid.jsonl"):
        read_splits(settings(tmp_path), ("train", "valid"))


@pytest.mark.parametrize("data", ["./nowhere", "/no/where", "~/no-such-folder", "data/", "rows.jsonl", "a/b/c"])
def test_a_path_that_does_not_exist_is_not_looked_up_elsewhere(data, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    with refused(DataError, "does not exist", key="data", allowed=""):
        read_splits(settings(data), ("train",))


@pytest.mark.parametrize(
    ("data", "meant"),
    [("data/trian", "data/train"), ("data/vaild", "data/valid.jsonl.gz"), ("rowz", "rows"), ("./rowz/", "rows")],
)
def test_a_misspelt_path_is_told_with_the_one_that_is_there(data, meant, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "valid.jsonl.gz").touch()
    (tmp_path / "rows").mkdir()

    with refused(DataError, "does not exist", key="data", allowed=meant):
        read_splits(settings(data), ("train",))


def test_what_is_neither_file_nor_folder_is_said_to_be_that():
    with refused(DataError, "data names /dev/null, which is no file and no folder", key="data"):
        read_splits(settings("/dev/null"), ("train",))


def test_a_name_below_a_folder_that_is_there_is_no_hub_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()

    with refused(DataError, "does not exist", key="data"):
        read_splits(settings("data/xyz"), ("train",))


def test_a_missing_column_is_an_error_that_names_the_file(tmp_path):
    path = write(tmp_path / "train.jsonl", [{"text": "a"}])

    with refused(DataError, key="chosen_feature", place="train.jsonl", allowed="text"):
        read_splits(settings(path), ("train",))


def entry(path, **others):
    return {"path": "json", "config": {"data_files": str(path)}, **others}


@pytest.fixture
def offline_datasets(tmp_path, monkeypatch):
    """The real ``datasets`` library, with its cache in the test's own folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def test_a_dataset_entry_is_read_by_its_splits(tmp_path, offline_datasets):
    path = write(tmp_path / "rows.jsonl")
    named = entry(path, train_split="train[:5]", valid_split="train[5:7]", test_split="train[7:]")

    splits = read_splits(settings(hf_dataset=named), ("train", "valid", "test"))

    assert [row.value for row in splits["train"][0].rows] == ROWS[:5]
    assert [row.value for row in splits["valid"][0].rows] == ROWS[5:7]
    assert splits["test"][0].rows[0].source == "json train[7:]:1"


@pytest.mark.parametrize("rows", [1, 4, 5, 10, 15, 25])
def test_a_dataset_entry_without_splits_trains_on_nine_tenths_and_validates_on_the_rest(
    rows, tmp_path, offline_datasets
):
    many = [{**ROWS[0], "number": number} for number in range(rows)]
    path = write(tmp_path / "rows.jsonl", many)

    splits = read_splits(settings(hf_dataset=entry(path)), ("train", "valid", "test"))

    assert [row.value for split in ("train", "valid") for row in splits[split][0].rows] == many
    assert "nine tenths of its rows, the rest is validated on" in splits["train"][0].note
    assert splits["test"] == []


def test_a_named_training_split_warns_of_a_default_validation_split_that_may_overlap(tmp_path, offline_datasets):
    path = write(tmp_path / "rows.jsonl")

    splits = read_splits(settings(hf_dataset=entry(path, train_split="train")), ("train", "valid"))

    assert splits["valid"][0].note == ("json train[90%:] may share rows with train_split train: set valid_split.")


def test_valid_fraction_replaces_the_default_validation_split(tmp_path, offline_datasets):
    path = write(tmp_path / "rows.jsonl")

    splits = read_splits(settings(hf_dataset=entry(path), valid_fraction=0.2), ("train", "valid"))

    assert splits["valid"] == []
    assert [row.value for row in splits["train"][0].rows] == ROWS  # of which the fraction is taken


def test_entries_of_one_path_have_sources_of_their_own(tmp_path, offline_datasets):
    files = [write(tmp_path / f"{name}.jsonl") for name in "ab"]
    (tmp_path / "set").mkdir()
    card = "configs:\n- {config_name: en, data_files: en.jsonl}\n- {config_name: de, data_files: de.jsonl}\n"
    (tmp_path / "set" / "README.md").write_text(f"---\n{card}---\n", encoding="utf-8")
    for name in ("en", "de"):
        write(tmp_path / "set" / f"{name}.jsonl", ROWS[:2])
    configured = [{"path": str(tmp_path / "set"), "config": name, "train_split": "train"} for name in ("en", "de")]
    entries = [*(entry(file, train_split="train") for file in files), *configured]

    groups = read_splits(settings(hf_dataset=entries), ("train",))["train"]

    sources = [row.source for group in groups for row in group.rows]
    assert len(set(sources)) == len(sources) == 24
    assert groups[2].name.endswith("en train")


def test_several_entries_follow_each_other_each_with_its_own_columns(tmp_path, offline_datasets):
    first = write(tmp_path / "first.jsonl")
    second = write(tmp_path / "second.jsonl", [{"good": "A cat.", "bad": "A dog.", "ask": "What is it?"}] * 4)
    entries = [
        entry(first, train_split="train"),
        entry(second, train_split="train", chosen_feature="good", rejected_feature="bad", prompt_feature="ask"),
    ]

    groups = read_splits(settings(hf_dataset=entries), ("train",))["train"]

    assert [len(group.rows) for group in groups] == [10, 4]
    assert [group.columns.chosen for group in groups] == ["auto", "good"]


def test_an_entry_without_a_path_is_an_error():
    with refused(DataError, key="hf_dataset"):
        read_splits(settings(hf_dataset=[{"name": "x"}]), ("train",))


def test_a_split_that_the_dataset_lacks_is_an_error_of_one_sentence(tmp_path, offline_datasets):
    path = write(tmp_path / "rows.jsonl")

    with refused(DataError, "nosuch", place="json"):
        read_splits(settings(hf_dataset=entry(path, train_split="nosuch")), ("train",))


class StandInHub(ModuleType):
    """The part of ``datasets`` that is asked for a dataset by name, answering without a network."""

    def __init__(self, found):
        super().__init__("datasets")
        self.exceptions = SimpleNamespace(DatasetNotFoundError=FileNotFoundError)
        self.config = SimpleNamespace(HF_HUB_OFFLINE=True)
        self._found = found

    def load_dataset(self, name, **options):
        self.saw_torch = "torch" in sys.modules
        if name not in self._found:
            raise FileNotFoundError(name)
        return self._found[name]


def test_a_hub_name_is_read_by_the_names_of_its_splits(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", StandInHub({"me/prefs": {"train": ROWS, "validation": ROWS[:2]}}))

    splits = read_splits(settings("me/prefs"), ("train", "valid", "test"))

    assert splits["train"][0].rows[2].source == "me/prefs train:3"
    assert len(splits["valid"][0].rows) == 2
    assert splits["test"] == []


def test_the_splits_of_pairs_are_taken_among_those_of_other_rows(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = {"train_sft": [], "train_prefs": ROWS, "test_sft": [], "test_prefs": ROWS[:2], "train_gen": []}
    monkeypatch.setitem(sys.modules, "datasets", StandInHub({"me/prefs": found}))

    splits = read_splits(settings("me/prefs"), ("train", "valid", "test"))

    assert [group.name for groups in splits.values() for group in groups] == [
        "me/prefs train_prefs",
        "me/prefs test_prefs",
    ]


def test_a_dataset_whose_splits_have_other_names_is_an_error_that_lists_them(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", StandInHub({"me/prefs": {"en": ROWS, "de": ROWS}}))

    with refused(DataError, key="hf_dataset", place="me/prefs", allowed="en, de"):
        read_splits(settings("me/prefs"), ("train",))


def test_a_hub_name_that_is_not_found_is_an_error_of_one_sentence(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", StandInHub({}))

    with refused(DataError, key="data", place="me/nothing", allowed=""):
        read_splits(settings("me/nothing"), ("train",))


@pytest.fixture
def hub_client(monkeypatch, tmp_path):
    """The client of the hub, which raises what it is told to; the names and seconds that it was asked with."""
    import datasets
    from huggingface_hub import HfApi

    asked, raised = [], []

    def dataset_info(self, name, timeout):
        asked.append((name, timeout))
        raise raised[0]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return SimpleNamespace(asked=asked, raised=raised, config=datasets.config)


def test_a_name_that_is_nowhere_is_refused_at_once_where_the_hub_does_not_answer(hub_client):
    hub_client.raised.append(OSError("Name or service not known"))

    with pytest.raises(DataError, match=r"the cache, and the .* hub cannot be reached \(Name or service not known\)"):
        read_splits(settings("me/nothing"), ("train",))

    assert hub_client.asked == [("me/nothing", reading.HUB_SECONDS)]
    assert hub_client.config.HF_HUB_OFFLINE is False, "as it was before"


def test_where_the_hub_answers_the_library_explains_what_is_wrong(hub_client, monkeypatch):
    import datasets
    from huggingface_hub.errors import HFValidationError

    hub_client.raised.append(HFValidationError("no such name"))

    def load_dataset(name):
        assert not hub_client.config.HF_HUB_OFFLINE
        raise datasets.exceptions.DatasetNotFoundError(name)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    with pytest.raises(DataError, match="neither as a local path nor on the Hugging Face hub"):
        read_splits(settings("me/nothing"), ("train",))


def test_a_torch_folder_without_pytorch_does_not_reach_the_dataset_library(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder, hub = ModuleType("torch"), StandInHub({"me/prefs": {"train": ROWS}})
    monkeypatch.setitem(sys.modules, "torch", folder)
    monkeypatch.setitem(sys.modules, "datasets", hub)

    read_splits(settings("me/prefs"), ("train",))

    assert not hub.saw_torch
    assert sys.modules["torch"] is folder
