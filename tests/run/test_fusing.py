"""Fused models: they score like what was trained, are there whole or not at all, and say what they take and cost."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm import convert
from mlx_lm.models import gemma3
from mlx_lm.utils import load, load_model
from support.refusals import refused
from support.tiny import build_pairs

from mlx_cpo_plugin.data import load_dataset
from mlx_cpo_plugin.host import load_chat_tokenizer
from mlx_cpo_plugin.run import fusing
from mlx_cpo_plugin.run.fusing import FuseError, move_into_place
from mlx_cpo_plugin.settings.config import resolve
from mlx_cpo_plugin.training.held_out import HeldOutScores, held_out_rows, held_out_scores

Settings = dict[str, Any]
RunMain = Callable[..., None]


def margin(model: Any, settings: Settings) -> float:
    given = {key: settings[key] for key in ("train_mode", "train", "data")}
    valid = load_dataset(resolve(given).settings, load_chat_tokenizer(settings["model"]))[1]
    return held_out_scores(model, valid).margin


@pytest.fixture
def fuse_settings(settings: Settings) -> Settings:
    return {**settings, "fuse": True, "iters": 20, "learning_rate": 2e-3}


@pytest.fixture
def half_model(model_folder: Path, tmp_path: Path) -> Path:
    """The model in bfloat16."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "half"))
    weights = {name: value.astype(mx.bfloat16) for name, value in mx.load(str(folder / "model.safetensors")).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


@pytest.fixture
def quantised_model(model_folder: Path, tmp_path: Path) -> Path:
    """The model on disk with weights of 4 bits, those of one layer with 8."""
    convert(
        str(model_folder),
        str(tmp_path / "quantised"),
        quantize=True,
        q_group_size=64,
        quant_predicate=lambda path, _: {"group_size": 64, "bits": 8} if "layers.0.mlp" in path else True,
    )
    return tmp_path / "quantised"


def assert_fused_scores_like_the_adapter(base: Path, settings: Settings, tolerance: float, **quantised: Any) -> Any:
    """Return the fused model, after comparing its change of the margin with that of the adapter."""
    folder = Path(settings["adapter_path"])
    before, _ = load(str(base))
    settings = {**settings, "model": str(base)}
    if quantised:
        mlx_lm.utils.nn.quantize(before, **quantised)
    start = margin(before, settings)
    mlx_lm.utils.load_adapters(before, str(folder))
    before.eval()
    trained = margin(before, settings)
    fused, _ = load(str(folder))
    assert abs(trained - start) > 0.1
    assert margin(fused, settings) - start == pytest.approx(trained - start, rel=tolerance)
    return fused


def test_over_a_base_that_was_quantised_while_loading_nothing_is_rounded(
    fuse_settings: Settings, run_main: RunMain, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_main({**fuse_settings, "load_in_4bits": True})

    fused = assert_fused_scores_like_the_adapter(model_folder, fuse_settings, 0.01, group_size=128, bits=4)
    assert not any(hasattr(module, "bits") for module in fused.modules())
    out = capsys.readouterr().out
    assert re.search(r"The fused model, not quantised, takes (\S+) MB: 1\.0 times the \1 MB of the base model\.", out)
    assert "100% of what was learned" in out


@pytest.mark.parametrize("train_type", ["lora", "dora"])
def test_what_is_too_small_for_bfloat16_is_fused_into_it_on_average(
    fuse_settings: Settings, run_main: RunMain, half_model: Path, train_type: str
) -> None:
    small = {"learning_rate": 1e-4, "iters": 10, "train_type": train_type}
    run_main({**fuse_settings, **small, "model": str(half_model)})

    fused = assert_fused_scores_like_the_adapter(half_model, fuse_settings, 0.15)
    assert {value.dtype for _, value in tree_flatten(fused.parameters())} == {mx.bfloat16}


@pytest.mark.parametrize(("enough", "bits_stay"), [(-1e9, True), (1e9, False)])
@pytest.mark.slow
def test_a_base_that_is_quantised_on_disk_keeps_its_bits_if_they_keep_what_was_learned(
    fuse_settings: Settings,
    run_main: RunMain,
    quantised_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    enough: float,
    bits_stay: bool,
) -> None:
    monkeypatch.setattr(fusing, "ENOUGH", enough)

    run_main({**fuse_settings, "model": str(quantised_model)})

    fused, _, config = load(fuse_settings["adapter_path"], return_config=True)
    out = capsys.readouterr().out
    if bits_stay:
        assert fused.layers[0].mlp.up_proj.bits == 8
        assert fused.layers[1].mlp.up_proj.bits == 4
        base_config = json.loads((quantised_model / "config.json").read_text())
        assert config["quantization"] == base_config["quantization"]
        assert "The fused model, with the bits of the base model, takes" in out
    else:
        assert "quantization" not in config
        assert_fused_scores_like_the_adapter(quantised_model, fuse_settings, 0.01)
        assert "of what was learned would be left: the fused model is not quantised; set fuse_bits to choose." in out
        assert re.search(r"The fused model, not quantised, takes \S+ MB: [5-8]\.. times the", out)


def test_the_bits_that_the_user_chose_are_those_of_the_fused_model_and_their_cost_is_told(
    fuse_settings: Settings,
    run_main: RunMain,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fusing, "ENOUGH", 1e9)
    run_main({**fuse_settings, "load_in_8bits": True, "fuse_bits": 2})

    fused, _, config = load(fuse_settings["adapter_path"], return_config=True)
    assert config["quantization"]["bits"] == 2
    assert fused.layers[0].mlp.up_proj.bits == 2
    out = capsys.readouterr().out
    assert "The fused model, with 2 bits, takes" in out
    assert "of what was learned." in out
    assert "Warning: rounding cost more than a tenth of that" in out


QAT = {"qat_enable": True, "qat_bits": 4, "learning_rate": 1e-4, "iters": 1}


@pytest.mark.parametrize(
    ("qat", "written"),
    [
        ({}, {"bits": 4, "group_size": 64, "mode": "affine"}),
        ({"qat_group_size": 32}, {"bits": 4, "group_size": 32, "mode": "affine"}),
        ({"qat_mode": "mxfp4"}, {"bits": 4, "group_size": 32, "mode": "mxfp4"}),
    ],
)
def test_what_qat_has_trained_for_is_what_is_written(
    qat: Settings, written: Settings, fuse_settings: Settings, run_main: RunMain, capsys: pytest.CaptureFixture[str]
) -> None:
    run_main({**fuse_settings, **QAT, **qat, "fuse_bits": 4})

    fused, _, config = load(fuse_settings["adapter_path"], return_config=True)
    assert {key: config["quantization"][key] for key in written} == written
    assert fused.layers[0].mlp.up_proj.group_size == written["group_size"]
    assert "QAT has trained for" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("qat", "told"),
    [
        ({"qat_bits": 8}, "QAT has trained for 8 bits as MLX rounds to them, but fuse_bits is 4, as MLX does"),
        ({"qat_quantizer": "host"}, "QAT has trained for 4 bits as mlx-lm-lora rounds to them, but fuse_bits is 4"),
    ],
)
def test_a_fused_model_that_qat_has_not_trained_for_is_told(
    qat: Settings, told: str, fuse_settings: Settings, run_main: RunMain, capsys: pytest.CaptureFixture[str]
) -> None:
    run_main({**fuse_settings, **QAT, **qat, "fuse_bits": 4})

    assert told in capsys.readouterr().out


def test_full_training_is_fused_and_scored_too(
    fuse_settings: Settings, run_main: RunMain, capsys: pytest.CaptureFixture[str]
) -> None:
    run_main({**fuse_settings, "train_type": "full", "iters": 2})

    assert "100% of what was learned" in capsys.readouterr().out


# Whole or nothing


@pytest.fixture
def before_fusing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Have something happen between training and fusing."""

    def set_up(happen: Callable[[], None]) -> None:
        fuse = fusing.Fusing.fuse

        def fuse_after_that(*arguments: Any) -> Path:
            happen()
            return fuse(*arguments)

        monkeypatch.setattr(fusing.Fusing, "fuse", fuse_after_that)

    return set_up


def assert_adapter_alone(folder: Path, older: dict[str, bytes] | None = None) -> None:
    """The adapter is there, and of a fused model nothing but what was there before."""
    mx.eval(mx.load(str(folder / "adapters.safetensors")))
    rest = {path.name: path.read_bytes() for path in folder.glob("model*")} | {
        path.name: path.read_bytes() for path in folder.glob("config.json")
    }
    assert rest == (older or {})
    assert not list(folder.glob(".unfinished*"))


def test_a_disk_that_fills_up_leaves_the_adapter_and_no_half_model(
    fuse_settings: Settings, run_main: RunMain, before_fusing: Any
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before_fusing(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1])))
    try:
        with refused(FuseError, key="fuse"):
            run_main({**fuse_settings, "iters": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert_adapter_alone(Path(fuse_settings["adapter_path"]))


def test_a_file_that_is_cut_short_in_silence_is_found(
    fuse_settings: Settings, run_main: RunMain, before_fusing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = mx.save_safetensors

    def save_half(name: str, *arguments: Any, **keywords: Any) -> None:
        save(name, *arguments, **keywords)
        content = Path(name).read_bytes()
        Path(name).write_bytes(content[: len(content) // 2])

    before_fusing(lambda: monkeypatch.setattr(mx, "save_safetensors", save_half))

    with refused(FuseError, key="fuse"):
        run_main({**fuse_settings, "iters": 2})

    assert_adapter_alone(Path(fuse_settings["adapter_path"]))


def test_without_room_nothing_is_written(
    fuse_settings: Settings, run_main: RunMain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusing.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000_000))
    monkeypatch.setattr(fusing, "save_pretrained", lambda **_: pytest.fail("it was written"))

    with refused(FuseError, r"takes \S+ MB.* 10\.0 MB left", key="fuse_bits"):
        run_main({**fuse_settings, "iters": 2})

    assert_adapter_alone(Path(fuse_settings["adapter_path"]))


def test_a_fused_model_takes_the_place_of_an_older_one_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "notes.txt"):
        (target / name).write_text("older")
    staging = tmp_path / "staging"
    (staging / "templates").mkdir(parents=True)
    mx.save_safetensors(str(staging / "model.safetensors"), {"weight": mx.ones(3)})
    (staging / "config.json").write_text("new")
    (staging / "templates" / "chat.jinja").write_text("new")

    move_into_place(staging, target, print)

    files = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert files == {"model.safetensors", "config.json", "notes.txt", "templates/chat.jinja"}
    assert (target / "config.json").read_text() == "new"


def test_a_process_killed_while_a_model_is_put_in_place_leaves_none_that_loads_with_foreign_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before each single change of the folder, it holds the older model, or none, or the new one."""
    unlink, replace, allowed = Path.unlink, Path.replace, 0

    class KilledError(BaseException):
        pass

    def limited(change: Callable[..., Any]) -> Callable[..., Any]:
        def change_if_allowed(*arguments: Any, **keywords: Any) -> Any:
            nonlocal left
            if left == 0:
                raise KilledError
            left -= 1
            return change(*arguments, **keywords)

        return change_if_allowed

    for allowed in range(12):
        target, staging, left = tmp_path / str(allowed), tmp_path / f"staging-{allowed}", allowed
        for folder, text in ((target, "older"), (staging, "new")):
            folder.mkdir()
            (folder / "config.json").write_text(text)
            (folder / "model.safetensors.index.json").write_text(text)
        mx.save_safetensors(str(target / "model-00001-of-00001.safetensors"), {"weight": mx.zeros(3)})
        mx.save_safetensors(str(staging / "model.safetensors"), {"weight": mx.ones(3)})
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", limited(unlink))
            patch.setattr(Path, "replace", limited(replace))
            with suppress(KilledError):
                move_into_place(staging, target, print)
        weights = {path.name for path in target.glob("model*.safetensors")}
        if (target / "config.json").exists():
            new = (target / "config.json").read_text() == "new"
            assert weights == {"model.safetensors" if new else "model-00001-of-00001.safetensors"}
            assert (target / "model.safetensors.index.json").read_text() == ("new" if new else "older")
    assert (target / "config.json").read_text() == "new"


def test_a_fused_model_overwrites_nothing_but_what_its_own_run_wrote(settings: Settings, run_main: RunMain) -> None:
    folder = Path(settings["adapter_path"])
    folder.mkdir()
    # As an earlier version left them, and a note of the user.
    before = {"config.json": b"{}", "model-00001-of-00002.safetensors": b"older"}
    for name, content in {**before, "README.md": b"mine"}.items():
        (folder / name).write_bytes(content)

    run_main({**settings, "fuse": True})

    (aside,) = (folder / "previous").glob("before-*")
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before
    assert not (folder / "model-00001-of-00002.safetensors").exists()
    assert (folder / "README.md").read_bytes() == b"mine"  # the model's card is beside it
    load(str(folder))
    # Its own are replaced when the run goes on.
    run_main({**settings, "fuse": True, "resume": "auto", "iters": settings["iters"] + 2})
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before
    assert [path.name for path in (folder / "previous").iterdir()] == [aside.name]


def test_what_a_killed_process_left_is_removed_and_links_are_replaced_not_followed(
    fuse_settings: Settings, run_main: RunMain, model_folder: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(model_folder, tmp_path / "base"))
    content = (base / "model.safetensors").read_bytes()
    folder = Path(fuse_settings["adapter_path"])
    (folder / ".unfinished-model-1").mkdir(parents=True)
    (folder / ".unfinished-model-1" / "model.safetensors").write_bytes(b"half")
    for name in ("model.safetensors", "config.json"):
        (folder / name).symlink_to(base / name)

    run_main({**fuse_settings, "iters": 2, "model": str(base)})

    assert (base / "model.safetensors").read_bytes() == content
    assert not (folder / "model.safetensors").is_symlink()
    assert not list(folder.glob(".unfinished*"))


def test_the_base_model_in_lm_studio_is_not_replaced(
    fuse_settings: Settings, run_main: RunMain, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    base = Path(shutil.copytree(model_folder, tmp_path / ".lmstudio/models/mlx_lm_lora/mine"))

    with refused(match="the model's own folder", key="lm_studio_name"):
        run_main({**fuse_settings, "iters": 2, "model": str(base), "lm_studio_name": "mine"})


# Multimodal bases


@pytest.fixture
def multimodal_model(model_folder: Path, tmp_path: Path) -> Path:
    """A Gemma 3 of two layers with weights of a vision tower and a projector beside its language model."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "multimodal"))
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "sliding_window_pattern": 2,
        "vocab_size": 320,
    }
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}, "vocab_size": 320}
    mx.random.seed(1)
    model = gemma3.Model(gemma3.ModelArgs.from_dict(config))
    weights = {name: value for name, value in tree_flatten(model.parameters()) if "lm_head" not in name}
    weights |= {"vision_tower.layers.0.q.weight": mx.ones((8, 8)), "multi_modal_projector.weight": mx.full((8, 4), 2.0)}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 2}))
    (folder / "preprocessor_config.json").write_text('{"size": 224}')
    return folder


@pytest.mark.parametrize("extra", [{}, {"fuse_bits": 8}, {"load_in_8bits": True}], ids=str)
def test_a_multimodal_base_keeps_its_towers(
    fuse_settings: Settings, run_main: RunMain, multimodal_model: Path, extra: Settings
) -> None:
    run_main({**fuse_settings, **extra, "model": str(multimodal_model), "iters": 5})

    folder = Path(fuse_settings["adapter_path"])
    base, fused = (mx.load(str(path / "model.safetensors")) for path in (multimodal_model, folder))
    assert {name for name in fused if name.endswith(".weight")} == {name for name in base if name.endswith(".weight")}
    for name in ("vision_tower.layers.0.q.weight", "multi_modal_projector.weight"):
        assert mx.array_equal(fused[name], base[name])
    config = json.loads((folder / "config.json").read_text())
    assert config["vision_config"] == {"hidden_size": 8}
    assert (folder / "preprocessor_config.json").read_text() == '{"size": 224}'
    model, _ = load_model(folder)  # as a text model, it loads as the base does
    assert any(hasattr(module, "bits") for module in model.modules()) == ("fuse_bits" in extra)


def test_a_multimodal_base_whose_weights_are_put_together_on_loading_says_what_is_left_out(
    fuse_settings: Settings,
    run_main: RunMain,
    multimodal_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sanitize = gemma3.Model.sanitize
    monkeypatch.setattr(
        gemma3.Model,
        "sanitize",
        lambda self, weights: tree_map(lambda value: value + 0 if value.ndim == 2 else value, sanitize(self, weights)),
    )

    run_main({**fuse_settings, "model": str(multimodal_model), "iters": 2})

    assert "the fused model will be its language model alone" in capsys.readouterr().out
    fused = mx.load(str(Path(fuse_settings["adapter_path"], "model.safetensors")))
    assert not any("vision_tower" in name for name in fused)


# Held-out rows


def test_held_out_rows_are_a_few_short_ones_of_the_first_split_that_has_any() -> None:
    pairs = build_pairs(30)

    rows = held_out_rows([], pairs, build_pairs(5, seed=9))

    assert len(rows) == 8
    assert max(pair.tokens for pair in rows) <= sorted(pair.tokens for pair in pairs)[8]
    assert held_out_rows(["no pair"], []) == []


def test_the_share_that_is_kept_is_that_of_the_margin_won() -> None:
    before, trained, rounded = (HeldOutScores(np.array([[chosen], [-5.0]])) for chosen in (-6.0, -2.0, -3.0))

    assert fusing.margin_retained(before, trained, rounded) == pytest.approx(0.75)
    assert fusing.margin_retained(before, before, rounded) is None
    assert "75% of what was learned" in fusing.rounding_cost(before, trained, rounded)
    barely = HeldOutScores(np.array([[-5.9], [-5.0]]))
    assert "of what was learned" not in fusing.rounding_cost(before, barely, rounded)  # 3000% would be no share
