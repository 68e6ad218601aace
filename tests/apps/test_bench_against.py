"""``mlx-cpo bench --against``: trainers of other projects on the same rows, each run by a Python of its own."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import yaml
from mlx_lm.utils import load
from support.tiny import build_pairs

from mlx_cpo_plugin import __main__ as entry
from mlx_cpo_plugin import cli
from mlx_cpo_plugin.bench import against_report, cases, host_trainer, runs, worker
from mlx_cpo_plugin.bench.against import Contest, differences_of_tokens, hold_contest
from mlx_cpo_plugin.bench.cases import Case, case_of_config, case_of_shape
from mlx_cpo_plugin.bench.host_trainer import host_row
from mlx_cpo_plugin.bench.job import COUNT, EPOCH, HOST, PLUGIN, TIME, TRL, UNSLOTH, Job, Measurement
from mlx_cpo_plugin.bench.random_model import case_in_folder, random_model
from mlx_cpo_plugin.bench.report import processor_name
from mlx_cpo_plugin.bench.runs import MeasurementError
from mlx_cpo_plugin.bench.shapes import Shape
from mlx_cpo_plugin.errors import ConfigError, DataError
from mlx_cpo_plugin.settings.config import RunSettings

TINY = Shape(prompt=20, chosen=9, rejected=6, batch=2, vocabulary=80, hidden=64, layers=2)

# Stands for the Python of another trainer: "trains" on rows of numbers, and leaves what such a process would.
PEER = """\
#!{python} -S
import json, pathlib, sys
folder = pathlib.Path(sys.argv[3])
job = json.loads((folder / "job.json").read_text())
ids = lambda row, side: [int(word) for word in (row["prompt"] + row[side]).split()]
rows = [
    {{side: ids(row, side) + {extra}, side + "_prompt_length": len(row["prompt"].split())}}
    for row in job["rows"] for side in ("chosen", "rejected")
]
rows = [first | second for first, second in zip(rows[::2], rows[1::2])]
batches = job["batches"]
for number, batch in enumerate(batches, 1):
    print(f"\\nfinished iteration {{number}}", flush=True)
