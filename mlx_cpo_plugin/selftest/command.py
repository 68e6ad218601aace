"""``mlx-cpo doctor --selftest``: the checks as a table, or as JSON for a bug report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TextIO

from mlx_cpo_plugin.selftest.checks import Check, Outcome, all_checks
from mlx_cpo_plugin.selftest.user_model import checks_of_config

_COLUMNS = f"{'':8} {'check':<42} {'error':>8} {'allowed':>8} {'seconds':>8}  detail"


def run_selftest(config_file: str | None, stream: TextIO) -> list[Outcome]:
    """Run every check, and those of the model and rows that a configuration names, and print each as it ends.

    Raises:
        UserError: the configuration, its model or its rows are at fault.
    """
    checks: Sequence[Check] = all_checks()
    if config_file is not None:
        checks = [*checks, *checks_of_config(config_file)]
    print(f"\nSelf-test: relative errors, compared with float64 on the CPU\n{_COLUMNS}", file=stream)
    outcomes = []
    for check in checks:
        outcome = check.outcome()
        print(_row(outcome), file=stream, flush=True)
        outcomes.append(outcome)
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    seconds = sum(outcome.seconds for outcome in outcomes)
    verdict = f"{failed} of {len(outcomes)} checks failed" if failed else f"all {len(outcomes)} checks passed"
    print(f"{verdict}, in {seconds:.0f} s.", file=stream)
    return outcomes


def as_plain(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return the outcomes for JSON."""
    return [asdict(outcome) for outcome in outcomes]


def _row(outcome: Outcome) -> str:
    error, tolerance = (f"{x:.1e}" if x is not None else "-" for x in (outcome.error, outcome.tolerance))
    return f"{outcome.status:8} {outcome.name:<42} {error:>8} {tolerance:>8} {outcome.seconds:>8.1f}  {outcome.detail}"
