"""What a run leaves behind is read back, drawn and written as a page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from support.refusals import refused

from mlx_cpo_plugin import cli
from mlx_cpo_plugin.comparison.statistics import Measure, duel_figures, figures
from mlx_cpo_plugin.plugins import loss_types
from mlx_cpo_plugin.report import plots
from mlx_cpo_plugin.report.page import as_html
from mlx_cpo_plugin.report.plots import as_png, as_svg, panels_with_points
from mlx_cpo_plugin.report.record import ReportError, RunRecord, differing_settings, number
from mlx_cpo_plugin.settings import config
from mlx_cpo_plugin.settings.run_settings import recorded_settings
from mlx_cpo_plugin.training.metrics import MetricsFile
from mlx_cpo_plugin.training.objective import objective_for
from mlx_cpo_plugin.training.reporting import ProgressReporter

BEGIN = 1_700_000_000.0


def valid_row(iteration: int, accuracy: float, margin: float, loss: float) -> dict[str, Any]:
    return {
        "kind": "valid",
        "time": BEGIN + iteration,
        "iteration": iteration,
        "val_accuracies": accuracy,
        "val_margins": margin,
        "val_loss": loss,
    }


def train_row(iteration: int, loss: float | None) -> dict[str, Any]:
    return {
        "kind": "train",
        "time": BEGIN + iteration,
        "iteration": iteration,
        "train_loss": loss,
        "train_chosen_reward": -0.5,
        "train_rejected_reward": -0.75,
        "learning_rate": 1e-5,
        "trained_tokens": 100 * iteration,
    }


ROWS = [
    valid_row(1, 0.25, -0.5, 0.9),
    train_row(10, 0.8),
    valid_row(10, 0.75, 0.5, 0.6),
    train_row(20, 0.7),
    valid_row(20, 0.5, 0.25, 0.5),
]
SETTINGS = {"train_mode": "cpo", "beta": 0.05, "iters": 20, "lora_parameters": {"rank": 8}}


def write_run(folder: Path, rows: list[dict[str, Any]] | None = None, **settings: Any) -> Path:
    """An adapter folder as a run leaves it."""
    folder.mkdir(parents=True)
    lines = [json.dumps(row) for row in (ROWS if rows is None else rows)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    text = "# mlx-cpo-plugin 9.9.9, mlx 1.2.3\n" + yaml.safe_dump(SETTINGS | settings, sort_keys=False)
    (folder / "run_settings.yaml").write_text(text)
    return folder


class TextOfPage(HTMLParser):
    """The visible text of a page, the tags that it opens, and the addresses that it names."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


# The record of a run


def test_a_record_holds_settings_versions_and_the_rows_of_each_kind(tmp_path: Path) -> None:
    test_row = {"kind": "test", "time": BEGIN + 21, "test_accuracies": 0.7}
    warning = {"kind": "warning", "time": BEGIN + 12, "text": "margins rise"}

    record = RunRecord.read(write_run(tmp_path / "run", [*ROWS, warning, test_row]))

    assert record.settings == SETTINGS
    assert record.versions == "mlx-cpo-plugin 9.9.9, mlx 1.2.3"
    assert [row["iteration"] for row in record.train] == [10, 20]
    assert [row["iteration"] for row in record.valid] == [1, 10, 20]
    assert record.test == (test_row,)
    assert record.warnings == ("margins rise",)
    assert (record.iteration, record.iters) == (20, 20)
    assert (record.last["train_loss"], record.last["val_loss"], record.last["test_accuracies"]) == (0.7, 0.5, 0.7)


def test_a_run_that_reached_its_last_iteration_has_finished(tmp_path: Path) -> None:
    record = RunRecord.read(write_run(tmp_path / "run"))

    assert record.started == datetime.fromtimestamp(BEGIN + 1, UTC)
    assert record.finished == record.updated == datetime.fromtimestamp(BEGIN + 20, UTC)


def test_a_run_that_did_not_has_not(tmp_path: Path) -> None:
    record = RunRecord.read(write_run(tmp_path / "run", ROWS[:3]))

    assert record.updated == datetime.fromtimestamp(BEGIN + 10, UTC)
    assert record.finished is None


