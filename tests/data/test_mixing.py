"""Several sets are mixed by weights: how often an epoch has each training pair of a set."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.data_tokenizers import tokenizer_named
from support.refusals import refused
from support.tiny import build_pairs, saved_arrays

from mlx_cpo_plugin import train
from mlx_cpo_plugin.data import PreferenceDataset, load_dataset
from mlx_cpo_plugin.data.batches import BatchSize, training_plan
from mlx_cpo_plugin.data.dataset import spread_evenly
from mlx_cpo_plugin.data.tokens import Lengths, TruncatedPair
from mlx_cpo_plugin.errors import ConfigError, DataError
from mlx_cpo_plugin.settings.config import RunSettings, resolve
from mlx_cpo_plugin.settings.run_settings import recorded_settings
from mlx_cpo_plugin.studio.form import form_fields

weights = st.floats(0.01, 4).map(lambda weight: round(weight, 2))


def dataset(count: int) -> PreferenceDataset:
    return PreferenceDataset([TruncatedPair(pair, Lengths.of(pair)) for pair in build_pairs(count)])


def write(path: Path, name: str, count: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"What is {name} {i}?", "chosen": f"Yes, {i}.", "rejected": "No."} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(sets: list[dict[str, Any]], **settings: Any) -> tuple[PreferenceDataset, ...]:
    values = {"data": sets, "train": True, "max_seq_length": 512, **settings}
    return load_dataset(RunSettings.of(values), tokenizer_named("chatml"))


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=3), data=st.data(), seed=st.integers(0, 5))
def test_an_epoch_has_each_pair_as_often_as_its_weight_says(sizes: list[int], data: st.DataObject, seed: int) -> None:
    parts = [(str(i), data.draw(weights), dataset(size)) for i, size in enumerate(sizes)]

    mixed = PreferenceDataset.mixed(parts, seed)

    plan = training_plan([pair.length for pair in mixed], BatchSize(1), iters=len(mixed), seed=seed)
    seen = Counter(id(mixed[index]) for batch in plan for index in batch.indices)
    for _, weight, part in parts:
        times = [seen[id(pair)] for pair in part]
        assert all(int(weight) <= time <= int(weight) + 1 for time in times)
        assert abs(sum(times) - weight * len(part)) <= 0.5 + 1e-9 or sum(times) == 1
    assert mixed.report.pairs == sum(sizes)


@given(weight=weights, seed=st.integers(0, 5))
def test_the_draw_depends_on_the_seed_alone(weight: float, seed: int) -> None:
    first, again = (PreferenceDataset.mixed([("a", weight, dataset(9))], seed) for _ in range(2))

    assert [pair.prompt.tolist() for pair in first] == [pair.prompt.tolist() for pair in again]


def test_sets_are_files_and_folders_and_only_training_is_weighted(tmp_path: Path) -> None:
    write(tmp_path / "a" / "train.jsonl", "a", 4)
    write(tmp_path / "a" / "valid.jsonl", "v", 3)
    file = write(tmp_path / "b.jsonl", "b", 2)

    train, valid, _ = load([{"path": str(tmp_path / "a"), "weight": 3}, {"path": str(file)}])

    times = Counter(pair.source for pair in train)
    assert times == {f"{tmp_path}/a/train.jsonl:{i}": 3 for i in range(1, 5)} | {f"{file}:{i}": 1 for i in (1, 2)}
    assert len(valid) == 3
    assert (train.report.rows, train.report.pairs) == (6, 6)
    assert "An epoch has 14" in train.report.summary()


def test_rows_held_out_are_drawn_from_every_set_and_never_trained_on(tmp_path: Path) -> None:
    sets = [{"path": str(write(tmp_path / f"{name}.jsonl", name, 10)), "weight": 2} for name in "ab"]

    train, valid, _ = load(sets, valid_fraction=0.2)

    assert Counter(pair.source.rpartition(":")[0] for pair in valid) == {entry["path"]: 2 for entry in sets}
    assert len(train) == 32
    assert not {pair.source for pair in train} & {pair.source for pair in valid}


def test_a_set_of_one_row_is_trained_on_where_rows_are_held_out_of_others(tmp_path: Path) -> None:
    few, many = (write(tmp_path / f"{name}.jsonl", name, count) for name, count in (("a", 1), ("b", 5)))

    train, valid, _ = load([{"path": str(few)}, {"path": str(many)}], valid_fraction=0.4)

    assert Counter(pair.source.rpartition(":")[0] for pair in train) == {str(few): 1, str(many): 3}
    assert Counter(pair.source.rpartition(":")[0] for pair in valid) == {str(many): 2}
    with refused(DataError, "valid_fraction needs at least two usable training rows", key="valid_fraction"):
        load([{"path": str(few)}], valid_fraction=0.4)


@pytest.mark.parametrize("drawn", [False, True])
def test_a_validation_of_a_few_batches_has_its_share_of_every_set(tmp_path: Path, drawn: bool) -> None:
    split = "train" if drawn else "valid"
    for name, count in (("a", 40), ("b", 20)):
        write(tmp_path / name / "train.jsonl", name, 4)
        write(tmp_path / name / f"{split}.jsonl", name, count)

    _, valid, _ = load([{"path": str(tmp_path / name)} for name in "ab"], valid_fraction=0.5 if drawn else 0)

    for first in (3, 6, 15, 30):
        of_sets = Counter(Path(pair.source).parent.name for pair in valid[:first])
        assert of_sets == {"a": 2 * first / 3, "b": first / 3}


@given(st.lists(st.lists(st.integers(), max_size=9), max_size=5))
def test_what_is_spread_evenly_is_all_there_in_order_and_each_part_has_its_share(parts: list[list[int]]) -> None:
    named = [[(name, number) for number, _ in enumerate(part)] for name, part in enumerate(parts)]

    spread = spread_evenly(named)

    assert sorted(spread) == [item for part in named for item in part]
    for name, part in enumerate(named):
        assert [item for item in spread if item[0] == name] == part
        for first in range(len(spread)):
            share = first * len(part) / len(spread)
            assert abs(sum(item[0] == name for item in spread[:first]) - share) < len(parts)


def test_saved_data_sets_whose_folders_have_one_name_are_told_apart(tmp_path: Path) -> None:
    import datasets

    rows = [{"prompt": "Who?", "completions": ["A", "B"], "scores": [2, 1]}]
    for parent in "ab":
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / parent / "prefs"))

    train, _, _ = load([{"path": str(tmp_path / parent / "prefs")} for parent in "ab"])

    assert len({pair.source for pair in train}) == 2


def test_each_set_has_columns_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "Who?", "good": "Me.", "bad": "You."}) + "\n")
    own = {"path": str(tmp_path / "own.jsonl"), "chosen_feature": "good", "rejected_feature": "bad"}

    train, _, _ = load([own, {"path": str(write(tmp_path / "b.jsonl", "b", 2))}])

    assert len(train) == 3


def test_a_list_of_sets_is_written_in_yaml_or_on_the_command_line_and_recorded_with_whole_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "b.jsonl", "b", 2)
    (tmp_path / "my.yaml").write_text("train: true\ntrain_mode: cpo\ndata: [b.jsonl, {path: some/hub, weight: 2}]\n")
    wanted = [{"path": "b.jsonl"}, {"path": "some/hub", "weight": 2.0}]

    in_file = resolve(["--config", "my.yaml"]).settings
    in_call = resolve(["--train", "--train-mode", "cpo", "--data", "[b.jsonl, {path: some/hub, weight: 2}]"]).settings

    assert in_file.data == in_call.data == wanted
    assert recorded_settings(in_file)["data"] == [{"path": str(tmp_path / "b.jsonl")}, wanted[1]]


def test_entries_of_hf_dataset_are_recorded_with_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine" / "b.jsonl", "b", 2)
    (tmp_path / "json").mkdir()
    entries = [
        {"path": "mine", "config": "default"},
        {"path": "some/hub"},
        {"path": "json", "config": {"data_files": {"train": ["mine/*.jsonl", "https://example.org/b.jsonl"]}}},
    ]

    recorded = recorded_settings(resolve({"train_mode": "cpo", "train": True, "hf_dataset": entries}).settings)

    whole = {"train": [str(tmp_path / "mine/*.jsonl"), "https://example.org/b.jsonl"]}
    assert recorded["hf_dataset"] == [
        {"path": str(tmp_path / "mine"), "config": "default"},
        {"path": "some/hub"},
        {"path": "json", "config": {"data_files": whole}},
    ]


def test_null_in_a_set_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    own = {"path": str(write(tmp_path / "a.jsonl", "a", 3)), "weight": None, "chosen_feature": None}

    train, _, _ = load([own, {"path": str(write(tmp_path / "b.jsonl", "b", 2)), "weight": 2}])

    assert len(train) == 3 + 2 * 2


def test_entries_of_hf_dataset_have_weights_too(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    files = [write(tmp_path / f"{name}.jsonl", name, count) for name, count in (("a", 4), ("b", 3))]
    splits = {"path": "json", "train_split": "train", "valid_split": None}
    entries = [{**splits, "config": {"data_files": str(file)}} for file in files]

    train, _, _ = load_dataset(
        RunSettings.of(
            {
                "hf_dataset": [{**entries[0], "weight": 2}, {**entries[1], "weight": None}],
                "train": True,
                "max_seq_length": 512,
            }
        ),
        tokenizer_named("chatml"),
    )

    assert sorted(Counter(id(pair) for pair in train).values()) == [1] * 3 + [2] * 4


def test_the_form_holds_a_list_of_sets_as_it_holds_a_path() -> None:
    field = next(field for field in form_fields() if field.key == "data")

    for value in ("some/folder", [{"path": "a"}, {"path": "b", "weight": 2}]):
        assert field.value_of(field.content_of(value)) == value
        assert field.error_of(field.content_of(value)) == ""
    assert "weight" in field.error_of("[{path: a, weight: 0}]")


@pytest.mark.parametrize(
    ("sets", "key", "line"),
    [
        ("[]", "data", 3),
        ("\n  - {weight: 2}", "data.0", 4),
        ("\n  - {path: a}\n  - {path: b, weight: 0}", "data.1.weight", 5),
        ("\n  - {path: a}\n  - {path: b, weight: often}", "data.1.weight", 5),
        ("\n  - {path: a, wieght: 2}", "data.wieght", 4),
        ("\n  - {path: a}\n  - {path: a}", "data", 3),
        ("\n  - {path: a}\n  - {path: ./a/}", "data", 3),
        ("\n  - 7", "data.0", 4),
        ("{path: a}", "data", 3),
    ],
)
def test_a_mistake_in_the_list_names_its_line(tmp_path: Path, sets: str, key: str, line: int) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(f"train: true\ntrain_mode: cpo\ndata: {sets}\n")

    with refused(ConfigError, key=key, place=f"in {file}, line {line}"):
        resolve(["--config", str(file)])


def test_a_run_on_mixed_sets_goes_on_to_the_bit_and_with_other_weights_not_at_all(
    settings: dict[str, Any], run_main: Callable[..., None], tmp_path: Path
) -> None:
    sets = [{"path": settings["data"], "weight": 0.5}, {"path": str(write(tmp_path / "b.jsonl", "b", 3)), "weight": 2}]
    whole, parts = ({**settings, "data": sets, "adapter_path": str(tmp_path / name)} for name in ("whole", "parts"))
    train(**{**whole, "iters": 14})  # by a call, which takes lists of rows, too
    run_main({**parts, "iters": 9})

    run_main({**parts, "iters": 14, "resume": "auto"})

    adapters = [saved_arrays(Path(run["adapter_path"]) / "adapters.safetensors") for run in (whole, parts)]
    assert adapters[0] == adapters[1]
    with refused(ConfigError, key="data.1.weight"):
        run_main({**parts, "iters": 20, "resume": "auto", "data": [sets[0], {**sets[1], "weight": 3}]})
