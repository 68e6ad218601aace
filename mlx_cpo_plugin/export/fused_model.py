"""``--to mlx``: the adapter merged into its model, in a folder that mlx_lm loads."""

from __future__ import annotations

from contextlib import redirect_stdout
from pathlib import Path

from mlx_lm.utils import load_config

from mlx_cpo_plugin.comparison.questions import Say
from mlx_cpo_plugin.export.trained import Trained
from mlx_cpo_plugin.run.fusing import Fusing
from mlx_cpo_plugin.settings.config import RunSettings


def write_fused_model(trained: Trained, folder: Path, bits: int | None, say: Say) -> list[str]:
    """Write the fused model into ``folder``, as a run with ``fuse`` does, load it back, score it and return notes.

    Args:
        bits: of its weights, 16 for none; by default those of a base that is quantised on disk, where they keep what
            was learned, else none.

    Raises:
        FuseError: it cannot be written or loaded back.
    """
    wanted = {"adapter_path": str(folder), "fuse_bits": bits, "lm_studio_name": None}
    settings = RunSettings.of({**vars(trained.settings), **wanted})
    fusing = Fusing(settings, trained.before, trained.rows, say, bits_option="--bits")
    with redirect_stdout(None):  # mlx_lm names files by where they are being written
        fusing.fuse(trained.model, trained.tokenizer)
    written = load_config(folder).get("quantization")
    return [f"Weights of {written['bits']} bits." if written else "Weights that are not quantised."]