def test_a_run_that_was_stopped_early_has_finished_as_it_has_written_down(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [{**row, "run": "mine"} for row in ROWS[:3]])
    record = {"begun": "2026-11-27T00:00:00+00:00", "origin": None, "done": {"trained": ""}, "files": []}

    for run, finished in (("mine", True), ("another", False)):
        (folder / "run.json").write_text(json.dumps({**record, "id": run, "successor": None}))
        assert (RunRecord.read(folder).finished is not None) is finished


def test_torn_and_foreign_lines_are_skipped(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'[1, 2]\n{"no": "kind"}\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"kind": "train", "iteration": 30, "tr')

    record = RunRecord.read(folder)

    assert record.iteration == 20


def test_only_the_last_of_several_runs_into_a_folder_is_read(tmp_path: Path) -> None:
    record = RunRecord.read(write_run(tmp_path / "run", [*ROWS, valid_row(1, 0.1, -1.0, 1.5), train_row(10, 1.4)]))

    assert [row["train_loss"] for row in record.train] == [1.4]
    assert [row["val_loss"] for row in record.valid] == [1.5]


def test_a_run_that_reports_once_begins_anew_with_the_same_iteration(tmp_path: Path) -> None:
    record = RunRecord.read(write_run(tmp_path / "run", [train_row(10, 0.9), train_row(10, 0.4)]))

    assert [row["train_loss"] for row in record.train] == [0.4]


def test_without_a_record_of_settings_those_of_the_adapter_are_known(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "run_settings.yaml").unlink()
    (folder / "adapter_config.json").write_text('{"fine_tune_type": "dora", "num_layers": 4, "other": 1}')

    record = RunRecord.read(folder)

    assert record.settings == {"train_type": "dora", "num_layers": 4}
    assert record.versions == ""


def test_a_folder_without_metrics_is_refused(tmp_path: Path) -> None:
    with refused(ReportError, r"no metrics\.jsonl", place=str(tmp_path)):
        RunRecord.read(tmp_path)


def test_settings_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "run_settings.yaml").write_text("beta: [")

    with refused(ReportError, r"run_settings\.yaml", place=str(folder)):
        RunRecord.read(folder)


@example(math.inf)
@given(st.one_of(st.none(), st.booleans(), st.text(), st.integers(), st.floats(), st.just(10**400)))
def test_a_metric_is_a_finite_number_or_nan(value: Any) -> None:
    result = number({"name": value}, "name")

    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e308
    assert math.isfinite(result) or math.isnan(result)
    if usable:
        assert result == float(value)


def test_the_name_of_a_run_is_its_folder_and_says_whose_adapters_these_are(tmp_path: Path) -> None:
    titles = [as_html([RunRecord.read(write_run(tmp_path / name))]) for name in ("mine", "other/adapters")]
    assert "CPO run mine" in titles[0]
    assert "CPO run other<" in titles[1]


def test_runs_of_one_name_are_told_apart_in_page_and_plots(tmp_path: Path) -> None:
    records = [RunRecord.read(write_run(tmp_path / name)) for name in ("german/run", "dutch/run", "dutch/other")]

    headings = TextOfPage(as_html(records)).text
    legend = [element.text for element in ElementTree.fromstring(as_svg(records, ["loss"])).iter()]

    for name in ("german/run", "dutch/run", "other"):
        assert name in headings
        assert name in legend


def test_settings_differ_where_a_value_is_another_or_missing(tmp_path: Path) -> None:
    first = RunRecord.read(write_run(tmp_path / "first", adapter_path="/first"))
    second = RunRecord.read(write_run(tmp_path / "second", adapter_path="/second", beta=0.1, max_grad_norm=1.0))

    assert differing_settings([first, second]) == {"beta": [0.05, 0.1], "max_grad_norm": [None, 1.0]}


# Curves


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[RunRecord]:
    folder = tmp_path_factory.mktemp("runs")
    return [RunRecord.read(write_run(folder / name, beta=beta)) for name, beta in (("run", 0.05), ("other", 0.1))]


@pytest.fixture(scope="module")
def record(records: list[RunRecord]) -> RunRecord:
    return records[0]


