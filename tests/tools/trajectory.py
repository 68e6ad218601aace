"""Compares a run of ``mlx_lm_lora.train`` with TRL's CPOTrainer step by step: the same adapter, rows and order.

    python -m venv trl && trl/bin/pip install torch "trl==1.16.*" peft
    python tests/tools/trajectory.py --trl-python trl/bin/python --model MODEL --rows ROWS.jsonl --output FOLDER

The configuration is written for TRL; ours is what ``mlx-cpo convert`` makes of it. What is finished in the output
folder is not repeated. Prints the tables of docs/results.md and draws the plot.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import yaml

from mlx_cpo_plugin.data import load_dataset
from mlx_cpo_plugin.data.batches import BatchSize, training_plan
from mlx_cpo_plugin.host import load_chat_tokenizer
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.run.building import unevaluated_model
from mlx_cpo_plugin.settings.config import RunSettings, resolve

COMMANDS = Path(sys.executable).parent
TRL_WORKER = Path(__file__).with_name("train_with_trl.py")
RANK = 8
# Ours -> what metrics.jsonl calls it.
METRICS = {
    "loss": "train_loss",
    "chosen_logps": "train_policy_chosen_logps",
    "rejected_logps": "train_policy_rejected_logps",
    "margins": "train_margins",
    "nll_loss": "train_nll_loss",
}
TEXTS, MESSAGES = "texts", "messages"


@dataclass(frozen=True)
class Setting:
    """One pair of runs.

    Attributes:
        title: as in the table.
        trl: keys of TRL's configuration beside those that all have.
        ours: keys of our configuration that are set in another way than TRL's; ``None`` leaves a key out.
        rows: ``texts``, in which TRL finds the same tokens as we, or ``messages``, which each renders itself.
        dtype: that TRL computes in.
        trl_of, ours_of: another setting with the same run on that side.
    """

    title: str
    trl: Mapping[str, Any]
    ours: Mapping[str, Any] = field(default_factory=dict)
    rows: str = TEXTS
    dtype: str = "float32"
    trl_of: str = ""
    ours_of: str = ""


SIGMOID = {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 0.0}
PAPER = {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0}
SETTINGS = {
    "sigmoid": Setting("`sigmoid`", SIGMOID),
    "paper": Setting("`sigmoid`, `cpo_alpha` 1", PAPER),
    "simpo": Setting("`simpo`", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}),
    "ipo": Setting("`ipo`", {"loss_type": "ipo", "beta": 0.5, "cpo_alpha": 0.0}),
}
ADAMW = {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
# What differs unless it is made equal, each beside `sigmoid` with `cpo_alpha` 1; the first two are rounding.
DIFFERENCES = {
    "exact": Setting("TRL in float64", PAPER, dtype="float64", ours_of="paper"),
    "order": Setting("`scoring: plain`, sums in another order", PAPER, {"scoring": "plain"}, trl_of="paper"),
    "messages": Setting("TRL renders the messages itself", PAPER, rows=MESSAGES, ours_of="paper"),
    "accumulation": Setting(
        "2 micro-batches of 1 pair", {**PAPER, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    ),
    "correction": Setting(
        "AdamW without bias correction", PAPER, {"optimizer_config": {"adamw": ADAMW}}, trl_of="paper"
    ),
    "clipping": Setting("no `max_grad_norm`", PAPER, {"max_grad_norm": None}, trl_of="paper"),
    "schedule": Setting("constant learning rate", PAPER, {"lr_schedule": None}, trl_of="paper"),
}
ALL = SETTINGS | DIFFERENCES


@dataclass(frozen=True)
class Trajectory:
    """What a trainer reported of each micro-batch, and the adapter that it ended with."""

    steps: dict[str, np.ndarray]
    adapter: dict[str, np.ndarray]

    def change(self, module: str) -> np.ndarray:
        """Return what a module has learned: B·A, which is zero at the start."""
        return self.adapter[f"{module}.lora_a"].astype(np.float64) @ self.adapter[f"{module}.lora_b"]


def distance(ours: Trajectory, theirs: Trajectory) -> float:
    """Return the relative Frobenius distance of what both have learned, over all modules."""
    modules = [name.removesuffix(".lora_a") for name in theirs.adapter if name.endswith(".lora_a")]
    apart = sum(np.square(ours.change(module) - theirs.change(module)).sum() for module in modules)
    return float(np.sqrt(apart / sum(np.square(theirs.change(module)).sum() for module in modules)))


def trl_config(setting: Setting, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return a configuration of TRL's: its defaults for the optimizer, LoRA on all linear layers, float32."""
    return {
        "model_name_or_path": str(args.model),
        "use_peft": True,
        "lora_r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "lora_target_modules": "all-linear",
        "learning_rate": args.learning_rate,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "max_length": 2 * args.longest,
        "output_dir": str(folder / "output"),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        **setting.trl,
    }


