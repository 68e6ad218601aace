"""Convert raw rows to pairs, many of them in worker processes; what a worker cannot do is done in this process."""

from __future__ import annotations

import pickle
import re
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple, TextIO

from mlx_cpo_plugin.blas import usable_cores
from mlx_cpo_plugin.console import is_live
from mlx_cpo_plugin.data.columns import Columns
from mlx_cpo_plugin.data.messages import UnusableRow
from mlx_cpo_plugin.data.pair_cache import PairCache
from mlx_cpo_plugin.data.rows import THOUGHTS, Conversation, PlainText, parse_row, thoughts_in
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer
from mlx_cpo_plugin.data.tokens import TruncatedPair, fit

if TYPE_CHECKING:
    from tqdm import tqdm

ROWS_FOR_A_WORKER = 2_500
"""With fewer rows, a worker takes longer to start than to convert them."""
MOST_WORKERS = 8
"""Each holds a tokenizer of its own."""
ROWS_AT_A_TIME = 100
BAR_AFTER, LINE_EVERY = 2.0, 20.0
"""Seconds before a progress bar appears on a terminal, and between the lines that take its place elsewhere."""
_MOST_FAILURES = 3
# Thoughts in a text, up to what ends them: of "</think>" templates may keep only what follows.
_THOUGHTS_IN_TEXT = re.compile(r"(.*)</\w+>", re.DOTALL)

# Not multiprocessing's own start, which runs the main module again: the host's, or a script without a guard.
_START = (
    "import sys; from multiprocessing.connection import Connection; parent = Connection(int(sys.argv[1])); "
    "sys.path[:] = parent.recv(); from mlx_cpo_plugin.data.conversion import serve; serve(parent)"
)

Outcome = TruncatedPair | UnusableRow


class SourcedRow(NamedTuple):
    """A raw row, the columns to read in it, and where it comes from."""

    value: object
    columns: Columns
    source: str


@dataclass(frozen=True)
class RowConverter:
    """Converts rows with one tokenizer and one limit of tokens a side."""

    tokenizer: ChatTokenizer
    max_seq_length: int
    overlong: str

    def outcomes(self, rows: Sequence[SourcedRow]) -> list[Outcome]:
        """The pair of each row, or why it has none; DataError as :func:`~.tokens.fit` raises it."""
        return [self._outcome(*row) for row in rows]

    def _outcome(self, value: object, columns: Columns, source: str) -> Outcome:
        try:
            row = parse_row(value, columns)
            fitted = fit(row, self.tokenizer, source, self.max_seq_length, self.overlong)
            return fitted._replace(
                control_text=self._control_text(row),
                unwritten=self._unwritten(row, fitted),
                is_plain=isinstance(row, PlainText),
            )
        except UnusableRow as error:
            return type(error)(*error.args)  # without the frames and causes that the raised one holds
        except RecursionError:
            return UnusableRow("the row is nested too deeply")

    def _control_text(self, row: Conversation | PlainText) -> str:
        """What messages spell out although the template writes it; plain text has no template."""
        messages = [*row.chosen, *row.rejected[row.shared :]] if isinstance(row, Conversation) else []
        found = (
            self.tokenizer.control_text(
                # An end token spelled out at the end of an answer is taken for the template's.
                self.tokenizer.without_end(message["content"])[0]
                if message["role"] == "assistant"
                else message["content"]
            )
            for message in messages
        )
        return next(filter(None, found), "")

    def _unwritten(self, row: Conversation | PlainText, fitted: TruncatedPair) -> tuple[str, ...]:
        """What a row holds that the template has no place for: tools, and thoughts in an answer, by their key."""
        if not isinstance(row, Conversation):
            return ()
        answers = [*row.chosen[row.shared :], *row.rejected[row.shared :]]
        said = (key for key in THOUGHTS if any(key in thoughts_in(answer) for answer in answers))
        held = {key: f"{key} in an answer" for key in said}
        held |= {"tools": "tools"} if row.tools else {}
        unwritten = tuple(what for key, what in held.items() if not self.tokenizer.may_write(key))
        return unwritten + ("thoughts in an answer",) * self._drops_thoughts(row, fitted)

    def _drops_thoughts(self, row: Conversation, fitted: TruncatedPair) -> bool:
        """Whether of an answer's text only what stands behind its thoughts is among the tokens."""
        if fitted.answer_cut:
            return False
        pair = fitted.pair
        for messages, ids in ((row.chosen, pair.chosen), (row.rejected, pair.rejected)):
            found = _THOUGHTS_IN_TEXT.match(messages[-1]["content"])
            if found and _squeezed(found[1]) not in _squeezed(self.tokenizer.decode([*pair.prompt, *ids])):
                return True
        return False

    def identity(self) -> str | None:
        """All that a row's outcome depends on beside the row; None where that cannot be told."""
        tokenizer = self.tokenizer.identity()
        return None if tokenizer is None else repr((tokenizer, self.max_seq_length, self.overlong))

    def pickled(self) -> bytes | None:
        """What a worker needs; None where the tokenizer or its template is tied to this process."""
        tokenizer = self.tokenizer.portable()
        return None if tokenizer is None else _pickled(RowConverter(tokenizer, self.max_seq_length, self.overlong))


