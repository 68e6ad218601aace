"""``mlx-cpo demo``: train the tiny chat model with CPO through mlx-lm-lora, and show what changed."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_lm import generate, load

from mlx_cpo_plugin.data import load_dataset
from mlx_cpo_plugin.device import compile_where_it_pays
from mlx_cpo_plugin.errors import StoppedError
from mlx_cpo_plugin.settings import config
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.training.trainer import evaluate_cpo

DEMO_DIR = Path(__file__).parent
MAX_ANSWER_TOKENS = 64

SHOWN_PROMPTS = (
    "What is the price of the lamp?",
    "When can you deliver the whistle?",
    "Which colour does the helmet have?",
)
"""Three of the held-out prompts."""


@dataclass(frozen=True)
class Measurement:
    """What a model makes of the held-out rows.

    Attributes:
        accuracy: share of the rows in which the chosen answer is the more probable one.
        margin: mean log-prob of the chosen minus the rejected answer, in nats.
        answers: the model's own greedy answer to each of :data:`SHOWN_PROMPTS`.
    """

    accuracy: float
    margin: float
    answers: tuple[str, ...]


def run_demo(out_dir: Path | None = None) -> int:
    """Measure, train through the host's ``main``, measure again, and print both.

    Args:
        out_dir: folder for the config, the adapter and its metrics; a new temporary one when it is ``None``.

    Returns:
        0, or 1 where preference training did not raise the held-out accuracy.
    """
    if out_dir is not None:
        return _run_in(out_dir)
    new = Path(tempfile.mkdtemp(prefix="mlx-cpo-demo-"))
    try:
        return _run_in(new)
    except (KeyboardInterrupt, StoppedError) as error:
        shutil.rmtree(new, ignore_errors=True)
        print("\nThe demo was interrupted; nothing of it is kept.", file=sys.stderr)
        return error.exit_code if isinstance(error, StoppedError) else 128 + signal.SIGINT


def _run_in(out_dir: Path) -> int:
    import mlx_lm_lora.train as host_train

    started = time.perf_counter()
    config_file = write_config(out_dir)
    settings = config.resolve({"config": str(config_file)}).settings

    print("Measuring the model before preference training ...")
    before = measure(settings)
    host_train.main({"config": str(config_file)})
    print("Measuring the model with its adapter ...")
    after = measure(settings, adapter_path=settings.adapter_path)

    print(comparison(before, after))
    print(f"\nConfig, adapter and metrics: {out_dir}\nTook {time.perf_counter() - started:.0f} s.")
    return 0 if after.accuracy > before.accuracy else 1


def write_config(out_dir: Path) -> Path:
    """Copy ``cpo.yaml`` into ``out_dir`` with full paths in it; returns the copy."""
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = {"model": DEMO_DIR / "model", "data": DEMO_DIR / "data", "adapter_path": out_dir.resolve() / "adapters"}
    config_file = out_dir / "cpo.yaml"
    config_file.write_text(with_paths((DEMO_DIR / "cpo.yaml").read_text(encoding="utf-8"), paths), encoding="utf-8")
    return config_file


def with_paths(text: str, paths: Mapping[str, Path]) -> str:
    """Replace the values of top-level keys in YAML text; comments on other lines stay."""
    for key, path in paths.items():
        # JSON's quoting is YAML's, too; the backslashes of a path are doubled again for the pattern's replacement.
        value = json.dumps(str(path)).replace("\\", "\\\\")
        text = re.sub(rf"^{key}:.*$", f"{key}: {value}", text, count=1, flags=re.MULTILINE)
    return text


def measure(settings: RunSettings, adapter_path: str | None = None) -> Measurement:
    """Score the test rows and answer the shown prompts, with the adapter or without one."""
    with compile_where_it_pays():
        model, tokenizer = load(settings.model, adapter_path=adapter_path)
        _, _, test_rows = load_dataset(settings, tokenizer)
        _, _, _, means = evaluate_cpo(
            model=model,
            dataset=test_rows,
            batch_size=settings.batch_size,
            num_batches=-1,
            beta=settings.beta,
            delta=settings.delta,
            max_seq_length=settings.max_seq_length,
            loss_type=settings.dpo_cpo_loss_type,
        )
        answers = []
        for prompt in SHOWN_PROMPTS:
            tokens = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
            answers.append(generate(model, tokenizer, prompt=tokens, max_tokens=MAX_ANSWER_TOKENS).strip())
    return Measurement(means["accuracies"], means["margins"] / settings.beta, tuple(answers))


def comparison(before: Measurement, after: Measurement) -> str:
    """Return the table of both measurements, and the answers to each prompt below it."""
    lines = [
        "",
        f"{'On held-out prompts':<40}{'before':>10}{'after':>10}",
        f"{'preference accuracy':<40}{before.accuracy:>10.1%}{after.accuracy:>10.1%}",
        f"{'log-prob of chosen minus rejected, nats':<40}{before.margin:>+10.1f}{after.margin:>+10.1f}",
    ]
    for prompt, old, new in zip(SHOWN_PROMPTS, before.answers, after.answers, strict=True):
        lines += ["", prompt, f"  before: {old}", f"  after:  {new}"]
    return "\n".join(lines)
