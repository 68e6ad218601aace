"""What decides between answers besides figures of their text: reward functions and judges."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from mlx_cpo_plugin.comparison.endpoint import Endpoint
from mlx_cpo_plugin.comparison.judge import Judge, LocalJudge, judged, prompt_of
from mlx_cpo_plugin.comparison.measure import Comparison
from mlx_cpo_plugin.comparison.questions import Say
from mlx_cpo_plugin.comparison.rewards import load_reward, reward_figures
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.host import load_chat_tokenizer


class Deciders:
    """The reward functions and the judge that a call names; what can be wrong with them is found at once.

    Raises:
        UserError: a function, a model or an endpoint is missing, or refuses.
    """

    def __init__(self, chosen: argparse.Namespace) -> None:
        if chosen.judge and chosen.judge_url:
            raise ConfigError("--judge and --judge-url name two judges; give one of them.", key="judge")
        if bool(chosen.judge_url) != bool(chosen.judge_model):
            raise ConfigError("--judge-url and --judge-model belong together; give both.", key="judge_url")
        if chosen.judge_key and not chosen.judge_url:
            raise ConfigError("--judge-key is for an endpoint; give --judge-url, too.", key="judge_key")
        self.rewards = [(entry, load_reward(entry)) for entry in dict.fromkeys(chosen.reward)]
        self._judge: Callable[[Say], Judge] | None = None
        self.name = ""
        if chosen.judge:
            load_chat_tokenizer(chosen.judge, "--judge")
            self.name, self._judge = chosen.judge, lambda say: LocalJudge(chosen.judge, say)
        elif chosen.judge_url:
            endpoint = Endpoint(chosen.judge_url, chosen.judge_model, chosen.judge_key, chosen.judge_timeout)
            endpoint.reply(prompt_of("What is two and two?", "Four.", "Five."))
            self.name, self._judge = endpoint.name, lambda _: endpoint

    def entries(self, comparison: Comparison, say: Say) -> Iterator[dict[str, Any]]:
        """Yield what the JSON says of each; a local judge is loaded once the models are gone.

        Raises:
            UserError: a function fails, or the judge does.
        """
        for entry, reward in self.rewards:
            yield reward_figures(comparison, entry, reward)
        if self._judge is not None:
            judge = self._judge(say)
            yield judged(judge, self.name, comparison.names, comparison.questions, comparison.answers, say)
