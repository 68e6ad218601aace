"""The arguments of ``mlx-cpo export``, and which target writes what."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from mlx_cpo_plugin._version import __version__
from mlx_cpo_plugin.termination import stopped_by_termination

TARGETS = {
    "mlx": "a fused model for mlx_lm",
    "peft": "an adapter for PyTorch",
    "gguf": "a fused model for llama.cpp and LM Studio",
    "ollama": "the same with a Modelfile",
}
BITS = {"mlx": (2, 3, 4, 5, 6, 8, 16), "gguf": (8, 16), "ollama": (8, 16)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("adapter_path", type=Path, metavar="ADAPTER_PATH", help="folder of a run, or its best/")
    described = "; ".join(f"{name}: {what}" for name, what in TARGETS.items())
    parser.add_argument("--to", required=True, choices=TARGETS, help=described)
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where it goes (default: ADAPTER_PATH-TARGET, beside the adapter)"
    )
    parser.add_argument("--force", action="store_true", help="replace an export that is there")
    parser.add_argument(
        "--bits",
        type=int,
        metavar="N",
        help="bits of the weights: 16 for none; mlx takes 2 to 8, too (default: the run's fuse_bits or those of the "
        "base), gguf and ollama 8, which is q8_0 (default: 16)",
    )
    parser.add_argument("--model", metavar="MODEL", help="base model in place of the one that the run names")
    parser.add_argument(
        "--base-model",
        metavar="NAME",
        help="the base model's name on the hub, for the model card and for peft, which loads the adapter onto it "
        "(default: the run's)",
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="rows to score the export on in place of the run's: a file, a folder or a hub name",
    )


def run_export(chosen: argparse.Namespace) -> int:
    """Write the export, score it, and say where it is; progress goes to standard error.

    Raises:
        UserError: the arguments, the adapter, the model or the data are at fault, or the target cannot hold it.
    """
    from mlx_cpo_plugin.export.errors import ExportError
    from mlx_cpo_plugin.export.folder import check_target, whole_or_nothing
    from mlx_cpo_plugin.export.fused_model import write_fused_model
    from mlx_cpo_plugin.export.gguf_file import TYPES, require_gguf, write_gguf
    from mlx_cpo_plugin.export.ollama import write_ollama
    from mlx_cpo_plugin.export.peft_adapter import write_peft_adapter
    from mlx_cpo_plugin.export.trained import Trained
    from mlx_cpo_plugin.publish.card import model_card, write_card
    from mlx_cpo_plugin.publish.usage import SHELL, usage

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    to, bits = chosen.to, chosen.bits
    allowed = BITS.get(to, ())
    if bits is not None and bits not in allowed:
        takes = f"takes {', '.join(map(str, allowed))}" if allowed else "takes no --bits"
        raise ExportError(f"--bits {bits}: --to {to} {takes}.", key="bits", allowed=", ".join(map(str, allowed)))
    if to in ("gguf", "ollama"):
        require_gguf()
    target = chosen.output or default_target(chosen.adapter_path, to)
    check_target(target, chosen.force)
    trained = Trained.load(chosen.adapter_path, chosen.model, chosen.data, say)
    planned = trained.settings.qat_bits if trained.settings.qat_enable else None
    if bits is None and planned in allowed and planned != trained.settings.fuse_bits:
        say(f"It was trained to be deployed with {planned} bits: --bits {planned} gives it these.")
    record = {
        "target": to,
        "adapter_path": str(chosen.adapter_path),
        "run": trained.run,
        "model": trained.settings.model,
        "bits": bits,
        "version": __version__,
    }
    with stopped_by_termination(), whole_or_nothing(target, record) as folder:
        if to == "mlx":
            notes = write_fused_model(trained, folder, bits or trained.settings.fuse_bits, say)
        elif to == "peft":
            notes = write_peft_adapter(trained, folder, chosen.base_model, say)
        elif to == "ollama":
            notes = write_ollama(trained, folder, bits or 16, say)
        else:
            notes = write_gguf(trained, folder / f"model-{TYPES[bits or 16]}.gguf", bits or 16, say)
        card = model_card(chosen.adapter_path, to, notes=notes, base_model=chosen.base_model, here=target.name)
        write_card(card, folder, replacing=target)
    language, lines = usage(to, str(target), arguments=trained.template_arguments)
    use = f"Try it: {' && '.join(lines)}" if language == SHELL else f"In Python: {'; '.join(lines)}"
    print(f"Wrote {target}. {use}")
    return 0


def default_target(adapter_path: Path, to: str) -> Path:
    """Return the folder beside an adapter for an export of it."""
    path = Path(os.path.abspath(adapter_path))  # .. has no name of its own
    return path.with_name(f"{path.name}-{to}")
