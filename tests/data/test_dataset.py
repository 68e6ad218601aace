"""Splits become data sets of pairs, and every row that is left out is accounted for."""

import json
import subprocess
import sys

import numpy as np
import pytest
from support.data_tokenizers import tokenizer_named
from support.refusals import refused

from mlx_cpo_plugin.data import DataReport, PreferenceDataset, PreferencePair, as_pairs, load_dataset
from mlx_cpo_plugin.errors import DataError
from mlx_cpo_plugin.settings.config import RunSettings


def rows(count):
    return [{"prompt": f"What is {i}?", "chosen": f"Yes, the cat {i}.", "rejected": f"No {i}."} for i in range(count)]


def write(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def load(data, **others):
    settings = RunSettings.of({"data": str(data), "train": True, "max_seq_length": 512, "seed": 3, **others})
    return load_dataset(settings, tokenizer_named("chatml"))


def prompts(dataset):
    return [tokenizer_named("chatml").decode(pair.prompt.tolist()) for pair in dataset]


def test_each_split_that_is_asked_for_is_loaded(tmp_path):
    for split, count in (("train", 5), ("valid", 3), ("test", 2)):
        write(tmp_path / f"{split}.jsonl", rows(count))

    assert [len(dataset) for dataset in load(tmp_path, test=True)] == [5, 3, 2]
    assert [len(dataset) for dataset in load(tmp_path)] == [5, 3, 0]
    assert [len(dataset) for dataset in load(tmp_path, train=False, test=True)] == [0, 0, 2]


def test_pairs_are_in_the_order_of_their_rows_and_name_them(tmp_path):
    train, _, _ = load(write(tmp_path / "train.jsonl", rows(3)))

    assert [pair.source for pair in train] == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:3"]
    assert [pair.source for pair in train[1:]] == ["train.jsonl:2", "train.jsonl:3"]


def test_a_file_may_mix_formats(tmp_path):
    user, answer = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}
    mixed = [
        *rows(1),
        {"chosen": "One two", "rejected": "One three"},
        {"chosen": [user, answer], "rejected": [user, {"role": "assistant", "content": "You."}]},
        {"input": {"messages": [user]}, "preferred_output": [answer], "non_preferred_output": "No."},
    ]

    train, _, _ = load(write(tmp_path / "train.jsonl", mixed))

    assert train.report.pairs == 4


def test_unusable_rows_are_counted_by_reason_with_their_lines(tmp_path):
    items = rows(9)
    items[1]["rejected"] = items[1]["chosen"]
    items[4]["rejected"] = items[4]["chosen"]
    items[6]["chosen"] = " "

    train, _, _ = load(write(tmp_path / "train.jsonl", items))

    assert train.report.skipped == {
        "both answers are the same": ["train.jsonl:2", "train.jsonl:5"],
        "an answer is empty": ["train.jsonl:7"],
    }
    assert train.report.summary() == (
        "Train: 9 rows, 6 pairs, 3 skipped "
        "(both answers are the same: train.jsonl:2, train.jsonl:5; an answer is empty: train.jsonl:7)."
    )


def test_half_unusable_is_accepted_and_more_is_an_error(tmp_path):
    same = {"prompt": "Who?", "chosen": "Me.", "rejected": "Me."}

    train, _, _ = load(write(tmp_path / "half.jsonl", rows(4) + [same] * 4))
    with pytest.raises(DataError, match=r"^5 of 9 rows .* because both answers are the same .* 2 more\)") as caught:
        load(write(tmp_path / "more.jsonl", rows(4) + [same] * 5))

    assert len(train) == 4
    assert caught.value.place == "more.jsonl:5"