@pytest.fixture(scope="module")
def html(records: list[RunRecord]) -> str:
    """The page of both records."""
    return as_html(records)


def lines_of(records: list[RunRecord], panel: str) -> list[tuple[list[float], list[float], str]]:
    (axis,) = plots.draw(records, [panel]).axes
    return [(list(line.get_xdata()), list(line.get_ydata()), line.get_linestyle()) for line in axis.get_lines()]


def test_only_what_has_numbers_is_drawn(record: RunRecord) -> None:
    assert panels_with_points([record]) == ["loss", "accuracy", "margin", "rewards", "learning_rate"]


def test_the_loss_panel_shows_training_and_validation_over_the_iterations(record: RunRecord) -> None:
    assert lines_of([record], "loss") == [([10, 20], [0.8, 0.7], "-"), ([1, 10, 20], [0.9, 0.6, 0.5], "--")]


def test_values_that_were_no_numbers_are_left_out(tmp_path: Path) -> None:
    record = RunRecord.read(write_run(tmp_path / "run", [train_row(1, None), train_row(2, 0.5)]))

    assert lines_of([record], "loss") == [([2], [0.5], "-")]


def test_several_runs_share_a_panel_each_with_one_colour_and_one_entry_of_the_legend(records: list[RunRecord]) -> None:
    (axis,) = plots.draw(records, ["loss"]).axes

    colours = [line.get_color() for line in axis.get_lines()]
    assert colours == [plots.COLOURS[0]] * 2 + [plots.COLOURS[1]] * 2
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["run", "other"]
    assert axis.get_title(loc="left") == "Loss (dashed: validation)"


def test_the_same_records_give_the_same_bytes_of_svg_whatever_style_the_user_has(records: list[RunRecord]) -> None:
    import matplotlib

    first = as_svg(records, ["loss", "margin"])
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black"}):
        again = as_svg(records, ["loss", "margin"])

    assert again == first
    assert ElementTree.fromstring(first).tag == "{http://www.w3.org/2000/svg}svg"
    assert "date" not in first


def test_names_that_look_like_formulas_or_markup_are_drawn_as_they_are(tmp_path: Path) -> None:
    records = [RunRecord.read(write_run(tmp_path / name)) for name in ("_a$x^$", "b<&>")]

    texts = [element.text for element in ElementTree.fromstring(as_svg(records, ["loss"])).iter() if element.text]

    assert "b<&>" in texts
    assert any("a$x^$" in text for text in texts)


def test_a_png_holds_a_picture(record: RunRecord) -> None:
    assert as_png([record], ["loss", "margin"]).startswith(b"\x89PNG\r\n\x1a\n")


def test_a_run_without_numbers_cannot_be_drawn(tmp_path: Path) -> None:
    record = RunRecord.read(write_run(tmp_path / "run", []))

    for draw in (lambda: as_svg([record]), lambda: as_png([record]), lambda: as_html([record])):
        with pytest.raises(ReportError, match=r"^There is no number to "):
            draw()


def test_without_matplotlib_one_sentence_says_what_to_install(
    record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)

    with pytest.raises(ReportError, match=r"^Plots need matplotlib; run pip install 'mlx-cpo-plugin\[report\]'\.$"):
        as_html([record])


# The page


def test_the_page_shows_first_best_last_and_test_figures(tmp_path: Path) -> None:
    test_row = {"kind": "test", "time": BEGIN + 21, "test_accuracies": 0.625, "test_margins": 0.125}

    page = TextOfPage(as_html([RunRecord.read(write_run(tmp_path / "run", [*ROWS, test_row]))]))

    assert "Validation accuracy 25.0% 75.0% at 10 50.0% 62.5%" in page.text
    assert "Validation margin -0.500 +0.500 at 10 +0.250 +0.125" in page.text
    assert "Validation loss 0.9000 0.5000 at 20 0.5000 -" in page.text
    assert "Training loss 0.8000 0.7000 at 20 0.7000 -" in page.text


