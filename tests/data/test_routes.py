"""The same preferences give the same tokens and masks, whatever form and file their rows come in."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.data_tokenizers import CHATML, make_tokenizer
from support.row_forms import FORMS, ROUTES, WIDEST, Message, Preference, jsonl, metadata, preferences

from mlx_cpo_plugin.data import PreferencePair

# Examples of each test; each holds two rows in every form and by every route.
pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("MLX_CPO_ROW_EXAMPLES", "3"))
# Thoughts, calls and tools are all in the text, so that none of them can get lost.
TELLING = CHATML.replace("{{ m['content'] }}", "{{ m.reasoning_content or '' }}|{{ m['content'] }}")
TEMPLATES = {
    "telling": "{{ tools | tojson if tools else '' }}" + TELLING,
    "trimming": CHATML.replace("'] }}", "'] | trim }}"),
}
TOKENIZERS = {name: make_tokenizer(template) for name, template in TEMPLATES.items()}


def tokens(pair: PreferencePair) -> dict[str, list[int]]:
    return {
        name: getattr(pair, name).tolist()
        for name in ("prompt", "chosen", "rejected", "chosen_scored", "rejected_scored")
    }


def expected_pairs(given: list[Preference], folder: Path, tokenizer: Any) -> Sequence[PreferencePair]:
    plain = [row.row(prompt=row.before, chosen=row.chosen, rejected=row.rejected) for row in given]
    return jsonl(plain, folder, tokenizer)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(data=st.data(), template=st.sampled_from(sorted(TOKENIZERS)))
def test_every_form_by_every_route_gives_the_tokens_of_a_plain_row(form, data, template):
    given_rows = [WIDEST, *data.draw(st.lists(preferences(), min_size=1, max_size=3))]
    tokenizer = TOKENIZERS[template]

    def decorate(messages: list[Message]) -> list[Message]:
        return [{**data.draw(metadata()), **message} for message in messages]

    rows = [FORMS[form](row, decorate) for row in given_rows]
    with tempfile.TemporaryDirectory() as folder:
        expected = [tokens(pair) for pair in expected_pairs(given_rows, Path(folder), tokenizer)]
        for name, route in ROUTES.items():
            assert [tokens(pair) for pair in route(rows, Path(folder), tokenizer)] == expected, name