def test_the_report_counts_what_was_cut_and_how_long_the_parts_are(tmp_path):
    items = [*rows(2), {"prompt": "cat " * 40, "chosen": "Yes.", "rejected": "No."}]
    items.append({"prompt": "Who?", "chosen": "dog " * 40, "rejected": "No."})

    file = write(tmp_path / "train.jsonl", items)
    pairs, whole = (load(file, max_seq_length=length)[0] for length in (32, 512))
    report = pairs.report

    assert (report.prompts_cut, report.answers_cut) == (1, 1)
    assert report.summary() == "Train: 4 rows, 4 pairs, prompt cut in 1, answer cut in 1."
    assert [pair.length for pair in pairs[2:]] == [32, 32]
    for part, lengths in report.lengths.items():
        assert lengths.tolist() == [len(getattr(pair, part)) for pair in whole]
    assert report.max_seq_length_for(0.5) == sorted(pair.length for pair in whole)[1]
    assert report.max_seq_length_for(1) == max(pair.length for pair in whole)


@pytest.mark.parametrize(("split", "wanted"), [("train", {"train": True}), ("test", {"test": True})])
def test_a_split_that_is_asked_for_and_missing_is_an_error(tmp_path, split, wanted):
    write(tmp_path / "valid.jsonl", rows(2))
    write(tmp_path / ("test.jsonl" if split == "train" else "train.jsonl"), rows(2))

    with refused(DataError, key=split):
        load(tmp_path, **{"train": True, "test": True, **wanted})


def test_without_a_validation_set_it_is_skipped_with_a_note(tmp_path):
    _, valid, _ = load(write(tmp_path / "train.jsonl", rows(4)))

    assert len(valid) == 0
    assert valid.report.summary() == (
        "Valid: No validation set, so validation is skipped; valid_fraction takes one from the training set."
    )


def test_valid_fraction_takes_a_validation_set_from_the_training_rows(tmp_path):
    path = write(tmp_path / "train.jsonl", rows(20))

    train, valid, _ = load(path, valid_fraction=0.25)
    again = load(path, valid_fraction=0.25)
    other_seed = load(path, valid_fraction=0.25, seed=4)

    assert (len(train), len(valid)) == (15, 5)
    assert sorted(prompts(train) + prompts(valid)) == sorted(prompts(load(path)[0]))
    assert prompts(again[1]) == prompts(valid)
    assert prompts(other_seed[1]) != prompts(valid)
    assert valid.report.summary() == (
        "Valid: 5 rows, 5 pairs. Drawn from the training set (valid_fraction 0.25, seed 3)."
    )


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_valid_fraction_leaves_at_least_one_row_on_either_side(tmp_path, fraction):
    train, valid, _ = load(write(tmp_path / "train.jsonl", rows(2)), valid_fraction=fraction)

    assert (len(train), len(valid)) == (1, 1)


def test_valid_fraction_does_not_touch_a_validation_set_that_is_there(tmp_path):
    write(tmp_path / "train.jsonl", rows(4))
    write(tmp_path / "valid.jsonl", rows(1))

    assert [len(dataset) for dataset in load(tmp_path, valid_fraction=0.5)] == [4, 1, 0]


def test_valid_fraction_of_a_single_row_is_an_error(tmp_path):
    with refused(DataError, key="valid_fraction"):
        load(write(tmp_path / "train.jsonl", rows(1)), valid_fraction=0.5)


def test_a_validation_split_that_may_overlap_is_named_in_the_report():
    report = DataReport(split="valid", rows=2, pairs=2, notes=("Set valid_split.",))

    assert report.summary() == "Valid: 2 rows, 2 pairs. Set valid_split."


# Data that is tokenised already.


def test_pairs_and_their_data_sets_are_taken_as_they_are(tmp_path):
    train, _, _ = load(write(tmp_path / "train.jsonl", rows(3)))

    assert as_pairs(train) is train
    assert as_pairs(train, max_seq_length=512) is train
    assert list(as_pairs(list(train))) == list(train)
    assert len(as_pairs(None)) == 0


def test_pairs_are_cut_where_a_length_is_given(tmp_path):
    train, _, _ = load(write(tmp_path / "train.jsonl", rows(3)))

    cut = as_pairs(train, max_seq_length=16)

    assert max(pair.length for pair in cut) == 16
    assert cut.report.prompts_cut == 3