def test_the_page_says_when_the_run_was_and_with_what(record: RunRecord) -> None:
    page = TextOfPage(as_html([record]))

    assert "Iteration 20 of 20; started 2023-11-14 22:13 UTC, finished 2023-11-14 22:13 UTC, 19 s" in page.text
    assert "2,000 scored tokens" in page.text
    assert "lora_parameters {rank: 8}" in page.text
    assert "Trained with mlx-cpo-plugin 9.9.9, mlx 1.2.3." in page.text


def test_the_page_needs_no_network_and_no_script(records: list[RunRecord], html: str) -> None:
    page = TextOfPage(html)

    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert all(address.startswith("#") for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import", html)
    assert page.tags.count("svg") == len(panels_with_points(records))


def test_no_two_elements_of_the_page_have_the_same_id(html: str) -> None:
    ids = re.findall(r'\sid="([^"]*)"', html)

    assert len(ids) == len(set(ids))


def test_a_page_of_several_runs_names_the_settings_that_differ(html: str) -> None:
    page = TextOfPage(html)

    assert "Settings that differ Setting run other beta 0.05 0.1 Curves" in page.text


def test_what_comes_from_files_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    warning = {"kind": "warning", "time": BEGIN, "text": evil}
    folder = write_run(tmp_path / "<script>run", [*ROWS, warning], model=evil, **{evil: 1})
    text = (folder / "run_settings.yaml").read_text()
    (folder / "run_settings.yaml").write_text(text.replace("9.9.9", evil))

    html = as_html([RunRecord.read(folder), RunRecord.read(write_run(tmp_path / "b"))])

    assert "script" not in TextOfPage(html).tags
    assert html.count("&lt;script&gt;alert(1)") >= 4


# The command


def test_the_report_lies_in_the_folder_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")

    assert cli.main(["report", str(folder)]) == 0

    assert capsys.readouterr().out == f"Wrote {folder / 'report.html'}.\n"
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_a_comparison_stands_in_the_page(tmp_path: Path) -> None:
    accuracy = figures(Measure("accuracy", "pairs", is_rate=True), ["base", "<b>"], np.array([[0.0] * 8, [1.0] * 8]))
    judge = {"model": "<b>", "against": "base", "unclear": 1} | duel_figures([1.0, 0.5, 0.5, 0.5])
    measures = [accuracy, {"name": "judge", "of": "answers", "count": 4, "models": [], "comparisons": [judge]}]
    (tmp_path / "models.json").write_text(json.dumps({"measures": measures}))
    folder = write_run(tmp_path / "run")

    assert cli.main(["report", str(folder), "--comparison", str(tmp_path / "models.json")]) == 0

    page = (folder / "report.html").read_text(encoding="utf-8")
    (table,) = re.findall(r'<h2 id="comparison">.*?</section>', page, re.DOTALL)
    cells = [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", table)][5:]
    assert cells == [
        *("accuracy, 8 pairs", "base", "0.0%", "0.0% to 32.4%", "", ""),
        *("&lt;b&gt;", "100.0%", "67.6% to 100.0%", "", ""),
        *("&lt;b&gt; against base", "+100.0%", "+100.0% to +100.0%", "8/0/0, 100.0% (67.6% to 100.0%)", "better"),
        *("judge, 4 answers", "&lt;b&gt; against base", "", "", "1/3/0, 62.5% (21.9% to 90.8%)", "undecided"),
    ]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"measures": 3}', '{"measures": [{"name": "x"}]}', None])
def test_a_comparison_that_is_none_is_one_sentence(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "models.json"
    if content is not None:
        file.write_text(content)

    assert cli.main(["report", str(write_run(tmp_path / "run")), "--comparison", str(file)]) == 2

    assert capsys.readouterr().err.startswith(f"error: --comparison {file} cannot be read (")
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(("name", "begin"), [("a.svg", b"<svg"), ("a.PNG", b"\x89PNG"), ("a.html", b"<!DOCTYPE")])
def test_the_output_is_what_its_name_says(tmp_path: Path, name: str, begin: bytes) -> None:
    folders = [str(write_run(tmp_path / name)) for name in ("first", "second")]

    assert cli.main(["report", *folders, "--output", str(tmp_path / "new" / name)]) == 0

    assert (tmp_path / "new" / name).read_bytes().startswith(begin)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["report", "{run}", "--output", "{run}/a.pdf"], "a report is .html, .png, .svg; give a name that ends so."),
        (["report", "{run}", "{run}/missing"], "There is no metrics.jsonl in {run}/missing; give the adapter_path"),
        (["report", "{run}", "--output", "{run}/metrics.jsonl/a.svg"], "cannot be written ("),
    ],
)
def test_a_mistake_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    folder = write_run(tmp_path / "run")
    before = sorted(path.name for path in folder.iterdir())

    assert cli.main([word.format(run=folder) for word in words]) == 2

    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert sentence.format(run=folder) in printed.err
    assert printed.err.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == before


