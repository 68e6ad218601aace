"""Do models get better? Every run of docs/results.md: train, then score and ask held-out rows.

    python tests/tools/measure_learning.py --model FOLDER --data FOLDER --output FOLDER [--parts accuracy text …]

The data folder has the files of :data:`SETS`. Each finished run is a JSON file in the output folder, with the scores of
every held-out row; started again, the tool goes on with those that are missing. ``tests/tools/learning_tables.py``
turns them into tables and a plot.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

SEEDS = (0, 1, 2)
RATES = (5e-6, 2e-5, 1e-4)
LONGEST = 1024
BATCH = 8
MOST_TOKENS = 96
LORA = {"rank": 8, "dropout": 0.0, "scale": 10.0}
LOSSES: dict[str, dict[str, Any]] = {
    "cpo-paper": {"preset": "cpo-paper"},
    "sigmoid": {"dpo_cpo_loss_type": "sigmoid", "beta": 0.1},
    "simpo": {"preset": "simpo"},
    "dpop": {"preset": "dpop"},
}
BETAS: dict[str, dict[str, Any]] = {
    "cpo-paper, beta 0.05": {"preset": "cpo-paper", "beta": 0.05},
    "cpo-paper, beta 0.5": {"preset": "cpo-paper", "beta": 0.5},
    "sigmoid, beta 0.05": {"dpo_cpo_loss_type": "sigmoid", "beta": 0.05},
    "sigmoid, beta 0.5": {"dpo_cpo_loss_type": "sigmoid", "beta": 0.5},
    "simpo, beta 10": {"preset": "simpo", "beta": 10.0},
    "cpo-simpo": {"preset": "cpo-simpo"},
}


@dataclass(frozen=True)
class RowSet:
    """A file of rows: the first ``training`` are trained on, the next ``held_out`` are not.

    Attributes:
        chosen_on: how many of the last training rows are left out to choose the learning rate on.
        epochs: of a run.
    """

    name: str
    training: int
    held_out: int
    chosen_on: int
    epochs: int


SETS = {
    each.name: each
    for each in (
        RowSet("translation_prompt", 1200, 160, 80, 1),
        RowSet("openai_preference", 240, 44, 40, 2),
        RowSet("messages_dpo_mix", 210, 47, 40, 1),
        RowSet("hh_strings", 31, 15, 6, 3),
    )
}


@dataclass(frozen=True)
class Task:
    """One run.

    Attributes:
        part: of the measurements.
        rows: the name of a set.
        trainer: ``cpo``, the host's ``sft`` or ``dpo``, or ``none`` for the model as it is.
        loss: what the setting is called.
        settings: of the loss, and whatever else differs.
        training, held_out: numbers of the rows, the first and the one behind the last.
        into_english: of the rows, take only translations into English, and let the model answer the held-out ones.
        quantised: bits in which the merged model is scored, too.
    """

    part: str
    rows: str
    trainer: str
    loss: str
    rate: float
    seed: int
    epochs: int
    training: tuple[int, int]
    held_out: tuple[int, int]
    settings: dict[str, Any] = field(default_factory=dict)
    into_english: bool = False
    quantised: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """What the file of the run is called."""
        words = f"{self.part} {self.rows} {self.trainer} {self.loss} {self.rate:g} seed {self.seed}"
        return words.replace(", ", " ").replace(" ", "_")

    @property
    def cost(self) -> float:
        """How long it takes, beside others."""
        longer = {"messages_dpo_mix": 4.0, "openai_preference": 2.0}.get(self.rows, 1.0)
        return self.epochs * (self.training[1] - self.training[0]) * longer + 200 * self.into_english


def untrained(rows: RowSet, held_out: tuple[int, int], part: str) -> Task:
    """The model as it is."""
    return Task(part, rows.name, "none", "before training", 0.0, 0, 0, (0, 0), held_out)


def rate_tasks(sets: Iterable[RowSet], losses: Iterable[str] = LOSSES) -> Iterator[Task]:
    """Each loss at every rate, judged by training rows that are left out; of a long file, the first 400 rows train."""
    for rows in sets:
        end = rows.training - rows.chosen_on
        held_out = (end, rows.training)
        yield untrained(rows, held_out, "rates")
        for loss in losses:
            for rate in RATES:
                training = (0, min(end, 400))
                yield Task("rates", rows.name, "cpo", loss, rate, 0, rows.epochs, training, held_out, LOSSES[loss])


def accuracy_tasks(sets: Iterable[RowSet], rates: dict[tuple[str, str], float]) -> Iterator[Task]:
    """Each loss that a rate was chosen for, at this rate with three seeds."""
    for rows in sets:
        held_out = (rows.training, rows.training + rows.held_out)
        yield untrained(rows, held_out, "accuracy")
        for (name, loss), rate in rates.items():
            for seed in SEEDS if name == rows.name else ():
                training = (0, rows.training)
                yield Task("accuracy", name, "cpo", loss, rate, seed, rows.epochs, training, held_out, LOSSES[loss])


def text_tasks() -> Iterator[Task]:
    """Answers after SFT, DPO and CPO at equal steps."""
    rows = SETS["translation_prompt"]
    held_out = (rows.training, rows.training + rows.held_out)
    yield replace(untrained(rows, held_out, "text"), into_english=True)
    for seed in SEEDS:
        for rate in RATES[1:]:
            for trainer, settings in (
                ("sft", {"mask_prompt": True}),
                ("dpo", {"beta": 0.1, "reference_model_path": None}),
                ("cpo", LOSSES["cpo-paper"]),
            ):
                loss = {"sft": "SFT", "dpo": "DPO", "cpo": "cpo-paper"}[trainer]
                yield Task(
                    "text", rows.name, trainer, loss, rate, seed, 1, (0, rows.training), held_out, settings, True
                )


def quantised_tasks() -> Iterator[Task]:
    """LoRA, LoRA on a base of 4 bits, and LoRA trained for 4 bits of either quantiser, scored merged and quantised."""
    rows = SETS["translation_prompt"]
    held_out = (rows.training, rows.training + rows.held_out)
    ways: dict[str, dict[str, Any]] = {
        "LoRA": {},
        "QLoRA": {"load_in_4bits": True},
        "QAT": {"qat_enable": True, "qat_bits": 4, "qat_group_size": 64},
        "QAT, host": {"qat_enable": True, "qat_bits": 4, "qat_group_size": 64, "qat_quantizer": "host"},
    }
    yield replace(untrained(rows, held_out, "quantised"), quantised=(8, 4))
    for seed in SEEDS:
        for way, settings in ways.items():
            merged = {**LOSSES["cpo-paper"], **settings}
            bits = {"LoRA": (8, 4), "QLoRA": ()}.get(way, (4,))
            yield Task("quantised", rows.name, "cpo", way, 1e-4, seed, 1, (0, 400), held_out, merged, quantised=bits)


def beta_tasks(sets: Iterable[RowSet], losses: Iterable[str]) -> Iterator[Task]:
    """Each loss with its other betas at two rates with three seeds, on the first 400 rows."""
    among = {name: each for name, each in {**LOSSES, **BETAS}.items() if any(loss in name for loss in losses)}
    for rows in sets:
        held_out = (rows.training, rows.training + rows.held_out)
        training = (0, min(rows.training, 400))
        yield untrained(rows, held_out, "betas")
        for loss, settings in among.items():
            for rate in RATES[1:]:
                for seed in SEEDS:
                    yield Task("betas", rows.name, "cpo", loss, rate, seed, rows.epochs, training, held_out, settings)


class Bench:
    """What every task needs: the model's folder, the rows, a folder for results."""

    def __init__(self, model: str, data: Path, output: Path) -> None:
        self.model, self.data, self.output = model, data, output

    def lines(self, task: Task, between: tuple[int, int]) -> list[str]:
        """Return rows of a task's file, as JSON."""
        lines = (self.data / f"{task.rows}.jsonl").read_text(encoding="utf-8").splitlines()[slice(*between)]
        if task.into_english:
            lines = [line for line in lines if json.loads(line)["language_pair"].endswith("-en")]
        return lines

    def do(self, task: Task) -> dict[str, Any]:
        """Train, score, ask, and write what came of it."""
        begun = time.time()
        with tempfile.TemporaryDirectory() as folder:
            result = measured(self, task, Path(folder))
        result |= {"task": asdict(task), "seconds_in_all": time.time() - begun}
        file = self.output / f"{task.name}.json"
        temporary = file.with_suffix(".part")
        temporary.write_text(json.dumps(result))
        temporary.replace(file)
        return result


