"""A model card says what is known of a run, in the hub's terms, and nothing of the machine that it ran on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mlx_cpo_plugin.publish import card
from mlx_cpo_plugin.publish.card import CARD_FILE, CARD_NAMES, FORMS, PLOT_FILE, model_card, without_paths, write_card
from mlx_cpo_plugin.report.plots import as_png
from mlx_cpo_plugin.settings import config


def metadata(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def change_settings(folder: Path, **values: object) -> None:
    file = folder / "run_settings.yaml"
    settings = yaml.safe_load(file.read_text()) | values
    file.write_text("# versions\n" + yaml.safe_dump(settings))


class TestContents:
    def test_the_metadata_are_the_hubs(self, adapter: Path) -> None:
        text = model_card(adapter).text

        assert metadata(text) == {
            "base_model": "account/base-model",
            "base_model_relation": "adapter",
            "library_name": "mlx",
            "pipeline_tag": "text-generation",
            "tags": ["mlx", "cpo", "dora", "base_model:adapter:account/base-model"],
        }
        assert "# license:" in text

    @pytest.mark.parametrize("form", FORMS)
    def test_each_form_says_what_it_is_and_how_it_is_used(self, form: str, adapter: Path) -> None:
        text = model_card(adapter, form, here="account/polite", notes=["Weights in float16."]).text

        tags = metadata(text)["tags"]
        assert ("mlx" in tags) == (form in ("adapter", "mlx"))
        assert f"base_model:{metadata(text)['base_model_relation']}:account/base-model" in tags
        assert "account/polite" in section(text, "Use")
        assert "{" not in section(text, "Use")
        assert "- Weights in float16." in text

    @pytest.mark.parametrize("form", ["adapter", "mlx"])
    def test_it_is_used_with_the_arguments_of_the_template_that_it_was_trained_with(
        self, form: str, adapter: Path
    ) -> None:
        record = json.loads((adapter / "run.json").read_text())
        (adapter / "run.json").write_text(json.dumps({**record, "template_arguments": {"enable_thinking": False}}))

        assert """ --chat-template-config '{"enable_thinking": false}'""" in section(
            model_card(adapter, form).text, "Use"
        )

    def test_an_adapter_on_the_hub_is_fetched_first_which_mlx_lm_does_not_do(self, adapter: Path) -> None:
        lines = section(model_card(adapter, here="account/polite").text, "Use").splitlines()

        assert "hf download account/polite --local-dir polite" in lines
        assert "mlx_lm.generate --model account/base-model --adapter-path polite --prompt 'Hi!'" in lines

    @pytest.mark.parametrize("form", FORMS)
    def test_a_template_of_the_run_itself_is_in_all_forms_but_the_adapter(self, form: str, adapter: Path) -> None:
        change_settings(adapter, chat_template="chat.jinja")

        assert ("export --to mlx" in section(model_card(adapter, form).text, "Use")) == (form == "adapter")

    def test_the_data_have_name_rows_splits_and_digest(self, adapter: Path) -> None:
        data = section(model_card(adapter).text, "Training data")

        assert "- `rows.jsonl`" in data
        assert f"| train | 11 | 12 | `{'ab' * 32}` |" in data

    def test_data_of_the_hub_are_linked_and_in_the_metadata(self, adapter: Path) -> None:
        sets = [{"path": "account/preferences", "train_split": "train"}, {"path": "more.jsonl.gz"}]
        change_settings(adapter, data=sets)

        text = model_card(adapter).text

        assert metadata(text)["datasets"] == ["account/preferences"]
        assert "(https://huggingface.co/datasets/account/preferences)" in section(text, "Training data")

    def test_the_results_are_those_before_and_after_training_and_of_the_test(self, adapter: Path) -> None:
        results = section(model_card(adapter).text, "Results")

        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in results.splitlines() if "%" in line]
        assert rows == [
            ["validation, before training", "50.0%", "+0.250", "0.5000", "0.250"],
            ["validation, after training", "62.5%", "+0.312", "0.3750", "0.250"],
            ["test", "60.0%", "+0.300", "0.4000", "0.250"],
        ]

    def test_the_card_of_the_best_adapter_has_the_validation_of_its_iteration(self, adapter: Path) -> None:
        assert "| validation, after training | 75.0% |" in model_card(adapter / "best").text

    def test_the_plot_is_a_picture_beside_the_card(self, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(card, "as_png", as_png)

        made = model_card(adapter)
        write_card(made, adapter)

        assert made.plot.startswith(b"\x89PNG\r\n")
        assert (adapter / PLOT_FILE).read_bytes() == made.plot
        assert f"]({PLOT_FILE})" in section(made.text, "Results")

    def test_a_run_of_few_reports_has_no_plot(self, adapter: Path) -> None:
        lines = [line for line in (adapter / "metrics.jsonl").read_text().splitlines() if "train_" not in line]
        (adapter / "metrics.jsonl").write_text("\n".join(lines) + "\n")

        made = model_card(adapter)

        assert not made.plot
        assert PLOT_FILE not in made.text

    def test_the_settings_are_a_config_of_what_differs_from_the_defaults_and_acts(self, adapter: Path) -> None:
        (block,) = re.findall(r"```yaml\n(.*?)```", model_card(adapter).text, flags=re.DOTALL)
        settings = yaml.safe_load(block)

        assert settings["simpo_gamma"] == 1.0
        assert settings["max_seq_length"] == 512
        assert not {"delta", "adapter_path", "sample_prompts"} & set(settings)
        assert config.resolve(settings).settings.beta == 2.0

    def test_nothing_is_told_of_the_machine_or_of_what_was_asked(self, adapter: Path) -> None:
        change_settings(
            adapter,
            model="/home/somebody/models/private-model",
            data="~/secret customers/rows.jsonl",
            chat_template="/home/somebody/secret/template.jinja",
            resume_adapter_file="../secret/adapters.safetensors",
            hf_dataset=None,
        )

        text = model_card(adapter).text

        for private in ("somebody", "secret", str(adapter.parent), "Miller", "owes"):
            assert private not in text
        assert "private-model" in text
        assert "base_model" not in metadata(text)

    def test_a_model_from_the_hubs_cache_has_its_name_there(self, adapter: Path) -> None:
        change_settings(adapter, model="/home/somebody/.cache/huggingface/hub/models--account--base/snapshots/0a1b")

        text = model_card(adapter).text

        assert metadata(text)["base_model"] == "account/base"
        assert "somebody" not in text

    def test_a_name_with_spaces_is_quoted_in_commands(self, adapter: Path) -> None:
        change_settings(adapter, model="/home/somebody/my model")

        assert "--model 'my model' --adapter-path polite" in section(model_card(adapter).text, "Use")

    def test_what_a_run_has_not_left_is_left_out(self, tmp_path: Path) -> None:
        text = model_card(tmp_path).text

        assert metadata(text)["tags"] == ["mlx", "cpo", "lora"]
        assert "model is" not in text
        assert not {"## Results", "## Settings", "## Training data", "## Versions"} & set(text.splitlines())

    @given(st.lists(st.text("abc._- ", min_size=1).filter(lambda part: part.strip(". ")), min_size=2, max_size=5))
    def test_of_a_path_only_the_last_part_stays(self, parts: list[str]) -> None:
        for root in ("/", "~/", "../", "C:\\"):
            separator = "\\" if root.endswith("\\") else "/"
            shown = without_paths({"data": [{"path": root + separator.join(parts)}]})["data"][0]["path"]
            assert "/" not in shown
            assert "\\" not in shown
            assert "~" not in shown


class TestFiles:
    def test_a_card_replaces_its_own_kind(self, adapter: Path) -> None:
        write_card(model_card(adapter), adapter)
        change_settings(adapter, beta=3.0)

        assert write_card(model_card(adapter), adapter) == CARD_FILE
        assert "beta: 3.0" in (adapter / CARD_FILE).read_text()

    @pytest.mark.parametrize("change", ["license", "append", "newlines", "own", "bytes", "folder"])
    def test_what_a_person_wrote_or_edited_stays_and_the_card_goes_beside(self, change: str, adapter: Path) -> None:
        write_card(model_card(adapter), adapter)
        file = adapter / CARD_FILE
        written = file.read_bytes()
        changed = {
            "license": written.replace(b"# license: fill in, e.g. apache-2.0", b"license: mit #"),
            "append": written + b"More.\n",
            "newlines": written.replace(b"\n", b"\r\n"),
            "own": b"# Mine\n",
            "bytes": b"\xff\xfe",
        }
        if change == "folder":
            file.unlink()
            file.mkdir()
        else:
            file.write_bytes(changed[change])

        assert write_card(model_card(adapter), adapter) == CARD_NAMES[1]
        assert file.is_dir() or file.read_bytes() == changed[change]
        assert (adapter / CARD_NAMES[1]).read_bytes() == written

        (adapter / CARD_NAMES[1]).write_text("# Mine, too\n")
        assert write_card(model_card(adapter), adapter) == "MODEL_CARD-2.md"
        assert (adapter / CARD_NAMES[1]).read_text() == "# Mine, too\n"

    def test_an_export_over_another_carries_an_edited_card_over(self, adapter: Path, tmp_path: Path) -> None:
        old, new = tmp_path / "old", tmp_path / "new"
        for folder in (old, new):
            folder.mkdir()
            (folder / CARD_FILE).write_text(f"# Of {folder.name}\n")

        assert write_card(model_card(adapter, "peft"), new, replacing=old) == CARD_NAMES[1]
        assert (new / CARD_FILE).read_text() == "# Of old\n"

        assert write_card(model_card(adapter, "peft"), new, replacing=tmp_path / "none") == CARD_FILE
