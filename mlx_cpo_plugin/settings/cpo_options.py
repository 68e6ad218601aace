"""The options of CPO beside those that every train mode has, and the presets of the papers' values."""

from __future__ import annotations

from mlx_cpo_plugin.types import Option, Preset

LOSS_OPTION = "dpo_cpo_loss_type"

MEASURES = {"margin": ("margins", 1), "accuracy": ("accuracies", 1), "loss": ("loss", -1)}
"""Value of ``save_best`` -> the metric that is compared, and whether more of it is better (1) or less (-1)."""

# The presets set options of the loss only: the learning rates and batch sizes of these papers are for full fine-tuning
# of 7B models and more, and would mislead with an adapter.
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

BETA = Option(
    "beta", float, 0.1, "Temperature inside the loss; start lower than with DPO, e.g. 0.05.", title="Beta", above=0
)
DELTA = Option(
    "delta",
    float,
    50.0,
    "Coefficient of the drift penalty; only used with dpop.",
    title="Delta",
    minimum=0,
    shown_when={LOSS_OPTION: ("dpop",)},
)
LABEL_SMOOTHING = Option(
    "label_smoothing",
    float,
    0.0,
    "Probability with which chosen and rejected are taken to be the wrong way round.",
    title="Label smoothing",
    minimum=0,
    below=0.5,
    shown_when={LOSS_OPTION: ("sigmoid", "simpo", "alphapo")},
)
SIMPO_GAMMA = Option(
    "simpo_gamma",
    float,
    0.5,
    "Margin that SimPO and AlphaPO want between the rewards of the two answers.",
    title="SimPO gamma",
    minimum=0,
    shown_when={LOSS_OPTION: ("simpo", "alphapo")},
)
ALPHAPO_ALPHA = Option(
    "alphapo_alpha",
    float,
    0.25,
    "Shape of AlphaPO's rewards (1 - p ** -alphapo_alpha) / alphapo_alpha; 0 makes it SimPO.",
    title="AlphaPO alpha",
    shown_when={LOSS_OPTION: ("alphapo",)},
)
CPO_ALPHA = Option(
    "cpo_alpha",
    float,
    0.0,
    "Weight of the negative log-likelihood of the chosen answers, added to any loss; the CPO paper's is 1.",
    title="CPO alpha",
    minimum=0,
)
PRESET = Option(
    "preset",
    str,
    None,
    "Fill the loss and its options with published values; options set besides win.",
    title="Preset",
    choices=tuple(preset.name for preset in PRESETS),
    optional=True,
)
LOSS = Option(LOSS_OPTION, str, "sigmoid", "Preference loss.", title="Loss")
REFERENCE = Option(
    "reference_model_path", str, None, "Not used: CPO needs no reference model.", title="Reference model", optional=True
)
SCORING = Option(
    "scoring",
    str,
    "auto",
    "Compute a prompt once for both answers (shared) or for each (plain); auto tries whether the model allows it.",
    title="Scoring",
    choices=("auto", "shared", "plain"),
)
BATCH_TOKENS = Option(
    "batch_tokens",
    int,
    None,
    "Tokens, of prompt and both answers, that the pairs of a batch have together at most, instead of batch_size pairs.",
    title="Batch tokens",
    minimum=1,
    optional=True,
)
RESUME = Option(
    "resume",
    str,
    None,
    "Go on from the last whole checkpoint: 'auto' for that of adapter_path, or a folder.",
    title="Resume",
    optional=True,
)
KEEP_CHECKPOINTS = Option(
    "keep_checkpoints",
    int,
    2,
    "How many checkpoints to keep; each holds what resuming needs.",
    title="Checkpoints",
    minimum=1,
)
SAVE_BEST = Option(
    "save_best",
    str,
    None,
    "Keep the adapter of the best validation, too, by margin, accuracy or loss.",
    title="Save best",
    choices=tuple(MEASURES),
    optional=True,
)
EARLY_STOPPING_PATIENCE = Option(
    "early_stopping_patience",
    int,
    None,
    "Stop after so many validations in a row without a better one, by save_best or else by loss.",
    title="Early stopping patience",
    minimum=1,
    optional=True,
)
MAX_GRAD_NORM = Option(
    "max_grad_norm",
    float,
    None,
    "Scale gradients down to this norm.",
    title="Maximal gradient norm",
    above=0,
    optional=True,
)

OVERLONG = Option(
    "overlong",
    str,
    "cut",
    "What becomes of rows longer than max_seq_length: cut (oldest turns of the prompt first), drop, or error.",
    title="Overlong rows",
    choices=("cut", "drop", "error"),
)
CHAT_TEMPLATE = Option(
    "chat_template",
    str,
    None,
    "Chat template in place of the tokenizer's own: Jinja text, or a file that holds it.",
    title="Chat template",
    optional=True,
)
CHAT_TEMPLATE_KWARGS = Option(
    "chat_template_kwargs",
    dict,
    None,
    "Arguments of the chat template, such as enable_thinking; a row's own go before them.",
    title="Chat template arguments",
    optional=True,
)

CPO_OPTIONS: tuple[Option, ...] = (
    BETA,
    DELTA,
    LOSS,
    CPO_ALPHA,
    LABEL_SMOOTHING,
    SIMPO_GAMMA,
    ALPHAPO_ALPHA,
    PRESET,
    REFERENCE,
    OVERLONG,
    CHAT_TEMPLATE,
    CHAT_TEMPLATE_KWARGS,
    SCORING,
    BATCH_TOKENS,
    MAX_GRAD_NORM,
    RESUME,
    KEEP_CHECKPOINTS,
    SAVE_BEST,
    EARLY_STOPPING_PATIENCE,
)
