"""What is exported: a model with its adapter on, and what both give a few rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
from mlx_lm.utils import load_config

import mlx_cpo_plugin.demo
from mlx_cpo_plugin.checkpoints.run_identity import read_record, run_in
from mlx_cpo_plugin.comparison.contenders import MODEL_CONFIG, contenders, kind_of_folder, load_base, put_on, run_folder
from mlx_cpo_plugin.comparison.questions import Say, held_out_pairs
from mlx_cpo_plugin.data.chat_template import read_template
from mlx_cpo_plugin.data.dataset import load_splits
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer
from mlx_cpo_plugin.errors import DataError, named
from mlx_cpo_plugin.export.errors import ExportError
from mlx_cpo_plugin.host import load_chat_tokenizer
from mlx_cpo_plugin.run.building import QUANTISED_LOADS, model_folder, quantised_load
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.training.held_out import HeldOutScores, held_out_rows, held_out_scores
from mlx_cpo_plugin.types import Tokenizer, Values

DEMO_ROWS = Path(mlx_cpo_plugin.demo.__file__).parent / "data"


@dataclass
class Trained:
    """An adapter on its base model.

    Attributes:
        adapter_path: where it lies.
        run: the id of the run that left it; None where that is not known.
        base: the local folder of the base model.
        config: the base model's ``config.json``.
        tokenizer: with the chat template of the run.
        template_arguments: of the chat template, as the run's prompts were rendered with.
        rows: a few held-out rows, whose log-probs ``before`` training and with the adapter, ``scores``, are known.
    """

    adapter_path: Path
    run: str | None
    settings: RunSettings
    base: Path
    config: Values
    model: nn.Module
    tokenizer: Tokenizer
    template_arguments: Values
    rows: Sequence[PreferencePair]
    before: HeldOutScores
    scores: HeldOutScores

    @classmethod
    def load(cls, adapter_path: Path, model: str | None, data: str | None, say: Say) -> Trained:
        """Load base model and adapter, and score both.

        Args:
            model, data: in place of those of the run.

        Raises:
            UserError: there is no adapter, no model, or ``data`` cannot be read, or log-probs are not finite.
        """
        if kind_of_folder(adapter_path) == MODEL_CONFIG:
            raise ExportError(
                f"{named(str(adapter_path))} holds a whole model, which mlx_lm loads as it is; give the folder of an "
                "adapter.",
                place=str(adapter_path),
            )
        _, tuned = contenders([adapter_path], model, data)
        folder = run_folder(adapter_path)
        settings, record = tuned.settings, read_record(folder)
        run, arguments = (record.run, record.template_arguments) if record else (run_in(folder), {})
        settings.begun = run.begun if run else None  # which templates tell that print the date
        tokenizer = load_chat_tokenizer(settings.model)
        rows = _rows(settings, tokenizer, data is not None, say)
        template = read_template(settings.chat_template)
        if template:
            tokenizer.chat_template = template
        say(f"Loading {settings.model}.")
        base, _ = load_base(settings)
        before = held_out_scores(base, rows, settings.scoring, settings.step_size)
        say(f"Loading the adapter {adapter_path}.")
        put_on(base, tuned)
        after = held_out_scores(base, rows, settings.scoring, settings.step_size)
        if not np.isfinite(after.logps).all():
            raise ExportError(
                f"{named(str(adapter_path))} gives held-out rows log-probs that are not finite: its run diverged, or "
                f"model {settings.model!r} is damaged; give another.",
                place=str(adapter_path),
            )
        base_folder = model_folder(settings.model)
        return cls(
            adapter_path,
            run.id if run else None,
            settings,
            base_folder,
            load_config(base_folder),
            base,
            tokenizer,
            arguments or ChatTokenizer.from_settings(tokenizer, settings).variant_of(rows[0].prompt),
            rows,
            before,
            after,
        )

    @property
    def bits_of_base(self) -> int | None:
        """The bits of the base weights that it was trained on, on disk or as loaded; None where they were whole."""
        on_disk: Any = self.config.get("quantization")
        if on_disk:
            return int(on_disk["bits"])
        key = quantised_load(self.settings)
        return None if key is None else int(QUANTISED_LOADS[key]["bits"])

    @property
    def text_model(self) -> nn.Module:
        """The model, or the language model inside a multimodal one."""
        return self.model.language_model if "language_model" in self.model else self.model

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts its BOS before a text, and before the prompts that the adapter was trained on."""
        bos, inner = self.tokenizer.bos_token_id, self.inner_tokenizer
        return bos is not None and [int(self.rows[0].prompt[0])] == [bos] == inner.encode("a")[:1]

    @property
    def inner_tokenizer(self) -> Any:
        """That of transformers, inside mlx_lm's wrapper."""
        return getattr(self.tokenizer, "_tokenizer", self.tokenizer)

    def scores_of(self, model: nn.Module) -> HeldOutScores:
        """Return what another model gives the same rows."""
        return held_out_scores(model, self.rows, self.settings.scoring, self.settings.step_size)


def _rows(settings: RunSettings, tokenizer: Any, is_given: bool, say: Say) -> list[PreferencePair]:
    """Return a few held-out rows of the run, or of the built-in example where its own cannot be read."""
    try:
        return held_out_rows(held_out_pairs(settings, tokenizer, is_given=is_given, needed=True, say=say)[1])
    except DataError:
        if is_given:
            raise
    say("The run's held-out rows cannot be read: the export is scored on those of mlx-cpo demo; --data names others.")
    kept = ("chat_template", "chat_template_kwargs", "begun")
    built_in = RunSettings.of({"data": str(DEMO_ROWS), **{name: getattr(settings, name) for name in kept}})
    return held_out_rows(load_splits(built_in, tokenizer, ("test",))[2])
