"""A push takes what belongs to a model and nothing else, is private, and says in one sentence what went wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support.hub import Hub
from support.refusals import refused

import mlx_cpo_plugin
from mlx_cpo_plugin import cli
from mlx_cpo_plugin.publish.card import CARD_FILE, PLOT_FILE
from mlx_cpo_plugin.publish.hub import HubError, PushAfterRunError, push, upload_of

OF_ADAPTER = {CARD_FILE, PLOT_FILE, "adapters.safetensors", "adapter_config.json"}


def pushed(hub: Hub, name: str = "me/polite") -> dict[str, bytes]:
    return hub.repos[name][1]


class TestFiles:
    def test_of_an_adapter_go_adapter_card_and_plot(self, adapter: Path) -> None:
        upload = upload_of(adapter, "polite")

        assert set(upload.files) == OF_ADAPTER
        assert {"checkpoints/", "best/", "metrics.jsonl", "run_settings.yaml", "notes.txt"} <= set(upload.left_out)

    @pytest.mark.parametrize("metadata", [{}, {"run": "another", "iteration": "60"}])
    def test_an_adapter_that_the_card_would_not_describe_is_refused(
        self, adapter: Path, metadata: dict[str, str]
    ) -> None:
        mx.save_safetensors(str(adapter / "adapters.safetensors"), {"a": mx.zeros(4)}, metadata)

        with refused(HubError, match="was not written by the run that the card would describe; move it"):
            upload_of(adapter, "polite")

    def test_paths_in_a_configuration_stay_here(self, adapter: Path) -> None:
        content = upload_of(adapter, "polite").files["adapter_config.json"]

        assert isinstance(content, bytes)
        assert json.loads(content) == {"fine_tune_type": "dora", "model": "m"}

    def test_what_only_looks_like_a_path_stays(self, adapter: Path) -> None:
        values = {"tokens": ["/think", "/", "//", "a/b/c"], "template": "/{{ a }}/b"}
        (adapter / "adapter_config.json").write_text(json.dumps(values))

        assert upload_of(adapter, "polite").files["adapter_config.json"] == adapter / "adapter_config.json"

    def test_an_edited_card_goes_as_it_is(self, adapter: Path) -> None:
        (adapter / CARD_FILE).write_text("# Mine\n")

        assert upload_of(adapter, "polite").files[CARD_FILE] == adapter / CARD_FILE

    def test_of_a_model_go_weights_configuration_tokenizer_and_its_own_code(self, adapter: Path) -> None:
        of_model = {
            *("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"),
            *("generation_config.json", "chat_template.jinja", "additional_chat_templates/tool.jinja", "own_layers.py"),
            *("modeling_own.py", "rotary.py"),
        }
        own = {"model_file": "own_layers.py", "auto_map": {"AutoModel": "modeling_own.OwnModel"}, "model_type": "own"}
        texts = {"config.json": json.dumps(own), "modeling_own.py": "from .rotary import Rotary\n"}
        for name in (*of_model, "train.py", "type.py", "own.py", "train.jsonl"):
            (adapter / name).parent.mkdir(exist_ok=True)
            (adapter / name).write_text(texts.get(name, "{}"))

        assert set(upload_of(adapter, "polite", fused=True).files) == {*of_model, CARD_FILE, PLOT_FILE}
        assert set(upload_of(adapter, "polite").files) == OF_ADAPTER

    @pytest.mark.parametrize("names", [("adapter_model.safetensors", "adapter_config.json"), ("a.gguf", "Modelfile")])
    def test_an_export_goes_whole(self, names: tuple[str, ...], tmp_path: Path) -> None:
        for name in (*names, CARD_FILE):
            (tmp_path / name).write_text("{}")

        assert set(upload_of(tmp_path, "polite").files) == {*names, CARD_FILE}

    def test_a_folder_without_a_model_is_refused(self, tmp_path: Path, adapter: Path) -> None:
        with refused(HubError, key="folder"):
            upload_of(tmp_path / "nowhere", "polite")
        with refused(HubError, key="folder"):
            upload_of(adapter / "checkpoints", "polite")
        with refused(HubError, key="folder"):
            upload_of(adapter, "polite", fused=True)


class TestCommand:
    def test_a_repository_is_made_private_and_gets_the_files(
        self, adapter: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = sorted(adapter.rglob("*"))

        assert cli.main(["push", str(adapter), "polite"]) == 0

        private, files = hub.repos["me/polite"]
        assert private
        assert set(files) == OF_ADAPTER
        assert files["adapters.safetensors"] == (adapter / "adapters.safetensors").read_bytes()
        assert b"polite" in files[CARD_FILE]
        assert f"{hub.url}/me/polite (private)" in capsys.readouterr().out
        assert sorted(adapter.rglob("*")) == before

    def test_a_dry_run_lists_files_and_sizes_and_asks_nobody(
        self, adapter: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["push", str(adapter), "polite", "--dry-run"]) == 0

        lines = capsys.readouterr().out.splitlines()
        listed = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in lines[: len(OF_ADAPTER)]}
        assert set(listed) == OF_ADAPTER
        assert listed["adapters.safetensors"] == (adapter / "adapters.safetensors").stat().st_size
        assert not hub.asked

    def test_a_public_repository_gets_nothing_unless_that_is_asked_for(self, adapter: Path, hub: Hub) -> None:
        hub.repos["me/polite"] = False, {}
        upload = upload_of(adapter, "polite")

        with refused(HubError, key="hub_private_repo", place="me/polite"):
            push(upload, "me/polite", private=True, say=print)
        assert not pushed(hub)

        assert cli.main(["push", str(adapter), "me/polite", "--public"]) == 0
        assert set(pushed(hub)) == OF_ADAPTER

    @pytest.mark.parametrize("request_path", ["/api/repos/create", "/preupload/", "/commit/"])
    @pytest.mark.parametrize("status", [401, 403, 404])
    def test_what_the_hub_refuses_is_one_sentence(
        self, request_path: str, status: int, adapter: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hub.refusals = {request_path: status}

        assert cli.main(["push", str(adapter), "polite"]) == 2

        (line,) = capsys.readouterr().err.splitlines()
        assert str(status) in line

    def test_no_token_and_no_network_are_one_sentence(
        self, adapter: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        from huggingface_hub import constants

        upload = upload_of(adapter, "polite")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.delenv("HF_TOKEN")
        with refused(HubError, key="push_to_hub", match="401"):
            push(upload, "polite", private=True, say=print)

        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with refused(HubError, match="network"):
            push(upload, "polite", private=True, say=print)

    @pytest.mark.parametrize("name", ["a/b/c", "-a", "a b", "a..b", ""])
    def test_a_name_that_the_hub_does_not_take_is_refused(self, name: str, adapter: Path) -> None:
        assert cli.main(["push", "--dry-run", str(adapter), "--", name]) == 2


class TestRun:
    def test_a_run_describes_and_pushes_its_adapter_and_a_failed_push_does_not_lose_it(
        self,
        settings: dict[str, Any],
        hub: Hub,
        run_main: Callable[..., None],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        folder = tmp_path / "adapters"
        call = {**settings, "test": True, "push_to_hub": "polite"}
        hub.refusals = {"/commit/": 403}

        with refused(PushAfterRunError, key="push_to_hub", match="The run is complete"):
            run_main(call)
        assert PushAfterRunError.exit_code not in (0, 2)
        card = (folder / CARD_FILE).read_text()
        assert all(f"| {split} | {pairs} |" in card for split, pairs in (("train", 10), ("valid", 4), ("test", 4)))
        assert str(tmp_path) not in card
        cli.main(["check", "--config", str(folder / "run_settings.yaml")])
        digests = re.findall(r"\b[0-9a-f]{64}\b", card)
        assert digests == re.findall(r"\b[0-9a-f]{64}\b", capsys.readouterr().out)

        hub.refusals = {}
        for _ in range(2):
            run_main({**call, "resume": "auto"})
        assert set(pushed(hub)) == OF_ADAPTER - {PLOT_FILE}
        assert pushed(hub)["adapters.safetensors"] == (folder / "adapters.safetensors").read_bytes()
        assert sum("/commit/" in request for request in hub.asked) == 2  # the one that was refused

    def test_without_a_token_a_run_does_not_begin(
        self, settings: dict[str, Any], hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.delenv("HF_TOKEN")

        with refused(key="push_to_hub"):
            mlx_cpo_plugin.train(**settings, push_to_hub="polite")
        assert not (tmp_path / "adapters").exists()
        assert not hub.asked

    def test_a_call_from_python_returns_its_result_though_the_push_fails(
        self, settings: dict[str, Any], hub: Hub, run_main: Callable[..., None]
    ) -> None:
        hub.refusals = {"/api/repos/create": 404}

        with pytest.warns(UserWarning, match="The run is complete"):
            result = mlx_cpo_plugin.train(**settings, push_to_hub="polite")

        assert (result.adapter_path / "adapters.safetensors").exists()

    def test_the_card_of_an_older_run_is_put_aside_with_it(
        self, settings: dict[str, Any], run_main: Callable[..., None], tmp_path: Path
    ) -> None:
        run_main(settings)
        first = (tmp_path / "adapters" / CARD_FILE).read_text()
        run_main({**settings, "beta": 0.3})

        (older,) = (tmp_path / "adapters" / "previous").iterdir()
        assert (older / CARD_FILE).read_text() == first
        assert "beta: 0.3" in (tmp_path / "adapters" / CARD_FILE).read_text()
