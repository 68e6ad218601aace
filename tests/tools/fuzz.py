"""Feed hostile configurations or rows to the readers: whatever they get, they take it or refuse it in one sentence.

    python tests/tools/fuzz.py config --inputs 100000 --seed 0
    python tests/tools/fuzz.py rows --replay build/fuzz-failures/rows-0-17.json

Prints what became of the inputs, and writes each one that was answered otherwise (by another exception, by more than
one line, by nothing within the time limit) into a file that ``--replay`` runs again. Exit code 1 where there was one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))  # where tests/support is


import hostile_configs
import hostile_rows

from mlx_cpo_plugin.errors import UserError

TARGETS: dict[str, ModuleType] = {"config": hostile_configs, "rows": hostile_rows}
LONGEST_SENTENCE = 1500


class HangError(BaseException):
    """An input took longer than it may; no ``except Exception`` catches it."""


@dataclass
class Tally:
    """What became of the inputs.

    Attributes:
        outcomes: ``accepted``, or the kind of error -> how many.
        sentences: error without its values -> how many.
        failures: number of the input and its traceback.
        slowest: seconds, seconds of the processor, and number of the input that took longest.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    sentences: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)
    slowest: tuple[float, float, int] = (0.0, 0.0, -1)


def case_of(target: str, seed: int, number: int) -> dict[str, Any]:
    """The input with this ``number``, which depends on nothing but the arguments."""
    made: dict[str, Any] = TARGETS[target].make(Random(f"{target} {seed} {number}"))
    return made


def examine(target: str, case: dict[str, Any], folder: Path, limit: float) -> str | UserError:
    """Return what became of an input, or raise what should not have come of it."""
    with time_limit(limit), contextlib.redirect_stdout(io.StringIO()):
        try:
            TARGETS[target].run(case, folder)
        except UserError as error:
            check_sentence(str(error))
            return error
        except SystemExit as request:
            if request.code != 0:  # only --help ends the command
                raise
    return "accepted"


def check_sentence(text: str) -> None:
    """Fail unless ``text`` is one printable line of a readable length that ends as a sentence does."""
    assert text.isprintable(), f"not one printable line: {text!r}"
    assert text.endswith((".", "?")), f"not a sentence: {text!r}"
    assert 10 < len(text) <= LONGEST_SENTENCE, f"{len(text)} characters: {text!r}"
    assert " object at 0x" not in text, f"shows an object: {text!r}"


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise HangError once the block has taken ``seconds``; a pause of the whole process counts as half of them."""
    halves = count(1)

    def stop(*_: object) -> None:
        if next(halves) == 2:
            raise HangError(f"no answer within {seconds:g} seconds")
        signal.setitimer(signal.ITIMER_REAL, seconds / 2)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds / 2)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def empty_folder() -> Iterator[Path]:
    """A new folder, which is the current one meanwhile: relative paths and canaries end there."""
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        yield Path(name).resolve()


def fuzz(
    target: str, numbers: range, seed: int, limit: float, on_failure: Callable[[int, dict[str, Any], str], None]
) -> Tally:
    """Examine the inputs with these ``numbers``; each failure is handed to ``on_failure``, too."""
    tally = Tally()
    with empty_folder() as folder:
        for number in numbers:
            case = case_of(target, seed, number)
            start = time.perf_counter(), time.process_time()
            try:
                outcome = examine(target, case, folder, limit)
            except KeyboardInterrupt:
                raise
            except BaseException:
                tally.failures.append((number, traceback.format_exc()))
                tally.outcomes["failed"] += 1
                on_failure(number, case, traceback.format_exc())
                continue
            finally:
                taken = time.perf_counter() - start[0], time.process_time() - start[1]
                tally.slowest = max(tally.slowest, (*taken, number))
            if isinstance(outcome, UserError):
                tally.outcomes[type(outcome).__name__] += 1
                tally.sentences[without_values(str(outcome))] += 1
            else:
                tally.outcomes[outcome] += 1
    return tally


def without_values(sentence: str) -> str:
    """A sentence without what differs from input to input, so that like ones can be counted."""
    bare = re.sub(r"\S*/\S+", "PATH", sentence)
    bare = re.sub(r"'[^']*'|\"[^\"]*\"|[\[{(].*[\]})]", "…", bare)
    bare = re.sub(r"[-+]?\d[\d.e+-]*", "N", bare)
    return re.sub(r"^(Unknown \w+) \S+", r"\1 …", bare)[:100]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=10.0, help="seconds that an input may take")
    parser.add_argument(
        "--failures", type=Path, default=Path("build/fuzz-failures"), help="folder for inputs that failed"
    )
    parser.add_argument("--replay", type=Path, help="run one written input again, and show what comes of it")
    arguments = parser.parse_args()
    if arguments.replay:
        case = json.loads(arguments.replay.read_text(encoding="utf-8"))["case"]
        with empty_folder() as folder:
            print(examine(arguments.target, case, folder, arguments.limit))
        return 0

    target, seed, failures = arguments.target, arguments.seed, arguments.failures.absolute()

    def write(number: int, case: dict[str, Any], trace: str) -> None:
        failures.mkdir(parents=True, exist_ok=True)
        file = failures / f"{target}-{seed}-{number}.json"
        file.write_text(json.dumps({"case": case, "traceback": trace.splitlines()}, indent=1), encoding="utf-8")
        print(f"FAILED: input {number}, written to {file}: {trace.splitlines()[-1][:200]!r}", file=sys.stderr)

    start = time.perf_counter()
    numbers = range(arguments.first, arguments.first + arguments.inputs)
    tally = fuzz(target, numbers, seed, arguments.limit, write)
    print(f"{len(numbers)} inputs of seed {seed} in {time.perf_counter() - start:.0f} s:")
    print("\n".join(f"  {count:>7} {outcome}" for outcome, count in tally.outcomes.most_common()))
    seconds, computing, slowest = tally.slowest
    print(f"  {seconds:.2f} s took the slowest, input {slowest}, and {computing:.2f} s of the processor")
    print(f"The commonest of {len(tally.sentences)} kinds of refusal:")
    print("\n".join(f"  {count:>7} {sentence}" for sentence, count in tally.sentences.most_common(25)))
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