def chosen_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the first rows whose prompt and longer answer have at most ``args.longest`` tokens, as messages."""
    rows = [as_messages(json.loads(line)) for line in args.rows.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "train.jsonl", rows)
        given = {"train": True, "train_mode": "cpo", "model": str(args.model), "data": folder}
        settings = resolve({**given, "max_seq_length": args.longest, "overlong": "drop"}).settings
        pairs, _, _ = load_dataset(settings, load_chat_tokenizer(settings.model))
    numbers = [int(pair.source.rpartition(":")[2]) for pair in pairs][: 2 * args.steps]
    if len(numbers) < 2 * args.steps:
        raise SystemExit(f"{args.rows} has {len(numbers)} rows of at most {args.longest} tokens, not {2 * args.steps}.")
    return [rows[number - 1] for number in numbers]


def as_messages(row: Mapping[str, str]) -> dict[str, Any]:
    """Return a row of texts as a conversation, whose system message is shorter than that of many a template."""
    system = {"role": "system", "content": "Translate."}
    prompt = [system, {"role": "user", "content": row["prompt"]}]
    answers = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    return {"prompt": prompt, **answers}


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, one a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def prepare(setting: Setting, rows: Sequence[Mapping[str, Any]], args: argparse.Namespace, folder: Path) -> RunSettings:
    """Write what both trainers read into ``folder``."""
    write_rows(folder / "data" / "train.jsonl", rows)
    (folder / "trl.yaml").write_text(yaml.safe_dump(trl_config(setting, args, folder), sort_keys=False))
    convert = [COMMANDS / "mlx-cpo", "convert", folder / "trl.yaml", "--output", folder / "converted.yaml", "--force"]
    subprocess.run([*convert, "--rows", str(len(rows))], check=True, stdout=subprocess.DEVNULL)
    ours = yaml.safe_load((folder / "converted.yaml").read_text()) | setting.ours
    ours |= {"data": str(folder / "data"), "adapter_path": str(folder / "adapters"), "steps_per_report": 1}
    given = {key: value for key, value in ours.items() if value is not None}
    settings = resolve(given).settings
    write_initial(settings, folder / "initial.safetensors")
    given["resume_adapter_file"] = str(folder / "initial.safetensors")
    (folder / "cpo.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    return settings


def write_initial(settings: RunSettings, file: Path) -> None:
    """Write an adapter to start from: A uniform within 1/√inputs, as both libraries have it, and B zero."""
    shapes = {name: value.shape for name, value in by_name(unevaluated_model(settings).trainable_parameters()).items()}
    drawn = np.random.default_rng(0)
    adapter = {}
    for name, shape in sorted(shapes.items()):
        bound = shape[0] ** -0.5 if name.endswith("lora_a") else 0.0
        adapter[name] = mx.array(drawn.uniform(-bound, bound, shape).astype(np.float32))
    mx.save_safetensors(str(file), adapter)


def our_run(name: str, rows: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> Trajectory:
    """Return our trajectory of a setting, trained by the host's command where that has not been done."""
    folder = args.output / name
    report, adapter = folder / "ours.json", folder / "adapters" / "adapters.safetensors"
    if not report.exists():
        prepare(ALL[name], rows, args, folder)
        with (folder / "ours.log").open("w") as log:
            command = [COMMANDS / "mlx_lm_lora.train", "--config", folder / "cpo.yaml"]
            subprocess.run(command, check=True, stdout=log, stderr=log)
        lines = [json.loads(line) for line in adapter.with_name("metrics.jsonl").read_text().splitlines()]
        steps = [{metric: line[key] for metric, key in METRICS.items()} for line in lines if line["kind"] == "train"]
        report.write_text(json.dumps({"steps": steps}))  # which says that the run has ended
    return trajectory_in(report, adapter)


