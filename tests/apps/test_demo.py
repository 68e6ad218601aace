"""The embedded demonstration: its rows, its model, and the run that ``mlx-cpo demo`` makes of them."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import pytest
import yaml

from mlx_cpo_plugin.demo import make_model, run
from mlx_cpo_plugin.demo.make_rows import DATA_DIR, SEED, write_rows
from mlx_cpo_plugin.demo.shop import make_facts
from mlx_cpo_plugin.errors import StoppedError

SPLITS = ("train", "valid", "test")
HELD_OUT = ("valid", "test")
FACT_OF = {fact.question(phrasing): fact for fact in make_facts(SEED) for phrasing in range(3)}


def rows_of(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA_DIR / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_there_are_enough_rows_to_train_validate_and_test() -> None:
    assert {split: len(rows_of(split)) for split in SPLITS} == {"train": 280, "valid": 40, "test": 60}


@pytest.mark.parametrize("split", SPLITS)
def test_every_row_is_a_question_with_two_different_answers(split: str) -> None:
    for row in rows_of(split):
        assert set(row) == {"prompt", "chosen", "rejected"}
        assert row["prompt"] in FACT_OF
        assert row["chosen"] != row["rejected"]
        assert row["chosen"][-1] in ".?!"
        assert row["rejected"][-1] in ".?!"


@pytest.mark.parametrize("split", SPLITS)
def test_every_chosen_answer_states_the_fact(split: str) -> None:
    for row in rows_of(split):
        assert FACT_OF[row["prompt"]].value in row["chosen"]


@pytest.mark.parametrize("split", SPLITS)
def test_neither_side_is_always_the_longer_one(split: str) -> None:
    rows = rows_of(split)

    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in rows)

    assert 0.15 < longer / len(rows) < 0.85


@pytest.mark.parametrize("split", HELD_OUT)
def test_no_fact_of_a_held_out_question_is_asked_for_in_training(split: str) -> None:
    trained = {FACT_OF[row["prompt"]] for row in rows_of("train")}

    held_out = {FACT_OF[row["prompt"]] for row in rows_of(split)}

    assert held_out.isdisjoint(trained)


def test_validation_and_test_rows_share_no_fact() -> None:
    valid, test = ({FACT_OF[row["prompt"]] for row in rows_of(split)} for split in HELD_OUT)

    assert valid.isdisjoint(test)


def test_the_shown_prompts_are_held_out() -> None:
    assert set(run.SHOWN_PROMPTS) <= {row["prompt"] for row in rows_of("test")}


def test_the_script_writes_the_same_rows_again_to_the_byte(tmp_path: Path) -> None:
    write_rows(tmp_path)

    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (DATA_DIR / f"{split}.jsonl").read_bytes()


def test_the_model_takes_at_most_three_megabytes() -> None:
    size = sum(path.stat().st_size for path in make_model.MODEL_DIR.iterdir())

    assert size <= 3_000_000


def test_the_model_was_trained_on_prompts_as_its_chat_template_renders_them() -> None:
    from mlx_lm.utils import load_tokenizer

    tokenizer = load_tokenizer(make_model.MODEL_DIR)

    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Where is the scarf?"}], add_generation_prompt=True, tokenize=False
    )

    assert rendered == make_model.prompt_text("Where is the scarf?")


def test_the_script_makes_a_model_that_mlx_lm_loads_and_runs(tmp_path: Path) -> None:
    from mlx_lm import generate, load

    facts = make_facts(SEED)
    tokenizer = make_model.train_tokenizer(facts, SEED)
    model = make_model.train_model(facts, tokenizer, steps=2, batch_size=2, seed=SEED)

    make_model.save(model, tokenizer, tmp_path)

    loaded, loaded_tokenizer = load(str(tmp_path))
    assert loaded_tokenizer.eos_token == make_model.END
    assert isinstance(generate(loaded, loaded_tokenizer, prompt="Where", max_tokens=2), str)


def test_full_paths_replace_those_of_the_config_and_comments_stay() -> None:
    text = "# Top.\nmodel: here  # local\ndata: there\nbeta: 0.1  # small\n"

    changed = run.with_paths(text, {"model": Path("/a b/ #1"), "data": Path("C:\\rows")})

    assert yaml.safe_load(changed) == {"model": str(Path("/a b/ #1")), "data": str(Path("C:\\rows")), "beta": 0.1}
    assert changed.startswith("# Top.\n")
    assert changed.endswith("beta: 0.1  # small\n")


def test_a_demo_that_changes_nothing_ends_with_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unchanged = run.Measurement(accuracy=0.5, margin=0.0, answers=("a", "b", "c"))
    monkeypatch.setattr(run, "measure", lambda settings, adapter_path=None: unchanged)
    monkeypatch.setattr("mlx_lm_lora.train.main", lambda args: None)

    assert run.run_demo(tmp_path) == 1


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (StoppedError(40, 15, "resume it"), 143)])
def test_a_demo_that_is_interrupted_leaves_nothing_and_gives_no_advice(
    error: BaseException,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(settings: object) -> None:
        raise error

    monkeypatch.setattr(run, "measure", interrupt)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    assert run.run_demo() == code

    assert capsys.readouterr().err.strip() == "The demo was interrupted; nothing of it is kept."
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_demo_turns_a_curt_model_into_a_helpful_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    exit_code = run.run_demo(tmp_path)

    captured = capfd.readouterr()
    accuracies = re.search(r"preference accuracy\s+([\d.]+)%\s+([\d.]+)%", captured.out)
    assert exit_code == 0
    assert accuracies is not None
    before, after = (float(number) for number in accuracies.groups())
    assert before <= 70
    assert after >= 95
    answers = re.findall(r"^  (before|after): +(.+)$", captured.out, flags=re.MULTILINE)
    assert [when for when, _ in answers] == ["before", "after"] * len(run.SHOWN_PROMPTS)
    for prompt, (_, old), (_, new) in zip(run.SHOWN_PROMPTS, answers[::2], answers[1::2], strict=True):
        fact = FACT_OF[prompt]
        assert fact.value in new
        assert new.endswith(fact.kind.offers)
        assert not old.endswith(fact.kind.offers)
    assert "Training: 100%" in captured.err
    assert (tmp_path / "adapters" / "adapters.safetensors").is_file()
