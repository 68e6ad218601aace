"""The trained model as a whole: adapter merged, written beside its place, loaded back and scored, then put there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten
from mlx_lm.utils import dequantize_model, load_config, load_model, quantize_model
from mlx_lm_lora.utils import find_lmstudio_models_path, save_pretrained

from mlx_cpo_plugin.atomic_files import check_safetensors, flush
from mlx_cpo_plugin.checkpoints.run_folder import make_way
from mlx_cpo_plugin.checkpoints.run_identity import RunIdentity
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.errors import UserError, first_line, is_device_fault
from mlx_cpo_plugin.model.layers import ADAPTED, dense_dtype, merged_weight
from mlx_cpo_plugin.model.rounding import dithered
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.publish.card import CARD_FILE
from mlx_cpo_plugin.run.building import group_size_for, model_folder
from mlx_cpo_plugin.run.towers import TextAndTowers, text_and_towers
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.training.held_out import ENOUGH, HeldOutScores, held_out_scores, margin_retained, rounding_cost
from mlx_cpo_plugin.training.quantizer import Quantizer
from mlx_cpo_plugin.types import Tokenizer, Values

# Bytes that tokenizer and configuration take beside the weights, at most.
BESIDES = 50_000_000
INDEX = "model.safetensors.index.json"
_STAGING = ".unfinished-model-"


class FuseError(UserError):
    """The fused model cannot be written; the adapter is intact."""


class Fusing:
    """Merges the adapter of a run into its model.

    Args:
        before: what the model scored before it was trained, to compare the trained and the fused model with.
        pairs: the held-out rows that were scored; without any, nothing is.
        bits_option: what the user sets to choose ``fuse_bits``.
        run: whose files are replaced where the fused model goes, and nobody else's; ``None``: nothing is there.
    """

    def __init__(
        self,
        settings: RunSettings,
        before: HeldOutScores | None,
        pairs: Sequence[PreferencePair],
        say: Callable[[str], None],
        bits_option: str = "fuse_bits",
        run: RunIdentity | None = None,
    ) -> None:
        self.settings = settings
        self.before = before
        self.pairs = pairs
        self.say = say
        self.bits_option = bits_option
        self.run = run

    def fuse(self, model: nn.Module, tokenizer: Tokenizer) -> Path:
        """Write the fused model and return its folder; ``model`` is empty afterwards.

        Raises:
            FuseError: there is no room for it, or it cannot be written or loaded back; nothing of it is left, or
                nothing that a program takes for a model.
        """
        target, base = fused_folder(self.settings), model_folder(self.settings.model)
        trained = self._scores(model)
        parts = text_and_towers(model, base, self.say)
        precision = self._merge(model, base, trained)
        self._check_room(model, parts, base, target, precision)
        try:
            target.mkdir(parents=True, exist_ok=True)
            for left in target.glob(f"{_STAGING}*"):  # by a killed process
                shutil.rmtree(left, ignore_errors=True)
            with TemporaryDirectory(prefix=_STAGING, dir=target) as folder:
                staging = Path(folder)
                _save(model, tokenizer, parts, staging)
                _complete(staging, base, parts)
                written, _ = load_model(staging, lazy=not self.pairs)
                fused = self._scores(written)
                move_into_place(staging, target, self.say, self.run)
        except (OSError, RuntimeError, ValueError) as error:
            if is_device_fault(error) or isinstance(error, UserError):
                raise
            partly = any(target.glob("model*.safetensors")) and not (target / "config.json").exists()
            part = "the part of the fused model that is there lacks its config.json"
            what_is_left = part if partly else "nothing of the new fused model is left"
            raise FuseError(
                f"The fused model cannot be written to {target} ({first_line(error)}); free space there. "
                f"The adapter is intact, and {what_is_left}.",
                key="fuse",
                place=str(target),
            ) from error
        if self.before and trained and fused:
            self.say(rounding_cost(self.before, trained, fused))
            kept = margin_retained(self.before, trained, fused)
            if kept is not None and kept < ENOUGH:
                self.say(f"Warning: rounding cost more than a tenth of that; set {self.bits_option} higher, or to 16.")
        return target

    def _scores(self, model: nn.Module) -> HeldOutScores | None:
        settings = self.settings
        return held_out_scores(model, self.pairs, settings.scoring, settings.step_size) if self.pairs else None

    def _merge(self, model: nn.Module, base: Path, trained: HeldOutScores | None) -> str:
        """Merge the adapter, give the weights the precision of the fused model, and return a description of it."""
        adapters = [(name, module) for name, module in model.named_modules() if hasattr(module, "fuse")]
        bits = self.settings.fuse_bits
        if bits is None and self._keeps_bits_of_base(model, base, adapters, trained):
            return "with the bits of the base model"
        model.update_modules(tree_unflatten([(name, _merged_layer(name, module)) for name, module in adapters]))
        dequantize_model(model)
        for key in ("quantization", "quantization_config"):
            vars(model.args).pop(key, None)
        if bits is None or bits == 16:
            return "not quantised"
        _, config = quantize_model(model, {}, **self._rounding(model, bits))
        model.args.quantization = model.args.quantization_config = config["quantization"]
        return f"with {bits} bits"

    def _rounding(self, model: nn.Module, bits: int) -> Values:
        """Return what MLX's quantisation is told: what QAT has trained for, else the largest groups that divide."""
        trained_for = Quantizer.of(self.settings) if self.settings.qat_enable else None
        if trained_for and trained_for.is_of_mlx and trained_for.bits == bits:
            return trained_for.how
        size = group_size_for(model)
        if size is None:
            raise FuseError(
                f"{self.bits_option} is {bits}, but no layer has a width that divides by 32; set it to 16.",
                key=self.bits_option,
                allowed="16",
            )
        if trained_for:
            whose = "MLX" if trained_for.is_of_mlx else "mlx-lm-lora"
            self.say(
                f"Warning: QAT has trained for {trained_for.bits} bits as {whose} rounds to them, but "
                f"{self.bits_option} is {bits}, as MLX does: what it has won may be lost."
            )
        return {"group_size": size, "bits": bits, "mode": "affine"}

    def _keeps_bits_of_base(
        self, model: nn.Module, base: Path, adapters: list[tuple[str, nn.Module]], trained: HeldOutScores | None
    ) -> bool:
        """Merge into a base that is quantised on disk in its own bits, where that keeps what was learned."""
        quantization = load_config(base).get("quantization")
        if not (quantization and self.before and trained):
            return False
        model.update_modules(tree_unflatten([(name, module.fuse()) for name, module in adapters]))
        merged = self._scores(model)
        kept = margin_retained(self.before, trained, merged) if merged else None
        if kept is not None and kept >= ENOUGH:
            model.args.quantization = model.args.quantization_config = quantization
            return True
        share = "hardly anything was learned" if kept is None else f"only {kept:.0%} of what was learned would be left"
        self.say(
            f"With the bits of the base model {share}: the fused model is not quantised; set {self.bits_option} to "
            "choose."
        )
        model.update_modules(tree_unflatten(adapters))
        return False

    def _check_room(
        self, model: nn.Module, parts: TextAndTowers | None, base: Path, target: Path, precision: str
    ) -> None:
        """Say how large the model will be, before anything of it is computed or written."""
        size = sum(
            array.nbytes for array in [*by_name(model.parameters()).values(), *(parts.towers.values() if parts else ())]
        )
        base_size = sum(file.stat().st_size for file in base.glob("model*.safetensors")) or size
        self.say(
            f"The fused model, {precision}, takes {_bytes(size)}: {size / base_size:.1f} times the {_bytes(base_size)} "
            "of the base model."
        )
        there = next(path for path in (target, *target.absolute().parents) if path.is_dir())
        free = shutil.disk_usage(there).free
        if free < size + BESIDES:
            raise FuseError(
                f"The fused model takes {_bytes(size)}, but {there} has {_bytes(free)} left; free space, or set "
                f"{self.bits_option} to 4. The adapter is intact.",
                key=self.bits_option,
                place=str(there),
            )


