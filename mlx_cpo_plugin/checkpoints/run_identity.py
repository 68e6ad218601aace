"""Which run is which: an identity made when a run begins anew, and ``run.json``, which says whose a folder's files are.

A run is told from others by its identity alone, never by an iteration, a file name or a size.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from mlx_cpo_plugin.checkpoints import BEST, CHECKPOINTS, METRICS_FILE, RECORD, RUN_SETTINGS
from mlx_cpo_plugin.types import Values

TRAINED, TESTED, FUSED, PUSHED = "trained", "tested", "fused", "pushed"
# Names of files and folders.
LEFT_BY_EVERY_RUN = re.compile(
    rf"{CHECKPOINTS}(-rank-\d+)?|{BEST}(-[a-z]+-\d+)?|(best_adapters.*|(\d{{7,}}_)?adapters)\.safetensors"
    rf"|{re.escape(METRICS_FILE)}|{re.escape(RUN_SETTINGS)}"
)


@dataclass(frozen=True)
class RunIdentity:
    """A run.

    Attributes:
        id: readable and unique, the same on all ranks, e.g. ``20261126T140301Z-5f0c1a9e``.
        begun: when it began, in UTC, to the second; of a run that started from a checkpoint of another one, when that
            began, so that a template that prints the date renders the same rows to the same tokens.
    """

    id: str
    begun: datetime

    @classmethod
    def new(cls, begun: datetime | None = None) -> RunIdentity:
        """Return the identity of a run that begins now; ``begun`` is that of the run that it starts from, if any."""
        now = datetime.now(UTC).replace(microsecond=0)
        return cls(f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}", begun or now)

    @classmethod
    def from_plain(cls, values: Values) -> RunIdentity:
        """Return the identity that :meth:`plain` returned.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        return cls(values["id"], datetime.fromisoformat(values["begun"]))

    def plain(self) -> dict[str, str]:
        """Return it as plain values."""
        return {"id": self.id, "begun": self.begun.isoformat()}


@dataclass(frozen=True)
class Origin:
    """The checkpoint of another run that a run started from.

    Attributes:
        run_id, iteration: the run that wrote it, and after which iteration.
        checkpoint: its folder, that of the first rank.
    """

    run_id: str
    iteration: int
    checkpoint: str


@dataclass(frozen=True)
class RunRecord:
    """What ``run.json`` in an adapter folder says of the run whose files lie there.

    Attributes:
        origin: ``None`` where the run began with a fresh adapter.
        done: which parts of it are complete, ``trained``, ``tested``, ``fused``, ``pushed``, and as what: a fused model
            by its bits and its place, a push by its repository, else empty.
        files: names in the folder, beside those of every run: its fused model's, and its card's.
        successor: the record of a new run that is about to begin here, while files are being put aside for it.
        data: split -> ``rows``, ``pairs`` and ``sha256`` of what it trained, validated or was tested on.
        template_arguments: of the chat template, as its prompts were rendered with.
    """

    run: RunIdentity
    origin: Origin | None = None
    done: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    successor: RunRecord | None = None
    data: Values = field(default_factory=dict)
    template_arguments: Values = field(default_factory=dict)

    @classmethod
    def from_plain(cls, values: Values) -> RunRecord:
        """Return the record that :meth:`plain` returned; raise as :meth:`RunIdentity.from_plain` does."""
        origin, successor = values["origin"], values["successor"]
        return cls(
            RunIdentity.from_plain(values),
            origin and Origin(**origin),
            dict(values["done"] if isinstance(values["done"], dict) else dict.fromkeys(values["done"], "")),
            tuple(values["files"]),
            successor and cls.from_plain(successor),
            dict(values.get("data", {})),
            dict(values.get("template_arguments", {})),
        )

    def has_written(self, metadata: Mapping[str, str]) -> bool:
        """Whether an adapter that says this of itself is this run's, and not what another program left in its place."""
        return "iteration" in metadata and metadata.get("run", self.run.id) == self.run.id

    def with_files(self, names: Collection[str]) -> RunRecord:
        """Return it with files of these names among the run's."""
        return replace(self, files=tuple(sorted({*self.files, *names})))

    def in_short(self) -> RunRecord:
        """Return it without what may be long, so that ranks can exchange it."""
        return replace(self, files=(), data={}, template_arguments={})

    def plain(self) -> Values:
        """Return it as plain values."""
        return {
            **self.run.plain(),
            "origin": self.origin and vars(self.origin),
            "done": dict(self.done),
            "files": self.files,
            "successor": self.successor and self.successor.plain(),
            "data": self.data,
            "template_arguments": self.template_arguments,
        }


def read_record(folder: Path) -> RunRecord | None:
    """Return what ``run.json`` in an adapter folder says; ``None`` where there is none that can be read."""
    try:
        return RunRecord.from_plain(json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def run_in(folder: Path) -> RunIdentity | None:
    """Return the run whose files lie in an adapter folder; ``None`` where there are none.

    Without ``run.json``, as in a folder of mlx-lm-lora, it is derived from the time at which the oldest file was
    written.
    """
    record = read_record(folder)
    if record is not None:
        return record.run
    times = []
    for name in os.listdir(folder) if folder.is_dir() else ():
        if LEFT_BY_EVERY_RUN.fullmatch(name):
            with suppress(OSError):
                times.append((folder / name).lstat().st_mtime)
    if not times:
        return None
    begun = datetime.fromtimestamp(int(min(times)), UTC)
    return RunIdentity(f"{begun:%Y%m%dT%H%M%SZ}-undated", begun)
