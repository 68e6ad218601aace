"""Learning rates that span the whole run: by name, with a warm-up, however the length of the run is set."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support.refusals import refused

from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.run.building import build_optimizer
from mlx_cpo_plugin.settings import config
from mlx_cpo_plugin.settings.config import RunSettings

PEAK = 1e-2
Settings = dict[str, Any]


def rates(steps: int, **settings: Any) -> list[float]:
    """The learning rate of each step of a run."""
    optimizer = build_optimizer(RunSettings(learning_rate=PEAK, **settings), steps)
    schedule = optimizer._schedulers["learning_rate"]
    return [float(schedule(mx.array(step))) for step in range(steps)]


@pytest.mark.parametrize(
    ("name", "falls"),
    [
        ("linear", lambda share: 1 - share),
        ("cosine", lambda share: (1 + math.cos(math.pi * share)) / 2),
    ],
)
def test_a_schedule_by_name_falls_to_zero_over_the_run(name: str, falls: Callable[[float], float]) -> None:
    expected = [PEAK * falls(step / 40) for step in range(40)]

    assert rates(40, lr_schedule={"name": name}) == pytest.approx(expected, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("schedule", [None, {"name": "constant"}, {"name": "linear"}, {"name": "cosine"}])
def test_the_rate_rises_for_its_share_of_the_run(schedule: Settings | None) -> None:
    found = rates(40, lr_schedule=schedule, warmup_ratio=0.25)

    assert found[:11] == pytest.approx([PEAK * step / 10 for step in range(11)], rel=1e-5)
    rest = found[10:]
    assert rest == sorted(rest, reverse=True)
    constant = schedule is None or schedule["name"] == "constant"
    assert rest[-1] == pytest.approx(PEAK) if constant else 0 < rest[-1] < 0.06 * PEAK


def test_a_share_warms_up_a_schedule_of_mlx_too() -> None:
    found = rates(20, lr_schedule={"name": "step_decay", "arguments": [PEAK, 0.5, 4]}, warmup_ratio=0.2)

    assert found[:5] == pytest.approx([PEAK * step / 4 for step in range(5)], rel=1e-5)
    assert found[5:13] == pytest.approx([PEAK] * 4 + [PEAK / 2] * 4, rel=1e-5)


@pytest.mark.parametrize("size", [{"batch_size": 2}, {"batch_tokens": 200}])
@pytest.mark.parametrize("length", [{"epochs": 2}, {"iters": 7}])
def test_the_schedule_ends_with_the_run_by_epochs_and_by_iters(
    settings: Settings, run_main: Callable[..., None], size: Settings, length: Settings
) -> None:
    own = {key: value for key, value in settings.items() if key not in ("iters", "batch_size")}
    run_main({**own, **size, **length, "lr_schedule": "linear", "gradient_accumulation_steps": 2})

    lines = Path(settings["adapter_path"], "metrics.jsonl").read_text().splitlines()
    rates_of_reports = [record["learning_rate"] for record in map(json.loads, lines) if "learning_rate" in record]
    falling = list(dict.fromkeys(rates_of_reports))
    # The rate of a report is that of the last step taken; the first step has the full one, the last the least.
    steps = round(settings["learning_rate"] / falling[-1])
    assert falling == pytest.approx(
        [settings["learning_rate"] * (steps - step) / steps for step in range(steps)], rel=1e-4
    )


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_the_name_is_enough_in_a_file_and_on_the_command_line(tmp_path: Path, name: str) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(f"train_mode: cpo\ntrain: true\nlr_schedule: {name}\nwarmup_ratio: 0.1\n")

    in_file = config.resolve(["-c", str(file)]).settings
    in_call = config.resolve(["--train-mode=cpo", "--train", f"--lr-schedule={name}", "--warmup-ratio=0.1"]).settings

    assert in_file.lr_schedule == in_call.lr_schedule == {"name": name}
    assert in_file.warmup_ratio == in_call.warmup_ratio == 0.1


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ("lr_schedule: cosin", "lr_schedule.name"),
        ("lr_schedule: {name: cosine, arguments: [1e-5, 10]}", "lr_schedule.arguments"),
        ("warmup_ratio: 1", "warmup_ratio"),
        ("lr_schedule: {name: cosine, warmup: 3}\nwarmup_ratio: 0.1", "warmup_ratio"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, content: str, key: str) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(f"train_mode: cpo\ntrain: true\n{content}\n")

    with refused(ConfigError, key=key):
        config.resolve(["-c", str(file)])


@pytest.mark.parametrize(
    ("schedule", "raised"),
    [
        ({"lr_schedule": "cosine"}, False),
        ({"warmup_ratio": 0.5}, False),
        ({"lr_schedule": "constant"}, True),
        ({"lr_schedule": {"name": "cosine_decay", "arguments": [1e-3, 100]}}, True),
    ],
)
def test_a_finished_run_is_told_to_raise_iters_only_where_that_is_then_accepted(
    settings: Settings,
    run_main: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    schedule: Settings,
    raised: bool,
) -> None:
    run_main({**settings, **schedule})
    capsys.readouterr()
    run_main({**settings, **schedule, "resume": "auto"})
    assert ("raise iters to go on" in capsys.readouterr().out) == raised

    longer = {**settings, **schedule, "resume": "auto", "iters": 4}
    if raised:
        run_main(longer)
    else:
        with pytest.raises(ConfigError, match=r"iters: 2 → 4 \(the learning rate depends on it\)"):
            run_main(longer)
