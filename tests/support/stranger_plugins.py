"""Plugins as other distributions would bring them, for tests to register for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mlx_cpo_plugin import plugins
from mlx_cpo_plugin.hookspecs import hookimpl
from mlx_cpo_plugin.types import LossType, Option, TrainMode


class RankPlugin:
    """A loss with an option of its own, and with its own default and range for one that others have."""

    @hookimpl
    def register_loss_types(self) -> list[LossType]:
        beta = Option("beta", float, 2.0, "Temperature.", above=0, maximum=10)
        margin = Option("rank_margin", float, 0.5, "Margin of the ranking.", minimum=0)
        return [LossType("rank", "Ranking", lambda chosen, rejected: chosen, "", options=(beta, margin))]


class PlainPlugin:
    """A loss without options."""

    @hookimpl
    def register_loss_types(self) -> list[LossType]:
        return [LossType("plain", "Plain", lambda chosen, rejected: rejected - chosen, "")]


class JudgedPlugin:
    """A mode that has no losses, and whose name mlx-lm-lora does not know."""

    @hookimpl
    def register_train_modes(self) -> list[TrainMode]:
        temper = Option("temper", float, 1.0, "How strict the judge is, 1 being 100 %.", above=0)
        return [_mode("judged", temper)]


class CompetingPlugin:
    """Claims the name of the built-in mode."""

    @hookimpl
    def register_train_modes(self) -> list[TrainMode]:
        return [_mode("cpo")]


@contextmanager
def registered(plugin: object) -> Iterator[None]:
    """Register a plugin until the block ends."""
    manager = plugins.get_plugin_manager()
    manager.register(plugin, name=type(plugin).__name__)
    try:
        yield
    finally:
        manager.unregister(plugin)


def _mode(name: str, *options: Option) -> TrainMode:
    return TrainMode(name, name, "", lambda *_: ((), (), ()), lambda *_: None, lambda *_: {}, options=options)