def measured(bench: Bench, task: Task, folder: Path) -> dict[str, Any]:
    """Return what a run gives: time, memory, the scores and, if wanted, the answers of held-out rows."""
    import mlx.core as mx
    from mlx_lm import load

    data = folder / "data"
    data.mkdir()
    held_out = folder / "held_out.jsonl"
    held_out.write_text("\n".join(bench.lines(task, task.held_out)) + "\n")
    lines = training_lines(bench, task)
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")
    (data / "valid.jsonl").write_text("\n".join(lines[:BATCH]) + "\n")
    mx.clear_cache()
    mx.reset_peak_memory()
    begun = time.perf_counter()
    if task.trainer == "none":
        model, tokenizer = load(bench.model)[:2]
    else:
        model, tokenizer = trained(bench, task, data, folder / "adapters")
    result: dict[str, Any] = {"seconds": time.perf_counter() - begun, "peak_memory": mx.get_peak_memory()}
    result["scores"] = scores(bench, task, model, held_out)
    if task.into_english:
        result["answers"] = answers(task, bench, model, tokenizer)
    if task.quantised:
        result["quantised_scores"] = {
            bits: scores(bench, task, each, held_out) for bits, each in quantised(bench, model, task.quantised)
        }
    return result


def training_lines(bench: Bench, task: Task) -> list[str]:
    """Return the rows that a trainer reads: for SFT, prompt and chosen answer."""
    lines = bench.lines(task, task.training) or bench.lines(task, task.held_out)[:1]
    if task.trainer != "sft":
        return lines
    rows = map(json.loads, lines)
    return [json.dumps({"prompt": row["prompt"], "completion": row["chosen"]}) for row in rows]


