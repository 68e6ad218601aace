"""Real preference files, in each of the published formats, through a real SentencePiece tokenizer."""

import json
from pathlib import Path

import pytest

from mlx_cpo_plugin.data import load_dataset
from mlx_cpo_plugin.settings.config import RunSettings

SHARED = Path(__file__).parents[3] / "shared"
FILES = {
    "hh_strings.jsonl": 46,
    "messages_dpo_mix.jsonl": 257,
    "openai_preference.jsonl": 284,
    "translation_prompt.jsonl": 1360,
}

pytestmark = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the shared folder with real rows is not there")


@pytest.fixture(scope="module")
def tokenizer():
    from mlx_lm.utils import load_tokenizer

    return load_tokenizer(SHARED / "models" / "stories260k-chat")


def last_answer(row, name):
    value = row[name]
    text = value if isinstance(value, str) else value[-1]["content"]
    return text.rpartition("\n\nAssistant:")[2].strip()


@pytest.mark.parametrize(("name", "count"), FILES.items())
@pytest.mark.slow
def test_every_row_is_used_and_scores_its_own_answer_and_end(name, count, tokenizer):
    path = SHARED / "data" / name
    settings = RunSettings.of({"data": str(path), "train": True, "max_seq_length": 100_000})

    train, _, _ = load_dataset(settings, tokenizer)

    assert (len(train), train.report.skipped) == (count, {})
    for row, pair in zip(map(json.loads, path.read_text(encoding="utf-8").splitlines()), train, strict=True):
        for side, columns in (
            ("chosen", ("chosen", "preferred_output")),
            ("rejected", ("rejected", "non_preferred_output")),
        ):
            answer = last_answer(row, next(column for column in columns if column in row))
            scored = tokenizer.decode(getattr(pair, side)[getattr(pair, f"{side}_scored")].tolist())
            assert scored.strip().endswith(f"{answer}</s>")
            assert scored.count("</s>") == 1