def workers_for(rows: int) -> int:
    """How many processes convert so many rows; 1 is this one."""
    return max(1, min(rows // ROWS_FOR_A_WORKER, usable_cores(), MOST_WORKERS))


def convert_rows(rows: Sequence[SourcedRow], converter: RowConverter) -> list[Outcome]:
    """The outcome of each row, in order, however many processes take part, or as a run before has left it.

    Raises:
        DataError: a row is too long and ``overlong`` is ``error``.
    """
    cache = PairCache(rows, converter.identity)
    if (kept := cache.read()) is not None:
        return kept
    outcomes: list[Outcome] = []
    with Progress(len(rows)) as progress:
        for some in _converted(rows, converter):
            outcomes += some
            progress.done(len(outcomes))
    cache.write(outcomes)
    return outcomes


def _converted(rows: Sequence[SourcedRow], converter: RowConverter) -> Iterator[list[Outcome]]:
    """The outcomes of a few rows after the other, in order."""
    tasks = [rows[start : start + ROWS_AT_A_TIME] for start in range(0, len(rows), ROWS_AT_A_TIME)]
    workers = workers_for(len(rows))
    pickled = converter.pickled() if workers > 1 else None
    if pickled is not None:
        with _Workers(pickled, workers) as pool:
            replies = pool.map(tasks)
            # Made here while the workers start: an example with which theirs is compared.
            yield (outcomes := converter.outcomes(tasks.pop(0)))
            example = next(replies)
            if example is None or _described(example) == _described(outcomes):
                for reply in replies:
                    task = tasks.pop(0)
                    yield converter.outcomes(task) if reply is None else reply
    yield from map(converter.outcomes, tasks)


class Progress:
    """Shows how many rows are converted, where that takes long: as a bar on a terminal, elsewhere line by line.

    Args:
        stream: standard error by default.
        clock: returns seconds.
    """

    def __init__(self, rows: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.rows, self.clock = rows, clock
        self.stream = sys.stderr if stream is None else stream
        self.bar: tqdm | None = None
        self.due = clock() + (BAR_AFTER if is_live(self.stream) else LINE_EVERY)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def done(self, rows: int) -> None:
        """Show that so many rows are done, if it is time to."""
        if self.bar is not None:
            self.bar.update(rows - self.bar.n)
        elif self.clock() >= self.due and rows < self.rows:
            self.due = self.clock() + LINE_EVERY
            if is_live(self.stream):
                from tqdm import tqdm

                self.bar = tqdm(
                    total=self.rows, initial=rows, desc="Tokenising", unit=" rows", leave=False, file=self.stream
                )
            else:
                print(f"Tokenising: {rows} of {self.rows} rows are done.", file=self.stream, flush=True)


class _Workers:
    """Worker processes, each spoken to by a thread of this one."""

    def __init__(self, converter: bytes, count: int) -> None:
        self._converter = converter
        self._threads = ThreadPoolExecutor(count)
        self._lock = Lock()
        self._all: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._failures = 0
        self._closed = False

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            for worker in self._all:
                worker.process.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._all:
            worker.process.wait()
            worker.connection.close()

    def map(self, tasks: Sequence[Sequence[SourcedRow]]) -> Iterator[list[Outcome] | None]:
        """The outcomes of each task, in order; None for those to be done in this process."""
        return self._threads.map(self._outcomes, tasks)

    def _outcomes(self, rows: Sequence[SourcedRow]) -> list[Outcome] | None:
        request = _pickled(rows)
        if request is None:
            return None
        try:
            with self._lock:
                if self._closed or self._failures >= _MOST_FAILURES:
                    return None
                worker = self._idle.pop() if self._idle else None
                if worker is None:
                    self._all.append(started := _Worker())
            if worker is None:
                worker = started
                worker.connection.send(sys.path)
                worker.connection.send_bytes(self._converter)
            worker.connection.send_bytes(request)
            reply = worker.connection.recv_bytes()
        except (OSError, EOFError):  # it cannot be started, or has died
            with self._lock:
                self._failures += 1
            return None
        with self._lock:
            self._idle.append(worker)
        outcomes: list[Outcome] | None = pickle.loads(reply)
        return outcomes


class _Worker:
    """A process that converts rows, and the connection to it."""

    def __init__(self) -> None:
        self.connection, its_end = Pipe()
        with its_end:
            number = its_end.fileno()
            self.process = subprocess.Popen(
                [sys.executable or "", "-P", "-c", _START, str(number)],
                pass_fds=[number],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )


def serve(parent: Connection) -> None:
    """Convert the rows that ``parent`` sends until it closes the connection, or ends; what fails is left to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes, and the parent decides
    try:
        converter: RowConverter = pickle.loads(parent.recv_bytes())
        while True:
            request = parent.recv_bytes()
            try:
                reply = pickle.dumps(converter.outcomes(pickle.loads(request)))
            except Exception:
                reply = pickle.dumps(None)
            parent.send_bytes(reply)
    except (EOFError, OSError):
        return


def _squeezed(text: str) -> str:
    """A text without white space, which templates change, in the form of Unicode that tokenizers prefer."""
    return "".join(unicodedata.normalize("NFC", text).split())


def _pickled(value: object) -> bytes | None:
    try:
        return pickle.dumps(value)
    except Exception:  # classes of a script, lambdas, deep nesting: objects may raise anything
        return None


def _described(outcomes: Sequence[Outcome]) -> list[object]:
    """Everything in ``outcomes``, comparable."""
    return [
        (str(outcome), type(outcome))
        if isinstance(outcome, UnusableRow)
        else (
            outcome[1:],
            *(getattr(outcome.pair, name).tobytes() for name in ("prompt", "chosen", "rejected")),
            *(getattr(outcome.pair, f"{name}_scored").tobytes() for name in ("chosen", "rejected")),
        )
        for outcome in outcomes
    ]