# What a run writes down


def test_a_run_writes_down_the_settings_that_repeat_it(
    settings: dict[str, Any], run_main: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loss = {"dpo_cpo_loss_type": "dpop", "delta": 7.0}
    run_main({**settings, **loss, "data": "data", "adapter_path": "adapters", "iters": None, "epochs": 1})
    monkeypatch.chdir("/")

    again = config.resolve({"config": str(tmp_path / "adapters" / "run_settings.yaml")}).settings

    assert (again.train_mode, again.dpo_cpo_loss_type, again.delta, again.learning_rate) == ("cpo", "dpop", 7.0, 1e-3)
    assert (again.iters, again.epochs) == (5, 1)
    assert (again.data, again.adapter_path) == (str(tmp_path / "data"), str(tmp_path / "adapters"))
    record = RunRecord.read(tmp_path / "adapters")
    assert record.finished
    assert record.versions.startswith("mlx-cpo-plugin ")


@pytest.mark.parametrize("loss", loss_types())
def test_the_written_settings_resolve_to_the_same_ones(settings: dict[str, Any], tmp_path: Path, loss: str) -> None:
    resolved = vars(config.resolve({**settings, "dpo_cpo_loss_type": loss}).settings)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(recorded_settings(SimpleNamespace(**resolved))))

    again = vars(config.resolve({"config": str(tmp_path / "again.yaml")}).settings)

    assert {**again, "config_file": None} == resolved


def test_tokens_for_the_hub_are_not_written_down(settings: dict[str, Any]) -> None:
    entry = {"path": "some/rows", "config": {"name": "default", "token": "hf_secret"}}
    resolved = config.resolve({**settings, "hf_dataset": [entry], "resume": "auto"}).settings

    recorded = recorded_settings(resolved)

    assert recorded["hf_dataset"] == [{"path": "some/rows", "config": {"name": "default"}}]
    assert "hf_secret" not in yaml.safe_dump(recorded)
    assert "resume" not in recorded


def test_a_caller_of_the_trainer_has_its_arguments_written_down(tmp_path: Path) -> None:
    import mlx.optimizers as optimizers
    from support.tiny import add_adapter, build_model, build_pairs

    from mlx_cpo_plugin.training.trainer import CPOTrainingArgs, train_cpo

    adapter_file = tmp_path / "adapters" / "adapters.safetensors"
    args = CPOTrainingArgs(iters=1, batch_size=2, loss_type="hinge", beta=0.3, adapter_file=str(adapter_file))
    train_cpo(add_adapter(build_model()), optimizers.AdamW(learning_rate=0.25), build_pairs(2), args=args)

    recorded = RunRecord.read(adapter_file.parent).settings

    expected = {"dpo_cpo_loss_type": "hinge", "beta": 0.3, "iters": 1, "batch_size": 2, "train_type": "lora"}
    expected |= {"optimizer": "adamw", "learning_rate": 0.25}
    assert {key: recorded[key] for key in expected} == expected
    assert recorded["lora_parameters"]["rank"] == 4


def test_what_a_run_warns_of_stands_among_its_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    reporter = ProgressReporter(
        objective_for("sigmoid", {}), None, MetricsFile(tmp_path / "run" / "metrics.jsonl", "run")
    )

    reporter.warn("Iter 20: look here.")
    reporter.warn(None)

    assert RunRecord.read(tmp_path / "run").warnings == ("Iter 20: look here.",)
    assert "Warning: Iter 20: look here." in capsys.readouterr().out
