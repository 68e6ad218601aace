"""The hooks of mlx-cpo-plugin.

A distribution adds train modes or losses by naming a module in the entry-point group ``mlx_cpo_plugin``::

    [project.entry-points.mlx_cpo_plugin]
    my_losses = "my_package.losses"

and by implementing the hooks below in that module, marked with :data:`hookimpl`.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from mlx_cpo_plugin.types import LossType, TrainMode

PROJECT_NAME = "mlx_cpo_plugin"
ENTRY_POINT_GROUP = "mlx_cpo_plugin"

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


@hookspec
def register_train_modes() -> Iterable[TrainMode]:  # type: ignore[empty-body]
    """Return the train modes that this plugin adds.

    Each is accepted as ``train_mode`` in YAML and as ``--train-mode``, with its options checked like every other.
    A name that mlx-lm-lora has is taken over; two plugins that return the same name are an error that names both.

    Example::

        from mlx_cpo_plugin import TrainMode, hookimpl

        @hookimpl
        def register_train_modes():
            return [
                TrainMode(
                    name="mean_margin",
                    title="Mean margin",
                    help="Reports how many rows there are.",
                    load_dataset=lambda args, tokenizer: ([1, 2, 3], [], []),
                    train=lambda model, optimizer, train_dataset, val_dataset, args, adapter_file,
                    training_callback: None,
                    evaluate=lambda model, dataset, args: {"loss": 0.0},
                )
            ]
    """


@hookspec
def register_loss_types() -> Iterable[LossType]:  # type: ignore[empty-body]
    """Return the preference losses that this plugin adds.

    Each is accepted as ``dpo_cpo_loss_type``; its options become YAML keys and command-line flags. The function
    receives the log-probs of the answers as float32 arrays of shape [B] (sums over the answer's tokens, or means
    where ``length_normalised`` is true) and returns one loss a pair. Two plugins that return the same name are an
    error that names both.

    Example::

        import mlx.core as mx
        from mlx_cpo_plugin import LossType, Option, hookimpl

        def rank(chosen_logps, rejected_logps, rank_margin):
            return mx.maximum(rank_margin - (chosen_logps - rejected_logps), 0)

        @hookimpl
        def register_loss_types():
            margin = Option("rank_margin", float, 0.0, "Margin between the answers' log-probs.", minimum=0)
            return [
                LossType(
                    name="rank",
                    title="RRHF ranking",
                    fn=rank,
                    formula="max(0, rank_margin - logits)",
                    source="Yuan et al. 2023, arXiv 2304.05302, eq. 2",
                    options=(margin,),
                    length_normalised=True,
                )
            ]
    """
