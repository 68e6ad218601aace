"""CPO's own options, and presets with published values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from mlx_cpo_plugin.settings.nested import auto_if_true, home_expanded, prompts_of_file, sample_prompts
from mlx_cpo_plugin.settings.options import DATA, LOSS, MEMORY, REPORTS, SAVING, TRAINING, option, options_of
from mlx_cpo_plugin.types import Values

LOSS_OPTION = "dpo_cpo_loss_type"

MEASURES = {"margin": ("margins", 1), "accuracy": ("accuracies", 1), "loss": ("loss", -1)}
"""Value of ``save_best`` -> the metric that is compared, and whether more of it is better (1) or less (-1)."""


class Preset(NamedTuple):
    """Values of the loss and its options that belong together, under one name; explicit settings take precedence."""

    name: str
    title: str
    source: str
    values: Values


# Options of the loss only: the learning rates and batch sizes of these papers are for full fine-tuning of 7B models.
PRESETS: tuple[Preset, ...] = (
    Preset(
        "cpo-paper",
        "CPO with its likelihood term",
        # Section 3 weighs both terms equally, section 4.2 takes DPO's usual temperature.
        "Xu et al. 2024, arXiv 2401.08417, sections 3 and 4.2",
        {"dpo_cpo_loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0},
    ),
    Preset(
        "simpo",
        "SimPO",
        # The authors advise to start from gamma / beta 0.5 and beta 2 to 2.5, which is how they trained Llama-3-Base.
        "Meng et al. 2024, arXiv 2405.14734, and its repository princeton-nlp/SimPO",
        {"dpo_cpo_loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
    ),
    Preset(
        "cpo-simpo",
        "SimPO with the likelihood term of CPO",
        # No paper: these are the values of training_configs/llama-3-8b-instruct-cpo-simpo.yaml.
        "the repository fe1ixxu/CPO_SIMPO of the author of CPO",
        {"dpo_cpo_loss_type": "simpo", "beta": 10.0, "simpo_gamma": 5.4, "cpo_alpha": 0.05},
    ),
    Preset(
        "dpop",
        "DPO-Positive without a reference",
        # The paper's beta scales ratios to a reference that CPO does not have; 0.05 is what this project advises.
        "Pal et al. 2024, arXiv 2402.13228, for delta",
        {"dpo_cpo_loss_type": "dpop", "beta": 0.05, "delta": 50.0, "cpo_alpha": 0.0},
    ),
)


@dataclass
class CPOSettings:
    """The options of CPO, in the order in which the command line lists them."""

    dpo_cpo_loss_type: str = option("sigmoid", "Preference loss.", title="Loss")
    beta: float = option(
        0.1, "Temperature inside the loss; without cpo_alpha start lower than with DPO, at 0.05.", above=0
    )
    delta: float = option(50.0, "Coefficient of the drift penalty; only used with dpop.", minimum=0)
    cpo_alpha: float = option(
        0.0,
        "Weight of the negative log-likelihood of the chosen answers, added to any loss; the CPO paper's is 1.",
        minimum=0,
    )
    label_smoothing: float = option(
        0.0, "Assumed probability that chosen and rejected are swapped.", minimum=0, below=0.5
    )
    simpo_gamma: float = option(
        0.5, "Target margin between the rewards of the two answers, in SimPO and AlphaPO.", minimum=0
    )
    alphapo_alpha: float = option(
        0.25, "Shape of AlphaPO's rewards (1 - p ** -alphapo_alpha) / alphapo_alpha; 0 makes it SimPO."
    )
    preset: str | None = option(
        None,
        "Fill the loss and its options with published values; explicit settings take precedence.",
        choices=tuple(preset.name for preset in PRESETS),
    )
    reference_model_path: str | None = option(
        None,
        "Not used: CPO needs no reference model.",
        title="Reference model",
        inside=home_expanded,
        free_on_resume=True,
    )
    overlong: str = option(
        "cut",
        "What to do with rows longer than max_seq_length: cut (oldest turns of the prompt first), drop, or error.",
        title="Overlong rows",
        choices=("cut", "drop", "error"),
        group=DATA,
    )
    chat_template: str | None = option(
        None, "Chat template in place of the tokenizer's own: Jinja text, or the path of a file with it.", group=DATA
    )
    chat_template_kwargs: Values | None = option(
        None,
        "Arguments of the chat template, such as enable_thinking; a row's own take precedence.",
        title="Chat template arguments",
        group=DATA,
    )
    scoring: str = option(
        "auto",
        "Compute a prompt once for both answers (shared) or for each (plain); auto tests whether the model allows it.",
        choices=("auto", "shared", "plain"),
        group=MEMORY,
    )
    pass_overhead: int | None = option(
        None,
        "What starting a pass costs, in tokens: pairs share one of up to eight times as many; long runs measure it.",
        title="Cost of a pass",
        minimum=1,
        free_on_resume=True,
        group=MEMORY,
    )
    batch_tokens: int | None = option(
        None,
        "Most tokens in a batch, prompts and both answers of its pairs together, instead of batch_size pairs.",
        minimum=1,
        group=MEMORY,
    )
    max_grad_norm: float | None = option(
        None, "Scale gradients down to this norm.", title="Maximal gradient norm", above=0, group=TRAINING
    )
    resume: str | None = option(
        None,
        "Resume training: 'auto' or true for the latest checkpoint in adapter_path, or a path.",
        spelled=auto_if_true,
        inside=home_expanded,
        free_on_resume=True,
        group=SAVING,
    )
    keep_checkpoints: int = option(
        2,
        "How many checkpoints to keep for resuming.",
        title="Checkpoints",
        minimum=1,
        free_on_resume=True,
        group=SAVING,
    )
    save_best: str | None = option(
        None,
        "Also keep the adapter of the best validation, by margin, accuracy or loss.",
        choices=tuple(MEASURES),
        free_on_resume=True,
        group=REPORTS,
    )
    load_best: bool = option(
        False,
        "End with the weights of the best validation instead of the last ones (metric: save_best, default loss).",
        free_on_resume=True,
        group=REPORTS,
    )
    eval_per_epoch: bool = option(
        False,
        "Validate at the end of each epoch instead of every steps_per_eval iterations.",
        title="Validate each epoch",
        free_on_resume=True,
        group=REPORTS,
    )
    save_per_epoch: bool = option(
        False,
        "Save at the end of each epoch instead of every save_every iterations.",
        title="Save each epoch",
        free_on_resume=True,
        group=SAVING,
    )
    sample_prompts: list[str | Values] | None = option(
        None,
        "Prompts that the model answers while it trains: a file, or a list; by default those of two validation rows.",
        spelled=prompts_of_file,
        inside=sample_prompts,
        free_on_resume=True,
        group=REPORTS,
    )
    steps_per_sample: int | None = option(
        None,
        "Iterations between answers to sample_prompts; at each validation when left out, and 0 for none.",
        minimum=0,
        free_on_resume=True,
        group=REPORTS,
    )
    early_stopping_patience: int | None = option(
        None,
        "Stop after this many validations without improvement (metric: save_best, default loss).",
        minimum=1,
        free_on_resume=True,
        group=REPORTS,
    )


CPO_OPTIONS = options_of(CPOSettings, LOSS)
_BY_NAME = {own.name: own for own in CPO_OPTIONS}
BETA, DELTA, LABEL_SMOOTHING = (_BY_NAME[name] for name in ("beta", "delta", "label_smoothing"))
SAMPLE_PROMPTS = _BY_NAME["sample_prompts"]
SIMPO_GAMMA, ALPHAPO_ALPHA, CPO_ALPHA = (_BY_NAME[name] for name in ("simpo_gamma", "alphapo_alpha", "cpo_alpha"))
OF_EVERY_LOSS = tuple(
    own for own in CPO_OPTIONS if own not in (BETA, DELTA, LABEL_SMOOTHING, SIMPO_GAMMA, ALPHAPO_ALPHA)
)
"""Settings of every loss; none may have an option so called."""
