"""Greedy answers to a few prompts while a run trains: what figures alone do not show."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step

from mlx_cpo_plugin.data import PreferenceDataset
from mlx_cpo_plugin.data.sample_prompts import SamplePrompt, held_out_prompts, own_prompts
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer
from mlx_cpo_plugin.errors import first_line, is_device_fault, is_out_of_memory
from mlx_cpo_plugin.exchange import is_first_rank
from mlx_cpo_plugin.model.logps import evaluation_mode
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.state import Resumable, random_seed
from mlx_cpo_plugin.types import Values

MOST_TOKENS = 64
# All samples together take at most this share of the run's time, or this many seconds if that is more.
SHARE, SECONDS = 0.05, 10.0
_PHRASE = 3


class Sample(NamedTuple):
    """An answer.

    Attributes:
        tokens: without the one that ends it.
        ended: whether the model ended it.
        in_time: whether time did not.
    """

    prompt: SamplePrompt
    answer: str
    tokens: list[int]
    ended: bool
    in_time: bool

    def repetition(self) -> float:
        """Return that of its tokens, see :func:`repetition`."""
        return repetition(self.tokens)


class Samples(Resumable):
    """Asks the model, on the first rank only, and says nothing of what cannot be asked.

    Attributes:
        prompts: none where there are none, or nobody knows the tokenizer.
        before: figures of the answers before training, by name; None where there are none.
        latest: the iteration of the last complete answers, and their figures.
        answered: whether these were given since training began.
    """

    remembered: ClassVar[tuple[str, ...]] = ("digest", "before", "latest", "answered")

    def __init__(
        self,
        model: nn.Module,
        args: CPOTrainingArgs,
        val_pairs: PreferenceDataset,
        tokenizer: ChatTokenizer | None,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self.model, self.every, self.say, self.warn = model, args.steps_per_sample, say, warn
        self.prompts: Sequence[SamplePrompt] = ()
        if tokenizer is not None and self.every != 0 and is_first_rank():
            own = args.sample_prompts
            self.prompts = (
                own_prompts(own, tokenizer, args.max_seq_length) if own else held_out_prompts(val_pairs, tokenizer)
            )
            self.tokenizer = tokenizer
        self.digest = hashlib.sha256(repr([prompt.tokens for prompt in self.prompts]).encode()).hexdigest()[:16]
        self.before: dict[str, float] | None = None
        self.latest: tuple[int, dict[str, float]] = (0, {})
        self.answered = False
        self.began, self.spent = time.perf_counter(), 0.0
        self._told = False

    def are_due(self, iteration: int, validates: bool, last: bool) -> bool:
        """Whether to ask after an iteration: at validations, unless ``steps_per_sample`` says otherwise."""
        return validates if self.every is None else self.every > 0 and (last or iteration % self.every == 0)

    def take(self, iteration: int, before_training: bool = False) -> list[Sample]:
        """Return the answers to every prompt that there is time for; nothing that trains notices."""
        if not self.prompts:
            return []
        seed, started, samples = random_seed(), time.perf_counter(), []
        with evaluation_mode(self.model):
            for number, prompt in enumerate(self.prompts):
                allowed = SECONDS / 2 if before_training else max(SHARE * (time.perf_counter() - self.began), SECONDS)
                left = allowed - self.spent
                seconds = (left - (time.perf_counter() - started)) / (len(self.prompts) - number)
                try:
                    samples += [self._answer(prompt, seconds)] if seconds > 0 else []
                except Exception as error:  # models of all kinds fail in all ways
                    if is_device_fault(error) and not is_out_of_memory(error):
                        raise
                    self.warn(f"There are no samples: this model cannot generate ({first_line(error)}).")
                    self.prompts = ()
                    break
        self.spent += time.perf_counter() - started
        mx.random.seed(seed)
        if (
            self.prompts
            and not self._told
            and (len(samples) < len(self.prompts) or not all(s.in_time for s in samples))
        ):
            self._told = True
            self.say(
                f"Samples are fewer or shorter than they could be: they may take {SHARE:.0%} of the run's time, or "
                f"{SECONDS:.0f} seconds. Change steps_per_sample, or set it to 0 for none."
            )
        if found := figures([sample for sample in samples if sample.in_time]):
            self.latest, self.answered = (iteration, found), not before_training
            self.before = found if before_training else self.before
        return samples

    def _answer(self, prompt: SamplePrompt, seconds: float) -> Sample:
        until, tokens, ended = time.perf_counter() + seconds, [], False
        stream = mx.default_stream(mx.default_device())
        for token, _ in generate_step(mx.array(prompt.tokens), self.model, max_tokens=MOST_TOKENS, stream=stream):
            if ended := token in self.tokenizer.end_ids:
                break
            tokens.append(token)
            if time.perf_counter() > until:
                break
        answer = self.tokenizer.decode(tokens).strip()
        return Sample(prompt, answer, tokens, ended, in_time=ended or len(tokens) == MOST_TOKENS)

    def figures_of(self, iteration: int) -> dict[str, float]:
        """Return the figures of the answers at an iteration by name; none if there were no answers."""
        return self.latest[1] if self.latest[0] == iteration else {}

    def compared(self) -> dict[str, float]:
        """Return the figures of the newest answers since training began, and how they changed, by their report's names.

        What a verdict rests on does not depend on whether there was time for answers at just this iteration.
        """
        if not self.answered:
            return {}
        now, before = self.latest[1], self.before or {}
        changes = {f"val_{name}_change": now[name] - value for name, value in before.items()}
        return {f"val_{name}": value for name, value in now.items()} | changes

    def restore(self, state: Values) -> None:
        """Continue from ``state``; answers to other prompts are not compared."""
        if state["digest"] == self.digest:
            iteration, newest = state["latest"]
            self.before, self.latest = state["before"], (iteration, newest)
            self.answered = state.get("answered", newest != state["before"])  # older checkpoints do not say


def repetition(tokens: Sequence[object]) -> float:
    """Return the share of an answer's phrases of three tokens that it has had before."""
    phrases = [tuple(tokens[at : at + _PHRASE]) for at in range(len(tokens) - _PHRASE + 1)]
    return 1 - len(set(phrases)) / len(phrases) if phrases else 0.0


def figures(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the mean length of answers, in tokens, and their mean repetition, by name; nothing of no answers."""
    count = len(samples)
    if not count:
        return {}
    return {
        "sample_length": sum(len(sample.tokens) for sample in samples) / count,
        "sample_repetition": sum(sample.repetition() for sample in samples) / count,
    }
