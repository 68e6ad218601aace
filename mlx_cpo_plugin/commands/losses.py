"""``mlx-cpo losses``: every registered loss, with its formula, source, options and presets."""

from __future__ import annotations

import argparse
import json

from mlx_cpo_plugin.plugins import loss_types
from mlx_cpo_plugin.settings.cpo_options import CPO_ALPHA, LOSS_OPTION, PRESETS
from mlx_cpo_plugin.types import LossType, Values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_losses(chosen: argparse.Namespace) -> int:
    """Print the losses."""
    rows = [_described(loss) for loss in loss_types().values()]
    if chosen.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        _print(row)
    print(f"With each of them: cpo_alpha, {CPO_ALPHA.allowed()}, default {CPO_ALPHA.default}")
    print(f"{'':10} + cpo_alpha * negative log-likelihood of the chosen answers, averaged over all their tokens")
    print(f"{'':10} Xu et al. 2024, arXiv 2401.08417, section 3")
    return 0


def _described(loss: LossType) -> Values:
    return {
        "name": loss.name,
        "title": loss.title,
        "formula": loss.formula,
        "source": loss.source,
        "length_normalised": loss.length_normalised,
        "options": [
            {"name": option.name, "default": option.default, "allowed": option.allowed(), "help": option.help}
            for option in loss.options
        ],
        "presets": [
            {"name": preset.name, "title": preset.title, "source": preset.source, "values": dict(preset.values)}
            for preset in PRESETS
            if preset.values[LOSS_OPTION] == loss.name
        ],
    }


def _print(row: Values) -> None:
    print(f"{row['name']:10} {row['title']}")
    print(f"{'':10} {row['formula']}")
    if row["source"]:
        print(f"{'':10} {row['source']}")
    for option in row["options"]:
        print(f"{'':10} {option['name']}: {option['allowed']}, default {option['default']}")
    for preset in row["presets"]:
        values = ", ".join(f"{name} {value}" for name, value in preset["values"].items() if value != row["name"])
        print(f"{'':10} preset: {preset['name']} sets {values}; {preset['source']}")