def trained(bench: Bench, task: Task, data: Path, adapters: Path) -> tuple[Any, Any]:
    """Return the model and its tokenizer after a run of the host's command, from Python."""
    import mlx.core as mx

    rows = len((data / "train.jsonl").read_text().splitlines())
    settings: dict[str, Any] = {
        "model": bench.model,
        "data": str(data),
        "adapter_path": str(adapters),
        "learning_rate": task.rate,
        "seed": task.seed,
        "batch_size": min(BATCH, rows),
        "max_seq_length": LONGEST,
        "num_layers": -1,
        "lora_parameters": LORA,
        "steps_per_report": 10,
        "steps_per_eval": 10**6,
        "val_batches": 0,
        "save_every": 10**6,
        **task.settings,
    }
    if task.trainer == "cpo":
        from mlx_cpo_plugin import train

        result = train(**settings, epochs=task.epochs, steps_per_sample=0)
        return result.model, result.tokenizer
    from mlx_lm import load
    from mlx_lm_lora.train import main

    from mlx_cpo_plugin.bench.host_trainer import make_runnable

    make_runnable()
    settings |= {"train": True, "train_mode": task.trainer, "iters": task.epochs * rows // BATCH, "fuse": False}
    try:
        main({**settings, "train_type": "lora", "val_batches": 1, "optimizer": "adam", "test": False})
    finally:
        mx.enable_compile()
    return load(bench.model, adapter_path=str(adapters))[:2]


def scores(bench: Bench, task: Task, model: Any, rows: Path) -> dict[str, list[float]]:
    """Return log-probs, in nats, and numbers of tokens of both answers of each row, in the order of the file."""
    import numpy as np

    from mlx_cpo_plugin.data import load_dataset
    from mlx_cpo_plugin.host import load_chat_tokenizer
    from mlx_cpo_plugin.model.scoring import prepared_scorer
    from mlx_cpo_plugin.settings.config import resolve
    from mlx_cpo_plugin.training.validation import scored_batches

    wanted = {"train_mode": "cpo", "train": True, "data": str(rows), "max_seq_length": LONGEST, "model": bench.model}
    pairs = load_dataset(resolve(wanted).settings, load_chat_tokenizer(bench.model))[0]
    found: dict[str, dict[str, float]] = {}
    with prepared_scorer(model, pairs, "auto", lambda _: None) as scorer:
        for part, together in scored_batches(model, pairs, False, batch_size=4, scorer=scorer):
            columns = {name: np.array(value, np.float64).tolist() for name, value in part._asdict().items()}
            for place, pair in enumerate(together):
                found[pair.source] = {name: column[place] for name, column in columns.items()}
    order = [found[pair.source] for pair in pairs]
    return {name: [row[name] for row in order] for name in order[0]}


def answers(task: Task, bench: Bench, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Return the greedy answer to every held-out prompt, and whether it ended by itself."""
    from mlx_cpo_plugin.comparison.answering import answers
    from mlx_cpo_plugin.comparison.questions import Question

    rows = [json.loads(line) for line in bench.lines(task, task.held_out)]
    questions = [
        Question(
            source=f"row {number}",
            prompt=row["prompt"],
            text=row["prompt"],
            tokens=tokenizer.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True
            ),
        )
        for number, row in enumerate(rows, start=1)
    ]
    given = answers(model, tokenizer, questions, MOST_TOKENS, task.loss, print)
    return [
        {
            "answer": answer.text,
            "tokens": len(answer.tokens),
            "ended": answer.finished,
            "reference": row["reference"],
        }
        for answer, row in zip(given, rows, strict=True)
    ]


def quantised(bench: Bench, model: Any, among: Iterable[int]) -> Iterator[tuple[int, Any]]:
    """Merge the adapter, and yield bits and the model in these, as ``mlx_lm.convert -q`` makes it in groups of 64."""
    import mlx.nn as nn
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm import load

    fused = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
    if fused:
        model.update_modules(tree_unflatten(fused))
    for bits in among:
        rounded = load(bench.model)[0]
        rounded.load_weights(tree_flatten(model.parameters()))
        nn.quantize(rounded, 64, bits)
        yield bits, rounded


def held_out_loss(task: Task, measured_scores: dict[str, list[float]]) -> float:
    """Return the mean loss of the rows that a task holds out, in the objective that it trains with."""
    import mlx.core as mx

    from mlx_cpo_plugin.model.logps import AnswerScores
    from mlx_cpo_plugin.settings.config import resolve
    from mlx_cpo_plugin.training.objective import objective_for

    settings = resolve({"train_mode": "cpo", "train": True, **task.settings}).settings
    options = {"beta": settings.beta, "delta": settings.delta, **settings.loss_options}
    objective = objective_for(settings.dpo_cpo_loss_type, options, cpo_alpha=settings.cpo_alpha)
    columns = {name: mx.array(measured_scores[name]) for name in AnswerScores._fields}
    if objective.length_normalised:
        for side in ("chosen", "rejected"):
            columns[f"{side}_logps"] = columns[f"{side}_logps"] / columns[f"{side}_tokens"]
    answer_scores = AnswerScores(**columns)
    nll = objective.chosen_nll(answer_scores).sum() / answer_scores.chosen_tokens.sum()
    return float(objective.losses(answer_scores).mean() + settings.cpo_alpha * nll)


def chosen_rates(
    output: Path, sets: Iterable[RowSet], among: Sequence[str], rates: Sequence[float]
) -> dict[tuple[str, str], float]:
    """Return, for each set and loss, the rate with the least loss of the rows that were left out for this choice.

    One of one rate is no choice, and needs no measurement.
    """
    found = {}
    for rows in sets:
        if len(rates) == 1:
            found |= {(rows.name, loss): rates[0] for loss in among}
            continue
        losses: dict[str, dict[float, float]] = {loss: {} for loss in among}
        for task in rate_tasks([rows], among):
            file = output / f"{task.name}.json"
            if task.rate in rates and task.loss in losses and file.exists():
                losses[task.loss][task.rate] = held_out_loss(task, json.loads(file.read_text())["scores"])
        for loss, of_rates in losses.items():
            if not of_rates:
                raise SystemExit(f"No rate was measured for {loss} on {rows.name}: measure --parts rates first.")
            found[rows.name, loss] = min(of_rates, key=lambda rate: of_rates[rate])
            print(rows.name, loss, {rate: round(value, 4) for rate, value in of_rates.items()}, flush=True)
    return found


_bench: Bench | None = None


def begin(model: str, data: Path, output: Path) -> None:
    """Prepare a process that does tasks."""
    global _bench
    import mlx.core as mx

    from mlx_cpo_plugin.blas import use_fast_blas

    use_fast_blas()
    mx.set_cache_limit(2 << 30)
    log = os.open(output / f"log-{os.getpid()}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _bench = Bench(model, data, output)


def do(task: Task, until: float) -> str:
    """Do a task in a process of its own, unless the time is over; return one line."""
    if _bench is None or time.time() > until:
        return f"left out: {task.name}"
    try:
        result = _bench.do(task)
    except Exception:  # one run that fails is not the end of the others
        traceback.print_exc()
        return f"FAILED: {task.name}: {traceback.format_exc().splitlines()[-1]}"
    return f"{result['seconds']:7.1f} s, {result['seconds_in_all']:7.1f} s in all: {task.name}"


def restricted(
    tasks: Iterable[Task], most: int, rates: Sequence[float], seeds: Sequence[int], epochs: int | None
) -> list[Task]:
    """Return the tasks with some rates and seeds, and the model as it is, on at most so many training rows."""
    return [
        replace(task, training=(task.training[0], min(task.training[1], most)), epochs=epochs or task.epochs)
        for task in tasks
        if task.trainer == "none" or (task.rate in rates and task.seed in seeds)
    ]


def run_all(pool: ProcessPoolExecutor, tasks: Sequence[Task], output: Path, until: float) -> None:
    """Do what is not done yet: the model as it is, with which all others are compared, then what takes longest."""
    missing = [task for task in tasks if not (output / f"{task.name}.json").exists()]
    missing.sort(key=lambda task: (task.trainer != "none", -task.cost))
    waiting = [pool.submit(do, task, until) for task in missing]
    for done in as_completed(waiting):
        print(done.result(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="accuracy needs rates that were measured, or one of --rates",
    )
    parser.add_argument(
        "--losses",
        nargs="+",
        choices=LOSSES,
        default=list(LOSSES),
        help="of rates, accuracy and betas; there cpo-simpo counts as simpo",
    )
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="the only ones; one needs no choosing")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS)
    parser.add_argument("--epochs", type=int, help="in place of each file's own; into a folder of its own")
    parser.add_argument("--most-rows", type=int, default=10**6, help="train on no more rows of a file, its first ones")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no run after these")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    until = time.time() + given.seconds
    sets = [SETS[name] for name in given.sets]
    pool = ProcessPoolExecutor(
        given.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=begin,
        initargs=(given.model, given.data.absolute(), given.output.absolute()),
    )

    def run(tasks: Iterable[Task]) -> None:
        run_all(pool, restricted(tasks, given.most_rows, given.rates, given.seeds, given.epochs), given.output, until)

    with pool:
        first = [*(rate_tasks(sets, given.losses) if "rates" in given.parts else ())]
        first += quantised_tasks() if "quantised" in given.parts else ()
        run(first)
        then = []
        if "accuracy" in given.parts:
            then += accuracy_tasks(sets, chosen_rates(given.output, sets, given.losses, given.rates))
        then += text_tasks() if "text" in given.parts else ()
        run(then)
        run(beta_tasks(sets, given.losses) if "betas" in given.parts else ())


PARTS = ("rates", "quantised", "accuracy", "text", "betas")

if __name__ == "__main__":
    main()