found = dict(
    seconds=[9.0] + [{seconds}] * (len(batches) - 1), processor_seconds=[1.0] * len(batches),
    scored_tokens=[1] * len(batches), peak_memory=None, peak_resident=5 * 10**9,
    losses=[float('{loss}')] * len(batches), blas="a BLAS", dtype="float32", row_tokens=rows,
)
(folder / "measurement.json").write_text(json.dumps(found))
"""


def quiet(text: str) -> None:
    """Takes progress and says nothing."""


@dataclass
class Peers:
    """Pythons of other trainers, and the jobs that were given to any trainer; a loss is 0.7 unless said otherwise."""

    folder: Path
    jobs: dict[str, list[Job]] = field(default_factory=dict)
    fails: tuple[str, ...] = ()

    def python(self, name: str = "peer", *, seconds: float = 6.0, loss: float = 0.7, extra: Sequence[int] = ()) -> str:
        """Return a program that acts as the Python of another trainer."""
        program = self.folder / name
        text = PEER.format(python=sys.executable, seconds=seconds, loss=loss, extra=list(extra))
        program.write_text(text)
        program.chmod(0o755)
        return str(program)


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Peers:
    """Other trainers are small programs; ours and the host take 1 and 4 seconds an iteration without a process."""
    peers = Peers(tmp_path)
    start = runs.run_worker

    def work(command: Sequence[str], environment: dict[str, str], progress: Callable[[str], None]) -> None:
        folder = Path(command[-1])
        job = Job.load(folder)
        peers.jobs.setdefault(job.trainer, []).append(job)
        if job.trainer in peers.fails:
            raise MeasurementError(f"{job.trainer} was killed.")
        if command[0] != sys.executable:
            start(command, environment, progress)
            return
        seconds = 4.0 if job.trainer == HOST else 1.0
        count = len(job.batches)
        Measurement(
            seconds=[9.0, *[seconds] * (count - 1)],
            processor_seconds=[1.0] * count,
            scored_tokens=[1] * count,
            peak_memory=2_000_000,
            peak_resident=3_000_000,
            losses=[0.7] * count,
            blas="OpenBLAS",
            dtype="float32",
        ).save(folder)

    monkeypatch.setattr(runs, "run_worker", work)
    return peers


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """Six pairs in micro-batches of two."""
    folder = tmp_path / "model"
    folder.mkdir()
    return case_in_folder(TINY, 6, folder)


def contest_of(case: Case, trainers: Sequence[str], pythons: dict[str, str], rounds: int = 1) -> Contest:
    """Two timed micro-batches of each."""
    return hold_contest(case, trainers, pythons, iterations=2, rounds=rounds, say=quiet)


class TestTheSameMicroBatches:
    def test_every_trainer_gets_the_same_rows_in_the_same_order(self, peers: Peers, case: Case) -> None:
        contest_of(case, [HOST, TRL, UNSLOTH], {TRL: peers.python("trl"), UNSLOTH: peers.python("unsloth")})

        ours, host, trl, unsloth = (peers.jobs[name][0] for name in (PLUGIN, HOST, TRL, UNSLOTH))
        assert ours.batches == host.batches == case.batches(3)
        order = [index for batch in ours.batches for index in batch]
        expected = [case.pairs[index].chosen.tolist() for index in order]
        for job in (trl, unsloth):
            assert job.task == TIME
            assert [[int(word) for word in row["chosen"].split()] for row in job.rows] == expected

    def test_what_a_trainer_takes_is_told_by_the_pair_and_as_a_multiple_of_ours(self, peers: Peers, case: Case) -> None:
        contest = contest_of(case, [HOST, TRL], {TRL: peers.python()}, rounds=3)

        same = contest.timings[TIME]
        # The first of three micro-batches of two pairs warms up.
        assert {name: timing.seconds_per_pair for name, timing in same.items()} == {
            PLUGIN: [0.5] * 3,
            HOST: [2.0] * 3,
            TRL: [3.0] * 3,
        }
        assert [contest.ratio(TIME, name) for name in same] == [1.0, 4.0, 6.0]
        assert same[TRL].peak_memory is None
        assert contest.failures == {}

    def test_trainers_take_turns(self, peers: Peers, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        said: list[str] = []

        hold_contest(case, [HOST], {}, iterations=1, rounds=2, say=said.append)

        turns = [text.removeprefix(f"{case.name}: ") for text in said if "iteration" not in text]
        timed = [f"{name}, time {turn} of 2" for turn in (1, 2) for name in (PLUGIN, HOST)]
        assert turns[:4] == timed

    @pytest.mark.parametrize("loss", [0.71, math.nan])
    def test_other_losses_on_the_same_tokens_are_a_failure(self, loss: float, peers: Peers, case: Case) -> None:
        contest = contest_of(case, [TRL, UNSLOTH], {TRL: peers.python(), UNSLOTH: peers.python("off", loss=loss)})

        assert [*contest.failures] == [UNSLOTH]
        assert f"other losses than mlx-cpo-plugin on the same tokens ({loss:.4g}" in contest.failures[UNSLOTH]

    def test_other_tokens_are_named_with_what_they_do_to_the_losses(self, peers: Peers, case: Case) -> None:
        contest = contest_of(case, [TRL], {TRL: peers.python(loss=0.77, extra=[5])})

        assert contest.failures == {}
        assert "TRL: '5' more at the end (12 of 12 sequences)" in contest.notes
        assert any("its losses differ from mlx-cpo-plugin's by 10.00% at most" in note for note in contest.notes)

    def test_a_trainer_that_fails_is_left_out_and_the_others_go_on(self, peers: Peers, case: Case) -> None:
        peers.fails = (HOST,)

        contest = contest_of(case, [HOST, TRL], {TRL: peers.python()})

        assert contest.failures == {HOST: f"{HOST} was killed."}
        assert [[*timings] for timings in contest.timings.values()] == [[PLUGIN, TRL]] * 2
        assert len(peers.jobs[HOST]) == 1

    def test_without_figures_of_this_trainer_there_is_nothing_to_compare(self, peers: Peers, case: Case) -> None:
        peers.fails = (PLUGIN,)

        with pytest.raises(MeasurementError, match="mlx-cpo-plugin was killed"):
            contest_of(case, [HOST], {})

    def test_fewer_rows_than_a_micro_batch_are_refused(self, case: Case) -> None:
        with pytest.raises(ConfigError, match="there are 1 rows, and batch_size is 2"):
            contest_of(replace(case, pairs=case.pairs[:1]), [HOST], {})


class TestAnEpoch:
    def test_every_trainer_gets_all_rows_and_the_first_iteration_counts(self, peers: Peers, case: Case) -> None:
        contest = contest_of(case, [HOST, TRL], {TRL: peers.python()})

        assert [job.task for job in peers.jobs[TRL]] == [TIME, EPOCH]
        assert peers.jobs[TRL][1].rows == list(case.rows)
        assert sorted(index for batch in peers.jobs[PLUGIN][1].batches for index in batch) == [*range(6)]
        assert contest.timings[EPOCH][TRL].seconds_per_pair == [(9.0 + 6.0 + 6.0) / 6]

    def test_mlx_lm_lora_is_counted_by_the_full_micro_batches_that_it_draws(self, peers: Peers, case: Case) -> None:
        short = replace(case, pairs=case.pairs[:5], rows=case.rows[:5])

        contest = contest_of(short, [HOST], {})

        assert contest.timings[EPOCH][HOST].seconds_per_pair == [(9.0 + 4.0 + 4.0) / 6]
        assert contest.timings[EPOCH][PLUGIN].seconds_per_pair == [(9.0 + 1.0 + 1.0) / 5]

    @pytest.mark.parametrize("task", [TIME, EPOCH])
    def test_mlx_lm_lora_draws_its_own_batches_in_an_epoch_alone(
        self, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case = case_of_shape(TINY, 4)
        cases.save_pairs(tmp_path / "pairs.npz", case.pairs)
        settings = vars(case.settings) | {"iters": 1}
        Job(HOST, task, settings, case.model_config, [[0, 1]], str(tmp_path / "pairs.npz")).save(tmp_path)
        given: list[Any] = []

        def train(model: Any, optimizer: Any, pairs: Any, batches: Any, *_: Any) -> Any:
            given.append(batches)
            raise KeyboardInterrupt

        monkeypatch.setattr(host_trainer, "train", train)
        with pytest.raises(KeyboardInterrupt):
            worker.measure(Job.load(tmp_path), tmp_path)

        assert given == [None if task == EPOCH else [[0, 1]]]


def stop_at(process: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ctrl-C be pressed while the process of this number, from 1, is measured."""
    work, left = runs.run_worker, [process]

    def interrupted(*given: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        work(*given)

    monkeypatch.setattr(runs, "run_worker", interrupted)


class TestCtrlC:
    """Two rounds of three trainers: processes 1 to 6 on the same micro-batches, 7 to 12 over an epoch."""

    @pytest.mark.parametrize(
        ("process", "expected"),
        [
            (2, {TIME: {PLUGIN: 1}}),
            (3, {TIME: {PLUGIN: 1, HOST: 1}}),
            (5, {TIME: {PLUGIN: 1, HOST: 1, TRL: 1}}),
            (7, {TIME: {PLUGIN: 2, HOST: 2, TRL: 2}}),
            (9, {TIME: {PLUGIN: 2, HOST: 2, TRL: 2}, EPOCH: {PLUGIN: 1, HOST: 1}}),
            (11, {TIME: {PLUGIN: 2, HOST: 2, TRL: 2}, EPOCH: {PLUGIN: 1, HOST: 1, TRL: 1}}),
        ],
    )
    def test_what_was_measured_in_whole_rounds_is_kept(
        self,
        process: int,
        expected: dict[str, dict[str, int]],
        peers: Peers,
        case: Case,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        stop_at(process, monkeypatch)

        contest = contest_of(case, [HOST, TRL], {TRL: peers.python()}, rounds=2)

        rounds = {
            mode: {name: len(timing.seconds_per_pair) for name, timing in timings.items()}
            for mode, timings in contest.timings.items()
        }
        assert rounds == expected
        assert contest.stopped
        assert contest.failures == {}
        assert "stopped by Ctrl-C" in against_report.table(contest)

    def test_before_this_trainer_was_measured_there_is_nothing_to_keep(
        self, peers: Peers, case: Case, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop_at(1, monkeypatch)

        with pytest.raises(KeyboardInterrupt):
            contest_of(case, [HOST], {})

    def test_the_command_prints_and_writes_what_there_is_and_begins_no_other_case(
        self, peers: Peers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stop_at(2, monkeypatch)
        file = tmp_path / "figures.json"

        arguments = ["--shape", str(TINY), "--rows", "6", "--against", "host", "--json", str(file)]
        monkeypatch.setattr(sys, "argv", ["mlx-cpo", "bench", *arguments])
        assert entry.main() == 130

        printed = capsys.readouterr()
        assert "the same micro-batches" in printed.out
        assert "an epoch" not in printed.out
        assert "interrupted" in printed.err
        (figures,) = json.loads(file.read_text())["cases"]
        assert figures["stopped"]
        assert [*figures["modes"]] == [TIME]


def row(prompt: Sequence[int], chosen: Sequence[int], start: int | None = None) -> dict[str, Any]:
    """Both sides alike, with an answer that begins after the prompt or at ``start``."""
    tokens, length = [*prompt, *chosen], len(prompt) if start is None else start
    return {"chosen": tokens, "rejected": tokens, "chosen_prompt_length": length, "rejected_prompt_length": length}


def decode(tokens: Sequence[int]) -> str:
    """Letters of the alphabet."""
    return "".join(chr(ord("a") + token) for token in tokens)


class TestDifferencesOfTokens:
    @pytest.mark.parametrize(
        ("theirs", "expected"),
        [
            (row([1, 2, 3], [4, 5]), []),
            (row([1, 2, 3], [4, 5, 6, 7]), ["'gh' more at the end"]),
            (row([1, 2, 3], [4]), ["no 'f' at the end"]),
            (row([1, 2, 3], [4, 6]), ["'g' in place of 'f' at the end"]),
            (row([0, 1, 2, 3], [4, 5]), ["'a' more at the start"]),
            (row([2, 3], [4, 5]), ["no 'b' at the start"]),
            (row([0, 1, 2, 3], [4, 5, 6]), ["'a' more at the start", "'g' more at the end"]),
            (row([1, 9, 3], [4, 5]), ["other tokens inside"]),
            (row([1, 2, 2, 3], [4, 5]), ["other tokens inside"]),
            (row([1, 2, 3], [4, 5], start=4), ["scores from 1 tokens later on"]),
            (row([0, 1, 2, 3], [4, 5], start=3), ["'a' more at the start", "scores from 1 tokens earlier on"]),
        ],
    )
    def test_each_kind_is_named_once_with_its_count(self, theirs: dict[str, Any], expected: list[str]) -> None:
        ours = row([1, 2, 3], [4, 5])

        assert differences_of_tokens([ours], [theirs], decode) == [f"{kind} (2 of 2 sequences)" for kind in expected]

    def test_rows_without_a_difference_count_to_the_whole_only(self) -> None:
        ours = row([1, 2], [3])

        assert differences_of_tokens([ours] * 3, [ours, row([1, 2], [3, 0]), ours], decode) == [
            "'a' more at the end (2 of 6 sequences)"
        ]


class TestModelsInFolders:
    @pytest.mark.parametrize("shape", [TINY, replace(TINY, architecture="qwen3", dtype="bfloat16")], ids=str)
    def test_the_folder_holds_the_random_model_and_its_text_has_the_tokens_of_the_pairs(
        self, shape: Shape, tmp_path: Path
    ) -> None:
        case = case_in_folder(shape, 3, tmp_path)

        model, tokenizer = load(str(tmp_path))
        tokens = mx.array([[3, 1, 4, 1, 5]])
        expected = random_model(shape.model_config(), case.settings.seed)
        assert mx.array_equal(model(tokens), expected(tokens))
        assert model(tokens).dtype == getattr(mx, shape.dtype)
        for pair, text in zip(case.pairs, case.rows, strict=True):
            for side in ("chosen", "rejected"):
                ids = tokenizer.encode(text["prompt"] + text[side], add_special_tokens=False)
                assert ids == host_row(pair)[side]
                # Other trainers append it where it is missing.
                assert ids[-1] == tokenizer.eos_token_id

    def test_a_base_of_four_bits_is_for_mlx_alone(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="TRL cannot read a base of 4 bits"):
            case_in_folder(replace(TINY, bits=4), 2, tmp_path)

    def test_a_shape_of_four_bits_is_quantised_and_the_rest_has_its_dtype(self) -> None:
        model = random_model(replace(TINY, bits=4, dtype="bfloat16").model_config(), seed=0)

        assert worker.dtype_of(model) == "4 bits"
        assert model.model.norm.weight.dtype == mx.bfloat16

    @pytest.mark.parametrize("task", [TIME, COUNT])
    def test_adapters_are_zero_where_losses_are_compared_and_filled_where_gradients_are(self, task: str) -> None:
        case = case_of_shape(TINY)
        job = Job(PLUGIN, task, vars(case.settings), case.model_config, [], "")

        model = worker.build_model(job, RunSettings.of(job.settings))

        filled = [bool(mx.any(layer.self_attn.q_proj.lora_b != 0)) for layer in model.layers]
        assert filled == [task == COUNT] * 2


class TestCasesForAll:
    @pytest.fixture
    def config(self, settings: dict[str, Any], tmp_path: Path) -> Path:
        file = tmp_path / "my.yaml"
        file.write_text(yaml.safe_dump(settings | {"max_seq_length": 80}))
        return file

    def test_rows_go_with_the_pairs_that_were_made_of_them(self, config: Path) -> None:
        case = case_of_config(config, 5, shared=True)

        assert len(case.pairs) == len(case.rows) == 5
        tokenizer = cases.load_chat_tokenizer(case.settings.model)
        for pair, text in zip(case.pairs, case.rows, strict=True):
            assert text["chosen"][-1]["role"] == "assistant"
            assert text["chosen"][-1]["content"].strip() in tokenizer.decode(pair.chosen.tolist())
            assert text["prompt"][-1]["content"].strip() in tokenizer.decode(pair.prompt.tolist())

    def test_rows_that_every_trainer_would_cut_its_own_way_are_left_out(
        self, config: Path, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        rows = [{"prompt": "Say it.", "chosen": "Yes." * times, "rejected": "No."} for times in (1, 2, 40)]
        data = tmp_path / "rows.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)) + "\n")
        config.write_text(yaml.safe_dump(settings | {"data": str(data), "max_seq_length": 80}))

        case = case_of_config(config, None, shared=True)

        assert [row["chosen"][-1]["content"] for row in case.rows] == ["Yes.", "Yes.Yes."]

    def test_adapters_and_optimizer_are_those_that_all_have(self, config: Path) -> None:
        settings = case_of_config(config, 2, shared=True).settings

        assert (settings.num_layers, settings.train_type, settings.optimizer) == (-1, "lora", "adam")
        assert settings.learning_rate == cases.STILL

    def test_another_loss_is_refused(self, config: Path, settings: dict[str, Any]) -> None:
        config.write_text(yaml.safe_dump(settings | {"dpo_cpo_loss_type": "hinge"}))

        with pytest.raises(ConfigError, match="set dpo_cpo_loss_type to it in place of hinge"):
            case_of_config(config, 2, shared=True)

    def test_rows_that_no_other_trainer_reads_are_no_case(self, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cases, "load_dataset", lambda *_: (build_pairs(3), [], []))

        with pytest.raises(DataError, match="no training pair that all trainers can score alike"):
            case_of_config(config, None, shared=True)


def test_what_other_pythons_import_of_this_package_needs_the_standard_library_alone() -> None:
    package = Path(runs.__file__).parents[2]
    modules = "import mlx_cpo_plugin.bench.job, mlx_cpo_plugin.bench.recording"

    # Without -S it would see whatever is installed.
    done = subprocess.run(
        [sys.executable, "-S", "-c", modules], env={"PYTHONPATH": str(package)}, capture_output=True, text=True
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_another_python_sees_this_package_and_nothing_beside_it(peers: Peers, case: Case, tmp_path: Path) -> None:
    environment = runs.Runs(case, tmp_path, quiet)._environment(TRL)

    (shown,) = Path(environment["PYTHONPATH"]).iterdir()
    assert shown.resolve() == Path(runs.__file__).parents[1]


@pytest.fixture
def words(peers: Peers) -> list[str]:
    """A call that measures a tiny shape against the host and two others."""
    pythons = ["--trl-python", peers.python("trl"), "--unsloth-python", peers.python("unsloth", seconds=2.0)]
    shape = ["--shape", str(TINY), "--rows", "6", "--iters", "2", "--repeats", "1"]
    return ["bench", *shape, "--against", "unsloth,host,trl", *pythons]


class TestCommand:
    def test_table_chart_and_json_hold_every_trainer_in_both_modes(
        self, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        chart, figures = tmp_path / "bars.svg", tmp_path / "figures.json"

        assert cli.main([*words, "--chart", str(chart), "--json", str(figures)]) == 0

        lines = capsys.readouterr().out.splitlines()
        assert lines[:2] == [TINY.title, f"processor: {processor_name()}"]
        cells = [line.split() for line in lines]
        for mode in (3, 9):
            assert [row[0] for row in cells[mode + 1 : mode + 5]] == [PLUGIN, HOST, TRL, UNSLOTH]
        assert lines[6].split() == [
            "TRL",
            "3",
            "(3",
            "to",
            "3)",
            "6.00",
            "x",
            "unknown",
            "5000",
            "0.7",
            "float32",
            "a",
            "BLAS",
        ]
        (measured,) = json.loads(figures.read_text())["cases"]
        assert {name: found["ratio"] for name, found in measured["modes"][TIME].items()} == {
            PLUGIN: 1.0,
            HOST: 4.0,
            TRL: 6.0,
            UNSLOTH: 2.0,
        }
        drawn = chart.read_text()
        for label in (PLUGIN, HOST, TRL, UNSLOTH, "seconds per pair", "peak of the process, GB"):
            assert f">{label}<" in drawn

    def test_the_same_figures_give_the_same_chart(self, peers: Peers, case: Case, tmp_path: Path) -> None:
        contest = contest_of(case, [HOST], {})

        for name in ("first.svg", "second.svg"):
            against_report.draw([contest], tmp_path / name)

        assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()

    def test_a_trainer_that_could_not_be_measured_sets_the_exit_code(
        self, words: list[str], peers: Peers, capsys: pytest.CaptureFixture[str]
    ) -> None:
        peers.fails = (UNSLOTH,)

        assert cli.main(words) == 1

        printed = capsys.readouterr()
        assert f"error: {TINY.title}: {UNSLOTH} was killed." in printed.err
        assert TRL in printed.out

    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (["--against", "trl"], "--against trl needs --trl-python PATH"),
            (["--against", "unsloth"], "--against unsloth needs --unsloth-python PATH"),
            (["--trl-python", "python"], "--trl-python belongs to --against trl"),
            (["--against", "trl", "--trl-python", "no/such/python"], "no/such/python is no program"),
            (["--chart", "bars.svg"], "give --against"),
            (["--against", "host", "--chart", "bars.gif"], "bars.gif: the plot is written as .svg or .png"),
        ],
    )
    def test_a_mistake_is_one_sentence_and_exit_code_2(
        self, words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["bench", "--shape", str(TINY), *words]) == 2

        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert complaint in error

    def test_an_unknown_trainer_is_named(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main(["bench", "--shape", str(TINY), "--against", "host,axolotl"])

        assert ended.value.code == 2
        assert "'axolotl' is none of host, trl, unsloth" in capsys.readouterr().err
