"""What ``run.json`` holds is read back as it was written, and short where ranks exchange it."""

from __future__ import annotations

import json
from pathlib import Path

from mlx_cpo_plugin import exchange
from mlx_cpo_plugin.checkpoints import RECORD
from mlx_cpo_plugin.checkpoints.run_identity import Origin, RunIdentity, RunRecord, read_record

LONG = {"key": "value" * 1000}
FULL = RunRecord(
    run=RunIdentity.new(),
    origin=Origin("older", 7, "/runs/older/checkpoints/0000007"),
    done={"trained": "", "pushed": "account/polite"},
    files=("README.md", "f" * 5000),
    successor=RunRecord(RunIdentity.new()),
    data=LONG,
    template_arguments=LONG,
)


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(json.dumps(FULL.plain()))

    assert read_record(tmp_path) == FULL


def test_what_ranks_exchange_of_a_record_has_room_in_an_exchange() -> None:
    short = FULL.in_short()

    assert len(json.dumps(short.plain())) < exchange._BYTES / 4
    assert (short.run, short.origin, short.done) == (FULL.run, FULL.origin, FULL.done)