def fused_folder(settings: RunSettings) -> Path:
    """Return where the fused model goes: beside the adapter, or into LM Studio."""
    if settings.lm_studio_name is None:
        return Path(settings.adapter_path)
    return Path(find_lmstudio_models_path()) / "mlx_lm_lora" / settings.lm_studio_name


def fused_as(settings: RunSettings) -> str:
    """Return how a run is fused, for its record, which moves with the folder."""
    bits = settings.fuse_bits or "own"
    return f"{bits} bits" + (f" in LM Studio as {settings.lm_studio_name}" if settings.lm_studio_name else "")


def holds_model(settings: RunSettings) -> bool:
    """Whether there is a model where the fused one goes, with all of its weights."""
    folder = fused_folder(settings)
    try:
        files = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        files = {"model.safetensors"}
    return all((folder / name).is_file() for name in ("config.json", *files))


def _merged_layer(name: str, module: nn.Module) -> nn.Module:
    """Return the layer with its adapter merged, dense; sums in float32, rounded as in :mod:`..model.rounding`."""
    layer: nn.Module = module.fuse(dequantize=True)
    if isinstance(module, ADAPTED):
        weight, dtype = merged_weight(module), dense_dtype(module)
        # What was packed does not lie on the grid of half precision, and is best rounded to nearest.
        layer.weight = weight.astype(dtype) if "scales" in module.linear else dithered(weight, dtype, f"{name}.weight")
    return layer


