"""A judge says which of two answers is better; it sees each two in both orders, so that their order decides nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step

from mlx_cpo_plugin.comparison.contenders import load_model
from mlx_cpo_plugin.comparison.questions import Question, Say, is_told
from mlx_cpo_plugin.comparison.statistics import duel_figures
from mlx_cpo_plugin.comparison.text_metrics import Answer
from mlx_cpo_plugin.data.messages import UnusableRow
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer
from mlx_cpo_plugin.errors import UserError, named
from mlx_cpo_plugin.host import load_chat_tokenizer
from mlx_cpo_plugin.model.scoring import prepared_to_answer

FIRST, SECOND, TIE = 1.0, 0.0, 0.5
Judge = Callable[[str], float | None]
"""The judge's prompt -> :data:`FIRST`, :data:`SECOND` or :data:`TIE`; None where its words say neither."""

_QUESTION = """\
Two assistants answered the same request. Decide which answer serves the person who wrote it better: it should do what \
was asked, be correct, and be clear, without needless words. The order of the answers means nothing.

<request>
{request}
</request>

<answer_a>
{first}
</answer_a>

<answer_b>
{second}
</answer_b>

Which answer is better? Reply with the single letter A or B, or with T if they are equally good."""
_LETTERS = {"A": FIRST, "B": SECOND, "T": TIE}
# A judge that names no answer to the first prompts will not name any later on.
_PATIENCE = 5


def judged(
    judge: Judge,
    name: str,
    models: Sequence[str],
    questions: Sequence[Question],
    answers: Sequence[Sequence[Answer]],
    say: Say,
) -> dict[str, Any]:
    """Return what the JSON says of a judge: every model against the base model, then against the best of them.

    Args:
        name: of the judge.
        models: the names of the M models, the base model first.
        answers: of each model to each question.

    Raises:
        UserError: the judge fails, or no reply of it names an answer.
    """

    def duel(one: int, other: int) -> dict[str, Any]:
        points: list[float] = []
        unclear = 0
        for number, (question, first, second) in enumerate(
            zip(questions, answers[one], answers[other], strict=True), 1
        ):
            if is_told(number, len(questions)):
                say(f"The judge compares {models[one]} with {models[other]}, prompt {number} of {len(questions)}.")
            verdicts = both_orders(judge, question.text, first.text, second.text)
            unclear += verdicts.count(None)
            points.append(verdicts[0] if verdicts[0] is not None and verdicts[0] == verdicts[1] else TIE)
            if number == min(len(questions), _PATIENCE) and unclear == 2 * len(points):
                raise UserError(
                    f"The judge {named(name)} named no answer in {unclear} replies; give a larger model.", key="judge"
                )
        head = {"model": models[one], "against": models[other]}
        return head | duel_figures(points) | {"unclear": unclear, "points": points}

    against_base = [duel(place, 0) for place in range(1, len(models))]
    best = max(range(len(against_base)), key=lambda place: against_base[place]["win_rate"]) + 1
    if against_base[best - 1]["win_rate"] <= TIE:
        best = 0
    others = [duel(place, best) for place in range(1, len(models)) if best and place != best]
    return {
        "name": "judge",
        "judge": name,
        "of": "answers",
        "count": len(questions),
        "models": [],
        "best": models[best],
        "comparisons": against_base + others,
    }


def both_orders(judge: Judge, request: str, first: str, second: str) -> tuple[float | None, float | None]:
    """Return both verdicts on the first answer; equal answers tie unasked."""
    if first == second:
        return TIE, TIE
    shown_first = judge(prompt_of(request, first, second))
    shown_last = judge(prompt_of(request, second, first))
    return shown_first, None if shown_last is None else 1 - shown_last


def prompt_of(request: str, first: str, second: str) -> str:
    """Return what a judge is asked about two answers."""
    return _QUESTION.format(request=request, first=first, second=second)


def verdict_in(reply: str) -> float | None:
    """Return what a judge's reply says, after its thoughts: a letter alone or in front, or the only one it names."""
    said = reply.rpartition("</think>")[2].strip()
    alone = re.match(r"\W*(a|b|t|tie)\b(?![^\S\n]*\w)", said, re.IGNORECASE)
    letters = {alone[1]} if alone else set(re.findall(r"\b(?:[ABT]|(?i:tie))\b", said))
    verdicts = {_LETTERS[letter[0].upper()] for letter in letters}
    return verdicts.pop() if len(verdicts) == 1 else None


class LocalJudge:
    """A model of MLX: the answer whose letter is the likelier next token wins.

    Args:
        model: folder or hub name.
        say: receives a line where kernels are compiled for it.

    Raises:
        ConfigError: it cannot be loaded.
    """

    def __init__(self, model: str, say: Say) -> None:
        self._say, self._read = say, 0
        self.model = load_model(model, option="--judge")[0]
        self.model.eval()
        self.tokenizer = ChatTokenizer(load_chat_tokenizer(model))
        # A letter may have a space in front, as a token of its own.
        self.letters = [
            sorted({int(self.tokenizer.encode(text).ids[-1]) for text in (letter, f" {letter}")}) for letter in "AB"
        ]

    def __call__(self, prompt: str) -> float | None:
        """Compare log-probs, which a model always has, whatever it would write."""
        messages = [{"role": "user", "content": prompt}]
        variants = self.tokenizer.template_variants()
        try:
            tokens = self.tokenizer.encode(self.tokenizer.render(messages, None, True, variants[-1])).ids
        except UnusableRow as error:
            raise UserError(f"The judge cannot be asked ({error}); give another --judge.", key="judge") from error
        self._read += len(tokens)  # what has been asked says how much there is to do
        with prepared_to_answer(self.model, self._read, 1, self._say):
            _, logprobs = next(generate_step(mx.array(tokens), self.model, max_tokens=1))
        first, second = (float(mx.logsumexp(logprobs[mx.array(ids)].astype(mx.float32))) for ids in self.letters)
        return None if np.isnan(first - second) else TIE if first == second else FIRST if first > second else SECOND