def run_of_trl(name: str, rows: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> Trajectory:
    """Return TRL's trajectory of a setting, trained where that has not been done; texts have to give our tokens."""
    folder, setting = args.output / name, ALL[name]
    report = folder / "trl.json"
    if not report.exists():
        pairs, order = in_our_order(prepare(setting, rows, args, folder))
        decode = load_chat_tokenizer(str(args.model)).decode
        texts = [{part: decode(tokens) for part, tokens in pair.items()} for pair in pairs]
        write_rows(folder / "rows.jsonl", texts if setting.rows == TEXTS else [rows[index] for index in order])
        with (folder / "trl.log").open("w") as log:
            subprocess.run([args.trl_python, TRL_WORKER, folder, setting.dtype], check=True, stdout=log, stderr=log)
        if setting.rows == TEXTS and json.loads(report.read_text())["tokens"] != pairs:
            raise SystemExit(f"{folder}: TRL has made other tokens of the texts.")
    return trajectory_in(report, folder / "trl.safetensors")


def in_our_order(settings: RunSettings) -> tuple[list[dict[str, list[int]]], list[int]]:
    """Return the tokens of the rows in the order in which our run takes them, and the places of these rows."""
    pairs, _, _ = load_dataset(settings, load_chat_tokenizer(settings.model))
    size = BatchSize(settings.batch_size, accumulation=settings.gradient_accumulation_steps)
    iterations = len(pairs) // settings.batch_size
    plan = training_plan([pair.tokens for pair in pairs], size, iters=iterations, seed=settings.seed)
    order = [index for micro_batch in plan for index in micro_batch.indices]
    return [
        {part: getattr(pairs[index], part).tolist() for part in ("prompt", "chosen", "rejected")} for index in order
    ], order


def trajectory_in(report: Path, adapter: Path) -> Trajectory:
    """Read what a run has left."""
    steps = json.loads(report.read_text())["steps"]
    columns = {metric: np.array([step[metric] for step in steps]) for metric in METRICS}
    return Trajectory(columns, {name: np.array(value) for name, value in mx.load(str(adapter)).items()})


def figures(ours: Trajectory, theirs: Trajectory) -> list[str]:
    """Return the cells of a line: first and last loss, how far metrics are apart, and how far what was learned is."""
    apart = {name: np.abs(ours.steps[name] - theirs.steps[name]) for name in METRICS}
    losses = f"{theirs.steps['loss'][0]:.4f} → {theirs.steps['loss'][-1]:.4f}"
    greatest = [f"{apart[name].max():.1e}" for name in ("loss", "chosen_logps", "rejected_logps", "margins")]
    return [losses, f"{apart['loss'][-1]:.1e}", *greatest, f"{distance(ours, theirs):.2%}"]


HEADER = (
    "| {} | TRL's loss, first → last step | difference of the loss at the last step | greatest difference: loss | "
    "chosen log-prob | rejected log-prob | margin | distance of B·A |\n|" + " --- |" * 8
)


def table(heading: str, trajectories: Mapping[str, tuple[Trajectory, Trajectory]]) -> str:
    """Return a Markdown table of settings."""
    lines = [f"| {ALL[name].title} | {' | '.join(figures(*both))} |" for name, both in trajectories.items()]
    return "\n".join([HEADER.format(heading), *lines])


PANELS = {
    "loss": "loss",
    "chosen_logps": "chosen log-prob",
    "margins": "margin",
}


def draw(trajectories: Mapping[str, tuple[Trajectory, Trajectory]], file: Path) -> None:
    """Draw metrics of each setting, TRL's as a wide line with ours on it, and below how far they are apart."""
    import matplotlib

    matplotlib.use("Agg")
    # Without a date and with a fixed salt the same figures give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "trajectory", "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(PANELS) + 1,
        len(trajectories),
        figsize=(1 + 3 * len(trajectories), 8),
        sharex="col",
        squeeze=False,
        layout="constrained",
    )
    for column, (name, (ours, theirs)) in zip(axes.T, trajectories.items(), strict=True):
        numbers = np.arange(1, len(ours.steps["loss"]) + 1)
        for panel, metric in zip(column, PANELS, strict=False):
            panel.plot(numbers, theirs.steps[metric], color="tab:orange", linewidth=4, alpha=0.6, label="TRL")
            panel.plot(numbers, ours.steps[metric], color="tab:blue", linewidth=1, label="mlx-cpo-plugin")
        column[-1].semilogy(numbers, np.abs(ours.steps["loss"] - theirs.steps["loss"]), color="tab:gray")
        column[-1].set_xlabel("step")
        column[0].set_title(ALL[name].title.replace("`", ""), fontsize="medium")
    for row, label in zip(axes, [*PANELS.values(), "difference of the losses"], strict=True):
        row[0].set_ylabel(label)
        for panel in row:
            panel.grid(alpha=0.3)
    axes[0, 0].legend(frameon=False)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", required=True, help="Python of an environment with TRL, torch and peft")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="rows with prompt, chosen and rejected as texts")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--settings", nargs="+", choices=ALL, default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=100, help="of two pairs each")
    parser.add_argument("--longest", type=int, default=64, help="tokens of prompt and longer answer")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    return parser.parse_args(given)


def check_folder(args: argparse.Namespace) -> None:
    """Refuse an output folder of runs that were others; what it has would pass for the runs that are asked for."""
    kind = {name: str(getattr(args, name)) for name in ("model", "rows", "steps", "longest", "learning_rate")}
    file = args.output / "runs.json"
    if file.exists() and json.loads(file.read_text()) != kind:
        raise SystemExit(f"{args.output} has runs with {json.loads(file.read_text())}; give another --output.")
    args.output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kind))


def main(given: Sequence[str] | None = None) -> None:
    args = arguments(given)
    check_folder(args)
    rows = chosen_rows(args)
    trajectories = {
        name: (our_run(ALL[name].ours_of or name, rows, args), run_of_trl(ALL[name].trl_of or name, rows, args))
        for name in args.settings
    }
    for heading, settings in (("loss", SETTINGS), ("what differs", DIFFERENCES)):
        done = {name: both for name, both in trajectories.items() if name in settings}
        if done:
            print(table(heading, done), end="\n\n")
    losses = {name: both for name, both in trajectories.items() if name in SETTINGS}
    if losses:
        draw(losses, args.output / "trajectory.svg")


if __name__ == "__main__":
    main()