def _save(model: nn.Module, tokenizer: Tokenizer, parts: TextAndTowers | None, folder: Path) -> None:
    """Have the host write the model, whose arrays are freed shard by shard."""
    if parts:
        whole = parts.joined(model)
        model.update(tree_map(lambda _: mx.array([]), model.parameters()))
        model = whole
    save_pretrained(model=model, tokenizer=tokenizer, save_path=str(folder))


def _complete(folder: Path, base_folder: Path, parts: TextAndTowers | None) -> None:
    """Give a fused model what the host leaves behind: without its end tokens it would not stop generating.

    These are the keys of the base model's ``config.json`` that the model class itself does not read, among them
    ``eos_token_id``, its ``generation_config.json``, and code of its own; with towers, what belongs to these.
    """
    # Whether the fused model is quantised, only the host's own file says.
    left_out = {"quantization", "quantization_config", "_name_or_path", *(() if parts else ("vision_config",))}
    base = {key: value for key, value in load_config(base_folder).items() if key not in left_out}
    config = json.dumps({**base, **load_config(folder)}, indent=4, sort_keys=True)
    (folder / "config.json").write_text(config, encoding="utf-8")
    (folder / CARD_FILE).unlink(missing_ok=True)  # which knows neither the base model nor the data
    for pattern in ("generation_config.json", "*.py", *(("*processor*.json",) if parts else ())):
        for file in base_folder.glob(pattern):
            shutil.copy(file, folder)


def move_into_place(staging: Path, target: Path, say: Callable[[str], None], run: RunIdentity | None = None) -> None:
    """Move a whole model from ``staging`` into ``target``, in place of one of the same run that is there.

    At no moment does the folder hold a ``config.json`` with weights that are not its own: without the former it is no
    model to any program. Links in ``target`` are replaced, not followed.

    Raises:
        OSError: a file is cut short, or cannot be moved.
    """
    files = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    for file in files:
        if file.suffix == ".safetensors":
            check_safetensors(staging / file)
        flush(staging / file)
    config = Path("config.json")
    weights = [path.name for path in target.glob("model*.safetensors")] + [INDEX]
    make_way(target, list(dict.fromkeys((config.name, *weights, *(file.parts[0] for file in files)))), say, run)
    (target / config).unlink(missing_ok=True)
    for name in weights:
        if Path(name) not in files:
            (target / name).unlink(missing_ok=True)
    for file in [file for file in files if file != config] + [config]:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        (staging / file).replace(target / file)
    flush(target)


def _bytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
