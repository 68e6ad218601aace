"""Data types that hooks return: train modes, loss types and options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import mlx.core as mx

Values = dict[str, Any]
"""Values by key, as YAML and JSON hold them, of which whoever reads one knows the type: settings, a row, a state."""

_TYPES_IN_WORDS: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    list: "a list",
}
# Words of names as they are written in a form.
_CAPITALS = {"alphapo": "AlphaPO", "cpo": "CPO", "lora": "LoRA", "mxfp4": "MXFP4", "qat": "QAT", "simpo": "SimPO"}


@dataclass(frozen=True)
class Option:
    """One setting, described once for the command line, YAML validation, help texts and forms.

    Attributes:
        name: YAML key; ``--name-with-dashes`` on the command line.
        type: ``int``, ``float``, ``bool``, ``str``, ``dict`` or ``list``.
        help: one sentence.
        title: label in a form; derived from the name when empty.
        minimum, maximum: inclusive bounds of a number; ``above`` and ``below`` are exclusive ones.
        choices: the allowed values; empty means any.
        optional: whether ``None`` (YAML ``null``) is allowed.
        shown_when: other option's name -> values for which this option has an effect.
        spelled: what a shorter spelling stands for, ``value as written -> value``.
        listed: checks a list, where one may stand in place of text: ``(list, key, place) -> list to use``.
        inside: a further check, ``(value, key, place) -> value to use``, after type and range; see
            :mod:`mlx_cpo_plugin.settings.nested`.
        free_on_resume: whether a run may be resumed with another value, since the trained weights do not depend on it.
        group: heading of the help under which it stands; those of other distributions stand under their names.
    """

    name: str
    type: type
    default: Any
    help: str
    title: str = ""
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    choices: tuple[object, ...] = ()
    optional: bool = False
    shown_when: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    below: float | None = None
    inside: Callable[..., object] | None = None
    free_on_resume: bool = False
    spelled: Callable[[object], object] | None = None
    listed: Callable[..., object] | None = None
    group: str = ""

    @property
    def flag(self) -> str:
        """The command-line spelling, e.g. ``--simpo-gamma``."""
        return "--" + self.name.replace("_", "-")

    @property
    def label(self) -> str:
        """The title, or one derived from the name."""
        words = " ".join(_CAPITALS.get(word, word) for word in self.name.split("_"))
        return self.title or words[:1].upper() + words[1:]

    def allowed(self) -> str:
        """A phrase for the allowed values, e.g. ``a number > 0``."""
        if self.choices:
            return "one of " + ", ".join(str(choice) for choice in self.choices)
        signs = ((">", self.above), (">=", self.minimum), ("<", self.below), ("<=", self.maximum))
        limits = " and ".join(f"{sign} {limit}" for sign, limit in signs if limit is not None)
        if self.minimum is not None and self.maximum is not None:
            limits = f"from {self.minimum} to {self.maximum}"
        words = f"{_TYPES_IN_WORDS.get(self.type, self.type.__name__)} {limits}".rstrip()
        return words + (" or a list" if self.listed else "") + (" or null" if self.optional else "")


@dataclass(frozen=True)
class LossType:
    """A preference loss that ``dpo_cpo_loss_type`` can name.

    Attributes:
        fn: ``fn(chosen_logps, rejected_logps, **options) -> losses``; inputs and result are float32
            arrays of shape [B]; ``options`` holds exactly the options that this loss reads.
        formula: the loss in one line.
        source: paper and equation.
        length_normalised: whether the log-probs are means over the answer's tokens instead of sums.
        rewards: ``rewards(logps, **options)``, float32 [B] to [B]: what the metrics report as rewards and their
            margins; ``None``: ``beta`` times the log-probs.
    """

    name: str
    title: str
    fn: Callable[..., mx.array]
    formula: str
    source: str = ""
    options: tuple[Option, ...] = ()
    length_normalised: bool = False
    rewards: Callable[..., mx.array] | None = None

    def reads(self, option: str) -> bool:
        """Whether ``fn`` takes the option of this name."""
        return option in {own.name for own in self.options}


@dataclass(frozen=True)
class TrainMode:
    """A value of ``train_mode`` and the functions that carry it out.

    ``args`` has every resolved setting as an attribute, those of the mode's own options among them.

    Attributes:
        load_dataset: ``(args, tokenizer) -> (train, valid, test)``; each is a sequence, possibly empty.
        train: ``(model, optimizer, train_dataset, val_dataset, args, adapter_file, training_callback)``; writes what it
            has trained to ``adapter_file``. The callback is None where nothing tracks the run. Checkpoints, resuming,
            metrics, ``adapter_config.json`` and ``run_settings.yaml``, by which commands find a run, come from
            :func:`mlx_cpo_plugin.training.trainer.train_cpo`; a mode with a loop of its own has what that writes.
        evaluate: ``(model, dataset, args) -> metrics``, a mapping from name to float.
        options: the mode's own options, beside those that every mode shares. With one called ``dpo_cpo_loss_type`` the
            mode has a loss, which it names, and the options of the registered losses.
    """

    name: str
    title: str
    help: str
    load_dataset: Callable[..., tuple[Sequence[Any], Sequence[Any], Sequence[Any]]]
    train: Callable[..., None]
    evaluate: Callable[..., Mapping[str, float]]
    options: tuple[Option, ...] = ()

    def has(self, option: str) -> bool:
        """Whether one of the mode's own options has this name."""
        return option in {own.name for own in self.options}


class Tokenizer(Protocol):
    """What is asked of a tokenizer of transformers, or of mlx-lm's wrapper around one."""

    bos_token_id: int | None
    eos_token_id: int | None
    unk_token_id: int | None
    chat_template: str | None
    all_special_ids: Sequence[int]
    special_tokens_map: Mapping[str, object]

    def __len__(self) -> int: ...

    def __call__(self, text: str, **how: object) -> Mapping[str, list[Any]]: ...

    def encode(self, text: str, **how: object) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], **how: object) -> str: ...

    def convert_ids_to_tokens(self, ids: int) -> str: ...

    def apply_chat_template(self, conversation: list[Values], **how: object) -> str: ...