def items_of_the_host(**lengths):
    return [{"chosen": [1, 2, 3, 4, 5], "rejected": [1, 2, 3, 6], **lengths}]


def test_tokenised_items_score_what_lies_behind_their_prompt_length():
    (pair,) = as_pairs(items_of_the_host(chosen_prompt_length=2, rejected_prompt_length=3))

    assert pair.prompt.tolist() == [1, 2]
    assert (pair.chosen.tolist(), pair.chosen_scored.tolist()) == ([3, 4, 5], [True, True, True])
    assert (pair.rejected.tolist(), pair.rejected_scored.tolist()) == ([3, 6], [False, True])


def test_tokenised_items_without_prompt_lengths_part_where_their_tokens_do():
    (pair,) = as_pairs(items_of_the_host())

    assert (pair.prompt.tolist(), pair.chosen.tolist(), pair.rejected.tolist()) == ([1, 2, 3], [4, 5], [6])


def test_data_sets_of_mlx_lm_lora_are_taken():
    from mlx_lm_lora.trainer.datasets import CacheDataset, DPODataset

    tokenizer = tokenizer_named("chatml")

    pairs = as_pairs(CacheDataset(DPODataset(rows(3), tokenizer)))

    assert len(pairs) == 3
    assert tokenizer.decode(pairs[1].prompt.tolist()).endswith("What is 1?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(pairs[1].chosen.tolist()) == "Yes, the cat 1.<|im_end|>\n"


def test_tokenised_items_without_a_preference_are_left_out():
    same = {"chosen": [1, 2], "rejected": [1, 2]}
    no_prompt = {"chosen": [1, 2], "rejected": [3], "chosen_prompt_length": 0, "rejected_prompt_length": 0}

    pairs = as_pairs([*items_of_the_host(), *items_of_the_host(), same, no_prompt])

    assert (len(pairs), sum(map(len, pairs.report.skipped.values()))) == (2, 2)


@pytest.mark.parametrize("item", ["text", None, 1, ["chosen", "rejected"]])
def test_items_that_are_not_tokenised_are_an_error(item):
    with refused(DataError, place="item 1"):
        as_pairs([*items_of_the_host(), item])


def test_a_data_set_is_a_sequence():
    dataset = PreferenceDataset()

    assert list(dataset) == []
    assert dataset.report.summary() == "Train: none."
    with pytest.raises(IndexError):
        dataset[0]


def test_pairs_of_a_list_keep_their_arrays():
    pair = PreferencePair(
        *(np.array(ids, dtype=np.int32) for ids in ([1], [2], [3])), np.array([True]), np.array([True])
    )

    assert as_pairs([pair])[0] is pair


def test_importing_the_data_package_needs_neither_mlx_nor_transformers():
    code = (
        "import sys, mlx_cpo_plugin.data; "
        "sys.exit(any(name in sys.modules for name in ('mlx', 'transformers', 'datasets', 'pyarrow')))"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_rows_that_the_settings_leave_out_for_their_length_are_counted_but_not_taken_for_mistakes(tmp_path):
    file = write(tmp_path / "train.jsonl", [*rows(1), *({**row, "prompt": "cat " * 40} for row in rows(3))])

    report = load(file, max_seq_length=32, overlong="drop")[0].report

    assert report.summary().startswith(
        "Train: 4 rows, 1 pair, 3 skipped (longer than max_seq_length 32: train.jsonl:2,"
    )
    with refused(DataError, key="max_seq_length", place="train.jsonl"):
        load(file, max_seq_length=4, overlong="drop")
    broken = write(tmp_path / "broken.jsonl", [*({**row, "rejected": None} for row in rows(9)), *rows(1)])
    with refused(DataError, "9 of 10"):
        load(broken, max_seq_length=4, overlong="drop")
