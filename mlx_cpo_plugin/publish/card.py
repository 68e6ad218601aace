"""A model card: what whoever finds a model has to know of it, from what its run has left, without paths."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import yaml

from mlx_cpo_plugin.atomic_files import replace_whole
from mlx_cpo_plugin.checkpoints import ADAPTER_FILE, BEST, METRICS_FILE
from mlx_cpo_plugin.checkpoints.adapter import adapter_metadata
from mlx_cpo_plugin.checkpoints.run_identity import read_record
from mlx_cpo_plugin.data.files import SUFFIXES, kind_of
from mlx_cpo_plugin.errors import printable
from mlx_cpo_plugin.marked_text import edited_among, marked
from mlx_cpo_plugin.missing_paths import looks_like_path
from mlx_cpo_plugin.publish.usage import usage
from mlx_cpo_plugin.report.page import course
from mlx_cpo_plugin.report.plots import PANELS, as_png, points
from mlx_cpo_plugin.report.record import ReportError, Row, RunRecord, names_of_runs, number
from mlx_cpo_plugin.settings.cpo_options import LOSS_OPTION
from mlx_cpo_plugin.settings.options import PRECISIONS
from mlx_cpo_plugin.settings.run_settings import options_of
from mlx_cpo_plugin.settings.yaml_settings import dump_settings
from mlx_cpo_plugin.types import Values

CARD_FILE, PLOT_FILE = "README.md", "cpo-results.png"
# Beside one that a person wrote or edited, and so on.
CARD_NAMES = (CARD_FILE, "MODEL_CARD.md", *(f"MODEL_CARD-{number}.md" for number in range(2, 100)))
# A plot of fewer points shows less than the table.
LEAST_POINTS = 5
_PLOTTED = ("loss", "accuracy", "margin")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_IN_HUB_CACHE = re.compile(r"(?:models|datasets)--([\w.-]+?(?:--[\w.-]+)?)/snapshots/")
# Settings that are shown whether or not they are the defaults, and those that say nothing of the model.
_ALWAYS = ("train_mode", "model", "data", LOSS_OPTION, "beta", "learning_rate", "batch_size", "iters", "seed")
_NEVER = frozenset(
    (
        *("adapter_path", "reference_model_path", "sample_prompts", "steps_per_sample", "report_to", "project"),
        *("run_name", "wandb", "fuse", "fuse_bits", "lm_studio_name", "push_to_hub", "hub_private_repo"),
        *("keep_checkpoints", "save_every", "save_per_epoch", "steps_per_report", "resume"),
    )
)
_LANGUAGE_MODEL = "text-generation"


class Form(NamedTuple):
    """A form in which a model is published.

    Attributes:
        title: what it is, ``{}`` being the kind of training.
        relation: to its base model, as the hub names it.
        library: whose files these are, as the hub names it; empty where their names say so.
        tags: of the hub, beside those of every form.
    """

    title: str
    relation: str
    library: str
    tags: tuple[str, ...]


FORMS = {
    "adapter": Form("{} for MLX", "adapter", "mlx", ("mlx",)),
    "mlx": Form("model for MLX with its {} merged", "finetune", "mlx", ("mlx",)),
    "peft": Form("{} for PEFT", "adapter", "peft", ("peft",)),
    "gguf": Form("GGUF model with its {} merged", "finetune", "", ("gguf",)),
    "ollama": Form("model for Ollama", "finetune", "", ("gguf", "ollama")),
}
_KINDS = {"lora": "LoRA adapter", "dora": "DoRA adapter", "full": "full fine-tuning"}


@dataclass(frozen=True)
class Card:
    """A model card.

    Attributes:
        text: Markdown with the hub's metadata before it.
        plot: of the run, a PNG that the text shows; empty where there is little to show, or nothing to draw with.
    """

    text: str
    plot: bytes = b""


def model_card(
    adapter_folder: str | Path,
    form: str = "adapter",
    *,
    notes: Sequence[str] = (),
    base_model: str | None = None,
    here: str = "",
) -> Card:
    """Return the card of what a run has left; what is not known of the run is left out.

    Args:
        adapter_folder: the run's folder, or its ``best``.
        form: one of :data:`FORMS`.
        notes: sentences on the files, such as the bits of their weights.
        base_model: its name on the hub, where the run was given a folder.
        here: repository, or name of a folder, that the commands name; by default the folder's name.

    Raises:
        ReportError: the run's settings cannot be read.
        CheckpointError: the best adapter cannot be read.
    """
    folder = Path(adapter_folder)
    is_best = folder.name == BEST and not (folder / METRICS_FILE).exists()
    run_folder = folder.parent if is_best else folder
    record = RunRecord.read(run_folder, needs_metrics=False)
    if is_best:
        iteration = adapter_metadata(folder / ADAPTER_FILE).get("iteration")
        rows = [row for row in record.valid if f"{number(row, 'iteration'):.0f}" == iteration]
        record = replace(record, best=tuple(rows[-1:]))
    plot = _plot(record)
    base = base_model or _hub_name(record.settings.get("model"))
    kind = str(record.settings.get("train_type", "lora"))
    sections = [
        f"# {here.rpartition('/')[2] or names_of_runs([run_folder])[0]}",
        _introduction(record, FORMS[form], kind, base),
        _use(record, form, base, here or folder.name),
        _section("Files", [f"- {note}" for note in notes]),
        _data(record, run_folder),
        _results(record, plot),
        _settings(record),
        _section("Versions", [f"{record.versions}."] if record.versions else []),
    ]
    body = "\n\n".join(filter(None, sections)) + "\n"
    text = _metadata(record, FORMS[form], kind, base) + "\n" + body
    return Card(marked(text, ".md"), plot)


def write_card(card: Card, folder: Path, replacing: Path | None = None) -> str:
    """Write a card and its plot into a folder and return the card's name.

    It is ``README.md``, or ``MODEL_CARD.md`` beside one that a person wrote or edited, and so on.

    Args:
        replacing: the folder that ``folder`` is going to replace, whose edited ``README.md`` is carried over; then
            whatever stands in ``folder`` is a library's.

    Raises:
        OSError: a file cannot be written.
    """
    edited = edited_among(replacing or folder, CARD_NAMES)
    name = CARD_NAMES[len(edited)]
    if replacing is not None:
        for kept in edited:
            shutil.copyfile(replacing / kept, folder / kept)
    replace_whole(folder / name, lambda partial: partial.write_text(card.text, encoding="utf-8"))
    if card.plot:
        replace_whole(folder / PLOT_FILE, lambda partial: partial.write_bytes(card.plot))
    return name


def without_paths(value: Any) -> Any:
    """Return plain values in which a path, as a whole value, is the last part of it alone."""
    if isinstance(value, Mapping):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(inner) for inner in value]
    is_path = isinstance(value, str) and not {"\n", "{"} & set(value) and (looks_like_path(value) or "\\" in value)
    return (_hub_name(value) or _last_part(value)) if is_path else value


def _last_part(path: str) -> str:
    return PurePath(path.replace("\\", "/").rstrip("/")).name or "data"


def _hub_name(name: object) -> str:
    """Return the name on the hub of a model or data set that a run was given, or whose cache it was; else nothing."""
    if not isinstance(name, str) or not name:
        return ""
    if cached := _IN_HUB_CACHE.search(name.replace("\\", "/")):
        return cached[1].replace("--", "/")
    is_local = kind_of(name) in SUFFIXES or os.path.exists(name)
    return name if _HUB_NAME.fullmatch(name) and not is_local else ""


def _names(value: object) -> list[str]:
    """Return the names in ``data`` or ``hf_dataset``: a name, an entry with a path, or a list of either."""
    if isinstance(value, Mapping):
        value = value.get("path")
    if isinstance(value, list | tuple):
        return [name for entry in value for name in _names(entry)]
    return [value] if isinstance(value, str) and value else []


def _data_names(record: RunRecord) -> list[str]:
    return list(dict.fromkeys(_names(record.settings.get("hf_dataset") or record.settings.get("data"))))


def _metadata(record: RunRecord, form: Form, kind: str, base: str) -> str:
    datasets = [hub for name in _data_names(record) if (hub := _hub_name(name))]
    values: Values = {"base_model": base, "base_model_relation": form.relation} if base else {}
    values |= {"datasets": datasets} if datasets else {}
    values |= {"library_name": form.library} if form.library else {}
    relation = [f"base_model:{form.relation}:{base}"] if base else []
    values |= {"pipeline_tag": _LANGUAGE_MODEL, "tags": [*form.tags, "cpo", kind, *relation]}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return f"---\n# license: fill in, e.g. apache-2.0; that of the base model and of the data counts, too\n{text}---\n"


def _introduction(record: RunRecord, form: Form, kind: str, base: str) -> str:
    text = (
        f"This {form.title.format(_KINDS.get(kind, kind))} was trained on preference pairs with CPO (Contrastive "
        f"Preference Optimisation, [arXiv 2401.08417](https://arxiv.org/abs/2401.08417)) by "
        f"mlx-cpo-plugin."
    )
    local = _shown(record.settings.get("model"))
    if not base and not local:  # a model that was loaded already
        return text
    named = f"[{base}](https://huggingface.co/{base})" if base else f"`{local}`"
    precision = next((name for name in PRECISIONS if record.settings.get(name)), None)
    return f"{text} Its base model is {named}" + (f", quantised while loading (`{precision}`)." if precision else ".")


def _use(record: RunRecord, form: str, base: str, here: str) -> str:
    base = base or _shown(record.settings.get("model")) or "MODEL"
    language, lines = usage(form, here, base, record.template_arguments, fetched="/" in here)
    block = "\n".join(lines)
    text = f"## Use\n\n```{language}\n{block}\n```"
    if form == "adapter" and record.settings.get("chat_template"):
        text += (
            "\n\nIt was trained with a `chat_template` of its own, which this command knows nothing of; a model that "
            "`mlx-cpo export --to mlx` makes has it."
        )
    return text


def _data(record: RunRecord, folder: Path) -> str:
    lines = []
    for name in _data_names(record):
        hub = _hub_name(name)
        lines.append(f"- [{hub}](https://huggingface.co/datasets/{hub})" if hub else f"- `{_shown(name)}`")
    run = read_record(folder)
    if run is not None and run.data:
        rows = [(split, str(of["pairs"]), str(of["rows"]), f"`{of['sha256']}`") for split, of in run.data.items()]
        lines += ["", *_table(("split", "pairs", "of rows", "sha256 of the pairs as tokens"), rows)]
    return _section("Training data", lines)


def _results(record: RunRecord, plot: bytes) -> str:
    columns = {"before training": record.valid[:1], "after training": (record.best or record.valid[1:])[-1:]}
    measured = {title: rows[0] for title, rows in columns.items() if rows}
    figures = {f"validation, {title}": _figures(row, "val_") for title, row in measured.items()}
    figures |= {"test": _figures(record.test[-1], "test_")} if record.test else {}
    lines = []
    if figures:
        lines = _table(("", *_FIGURES), [(title, *values) for title, values in figures.items()])
        lines += [
            "",
            "Accuracy is the share of pairs whose chosen answer is the more likely one, margin the mean difference of "
            "their rewards, and nll the negative log-likelihood of the chosen answers, in nats a token.",
        ]
    verdict = record.verdict
    lines += ["", f"The model is {verdict.sentence()}."] if verdict else []
    lines += ["", course(record)] if record.train else []
    lines += ["", f"![Loss, accuracy and margin over the iterations]({PLOT_FILE})"] if plot else []
    return _section("Results", lines)


_FIGURES = {
    "accuracy": ("accuracies", "{:.1%}"),
    "margin": ("margins", "{:+.3f}"),
    "loss": ("loss", "{:.4f}"),
    "nll": ("nll_loss", "{:.3f}"),
}


def _figures(row: Row, prefix: str) -> list[str]:
    return [
        form.format(value) if (value := number(row, prefix + metric)) == value else "-"
        for metric, form in _FIGURES.values()
    ]


def _settings(record: RunRecord) -> str:
    """What differs from the defaults, and what everybody asks for."""
    values = record.settings
    options, unread = options_of(str(values.get(LOSS_OPTION)))
    shown = {
        name: value
        for name, value in values.items()
        if name not in _NEVER | unread and (name in _ALWAYS or name not in options or value != options[name].default)
    }
    if not shown:
        return ""
    text = dump_settings(without_paths(shown)).rstrip()
    return f"## Settings\n\nAll others have their defaults.\n\n```yaml\n{text}\n```"


def _plot(record: RunRecord) -> bytes:
    drawn = [
        name for name in _PLOTTED if any(len(points(record, curve)[0]) >= LEAST_POINTS for curve in PANELS[name].curves)
    ]
    if not drawn or find_spec("matplotlib") is None:
        return b""
    try:
        return as_png([record], drawn)
    except ReportError:
        return b""


def _section(title: str, lines: Iterable[str]) -> str:
    text = "\n".join(lines).strip("\n")
    return f"## {title}\n\n{text}" if text else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return [line.replace("|  |", "| |") for line in lines]


def _shown(name: object) -> str:
    """Return the name of a model or data set as text without a path; nothing where there is none."""
    return printable(without_paths(name)).replace("`", "'") if isinstance(name, str) else ""
