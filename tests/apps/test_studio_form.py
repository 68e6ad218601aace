"""The form and its file: the options decide the fields, the file keeps what has no field, the checks are everyone's."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.refusals import refused
from support.tiny import LIKE_OTHER_YAML

from mlx_cpo_plugin import LossType, Option, hookimpl
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.plugins import get_plugin_manager
from mlx_cpo_plugin.settings.config import resolve
from mlx_cpo_plugin.settings.yaml_settings import dump_settings, parse_settings, parse_value

pytest.importorskip("ruamel.yaml", reason="needs the extra 'studio'")

from mlx_cpo_plugin.studio import document
from mlx_cpo_plugin.studio.form import PREFERENCE, TRAINING, Content, Field, form_fields, has_effect

FILE = """\
# what I begin with
model: my-model
train: true
train_mode: cpo
data: rows/
beta: 0.05   # lower than with DPO
learning_rate: 5e-6
lora_parameters: {rank: 16}
top_p: 0.9   # read by other modes
"""


def fields() -> dict[str, Field]:
    return {field.key: field for field in form_fields()}


def changed(text: str, **contents: Content) -> str:
    """The file after the named controls were changed."""
    held = document.contents_of(text, form_fields())
    return document.with_contents(
        text, held | {key.replace("__", "."): value for key, value in contents.items()}, form_fields()
    )


class TestFields:
    def test_preference_comes_first_then_what_everybody_sets_of_the_training(self) -> None:
        keys = [field.key for field in form_fields()]

        assert keys[:5] == ["dpo_cpo_loss_type", "beta", "delta", "preset", "cpo_alpha"]
        assert {field.key for field in form_fields() if field.block == PREFERENCE} >= {"simpo_gamma", "label_smoothing"}
        trained = [field.key for field in form_fields() if field.block == TRAINING]
        assert trained == ["iters", "epochs", "batch_size", "learning_rate"]

    def test_one_field_stands_for_all_quantisations(self) -> None:
        assert [key for key in fields() if key.startswith(("load_in", "quantisation"))] == ["quantisation"]
        assert [title for title, _ in fields()["quantisation"].choices] == [
            *("none", "4 bits", "6 bits", "8 bits", "MXFP4"),
        ]

    def test_there_is_no_field_for_a_reference_model(self) -> None:
        assert not any("reference" in key for key in fields())

    def test_every_field_tells_its_help_and_its_default(self) -> None:
        for field in form_fields():
            assert field.option.help in field.help
            if field.option.default not in (None, ""):
                assert "Default: " in field.help

    def test_delta_has_an_effect_with_dpop_alone(self) -> None:
        known = fields()
        contents = document.contents_of(FILE, known.values())

        works = {
            loss: has_effect(known["delta"], contents | {"dpo_cpo_loss_type": loss}, known)
            for loss in ("sigmoid", "hinge", "ipo", "dpop")
        }

        assert works == {"sigmoid": False, "hinge": False, "ipo": False, "dpop": True}

    def test_an_option_for_which_another_has_to_be_on_has_no_effect_without_it(self) -> None:
        known = fields()
        contents = document.contents_of(FILE, known.values())

        assert not has_effect(known["qat_bits"], contents, known)
        assert has_effect(known["qat_bits"], contents | {"qat_enable": True}, known)

    @pytest.mark.parametrize(
        ("key", "content", "complaint"),
        [
            ("beta", "-1", "beta is -1 in the form, but must be a number > 0."),
            ("beta", "much", "beta is 'much' in the form, but must be a number > 0."),
            ("batch_size", "1.5", "batch_size is 1.5 in the form, but must be a whole number >= 1."),
            ("lora_parameters.rank", "0", "lora_parameters.rank is 0 in the form, but must be a whole number >= 1."),
            ("test_batches", "0", "test_batches is 0 in the form, but must be a whole number >= 1, or -1 for all."),
        ],
    )
    def test_a_mistake_is_told_as_on_the_command_line(self, key: str, content: str, complaint: str) -> None:
        assert fields()[key].error_of(content) == complaint

    @pytest.mark.parametrize(("key", "content"), [("beta", ""), ("beta", "0.1"), ("iters", ""), ("qat_enable", True)])
    def test_what_is_right_or_left_empty_is_no_mistake(self, key: str, content: Content) -> None:
        assert fields()[key].error_of(content) == ""


def distance(chosen_logps: mx.array, rejected_logps: mx.array, slope_of_mine: float) -> mx.array:
    return slope_of_mine * mx.abs(chosen_logps - rejected_logps)


class TestForeignLoss:
    @pytest.fixture(autouse=True)
    def registered(self) -> Iterator[None]:
        class Stranger:
            @hookimpl
            def register_loss_types(self) -> list[LossType]:
                slope = Option("slope_of_mine", float, 2.0, "How steep.", above=0)
                return [
                    LossType("mine", "Mine", lambda c, r, slope_of_mine: mx.abs(c - r), "|c - r|", options=(slope,))
                ]

        plugin = Stranger()
        get_plugin_manager().register(plugin)
        yield
        get_plugin_manager().unregister(plugin)

    def test_its_name_and_its_option_appear_in_the_form(self) -> None:
        known = fields()

        assert ("Mine", "mine") in known["dpo_cpo_loss_type"].choices
        assert known["slope_of_mine"].block == PREFERENCE
        assert known["slope_of_mine"].error_of("0").startswith("slope_of_mine is 0 in the form")

    def test_a_file_of_the_form_resolves_to_it(self) -> None:
        text = changed(FILE, dpo_cpo_loss_type="mine", slope_of_mine="3.5")

        assert document.resolved(text).settings.loss_options == {"slope_of_mine": 3.5}


class TestDocument:
    def test_opening_and_saving_without_a_change_leaves_every_byte(self) -> None:
        assert changed(FILE) == FILE

    def test_a_change_leaves_comments_order_and_keys_without_a_field(self) -> None:
        assert changed(FILE, beta="0.1") == FILE.replace("0.05 ", "0.1  ", 1)

    def test_an_emptied_control_takes_its_key_out(self) -> None:
        assert "learning_rate" not in changed(FILE, learning_rate="")
        assert "lora_parameters" not in changed(FILE, lora_parameters__rank="")

    def test_a_number_is_written_as_it_was_typed(self) -> None:
        assert "learning_rate: 2e-5\n" in changed(FILE, learning_rate="2e-5")

    def test_what_is_at_its_default_is_not_written(self) -> None:
        keys = yaml.safe_load(changed(document.new_document())).keys()

        assert set(keys) == {"train", "train_mode"}

    @given(
        beta=st.floats(1e-6, 10).map(str),
        rank=st.integers(1, 64).map(str),
        batch_size=st.integers(1, 9).map(str),
        loss=st.sampled_from(["sigmoid", "hinge", "ipo", "dpop"]),
        qat=st.booleans(),
        name=st.text("abcé ~#:{}[]'\"-0123", min_size=1).map(str.strip).filter(bool),
    )
    def test_a_run_of_the_file_has_what_the_controls_hold(
        self, beta: str, rank: str, batch_size: str, loss: str, qat: bool, name: str
    ) -> None:
        text = changed(
            FILE,
            beta=beta,
            lora_parameters__rank=rank,
            batch_size=batch_size,
            dpo_cpo_loss_type=loss,
            qat_enable=qat,
            model=name,
        )

        run = resolve({}, parse_settings(text, "x.yaml")).settings
        assert run.beta == float(beta)
        assert run.lora_parameters["rank"] == int(rank)
        assert (run.batch_size, run.dpo_cpo_loss_type) == (int(batch_size), loss)
        assert (run.qat_enable, run.model) == (qat, os.path.expanduser(name))
        assert document.contents_of(text, form_fields())["model"] == name

    @given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.sampled_from(LIKE_OTHER_YAML))
    def test_text_of_a_control_is_the_same_text_in_a_run(self, text: str) -> None:
        data = [{"path": text, "train_split": text}]
        contents = {"run_name": text, "hf_dataset": dump_settings(data, flow=True)}

        written = document.with_contents(document.new_document(), contents, form_fields())

        for read in (parse_settings(written, "x.yaml").values, yaml.safe_load(written)):
            assert read.get("run_name") == (text.strip() or None)
            assert read["hf_dataset"] == data

    @pytest.mark.parametrize("content", ["5e-6", "1_000.5", "+.5", "1e2", "1_0e1_0", "12:30", "08.5"])
    def test_a_number_of_a_control_is_the_same_number_in_a_run(self, content: str) -> None:
        written = changed(document.new_document(), learning_rate=content)

        assert parse_settings(written, "x.yaml").values["learning_rate"] == parse_value(content)

    @pytest.mark.parametrize("value", ["no", "yes", "12:30", "010", "0o17", "1_000"])
    def test_what_the_file_leaves_unquoted_stays_as_it_is(self, value: str) -> None:
        text = FILE + f"fuse: {value}\n"

        assert changed(text) == text

    def test_what_the_chosen_loss_does_not_read_is_taken_out(self) -> None:
        text = changed(FILE, dpo_cpo_loss_type="dpop", delta="9")

        assert "delta: 9" in text
        assert "delta" not in changed(text, dpo_cpo_loss_type="hinge")
        assert "simpo_gamma: 2" in changed(FILE, preset="simpo", dpo_cpo_loss_type="simpo", simpo_gamma="2")

    def test_of_the_quantisations_the_one_that_is_picked_is_in_the_file(self) -> None:
        text = changed(FILE + "load_in_4bits: false\nload_in_8bits: true\n")

        assert document.contents_of(text, form_fields())["quantisation"] == "load_in_8bits"
        assert yaml.safe_load(changed(text, quantisation="load_in_4bits"))["load_in_4bits"] is True
        assert "load_in_8bits" not in changed(text, quantisation="load_in_4bits")
        assert "load_in" not in changed(text, quantisation="")

    def test_the_loss_of_the_form_is_that_of_the_run_with_a_preset_too(self) -> None:
        text = FILE + "preset: simpo\n"

        assert document.contents_of(text, form_fields())["dpo_cpo_loss_type"] == "simpo"
        assert changed(text) == text
        for contents in ({"preset": ""}, {"preset": "dpop", "dpo_cpo_loss_type": "dpop"}):
            edited = changed(text, **contents)
            assert (
                document.resolved(edited).settings.dpo_cpo_loss_type
                == document.contents_of(edited, form_fields())["dpo_cpo_loss_type"]
                == contents.get("dpo_cpo_loss_type", "simpo")
            )

    def test_a_file_for_another_train_mode_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "sft.yaml"
        file.write_text("train_mode: sft\n")

        with refused(ConfigError, key="train_mode", place=f"in {file}, line 1", allowed="cpo"):
            document.read_document(file)

    def test_a_file_that_only_tests_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "test.yaml"
        for line in ("train: false", "train: null", ""):
            file.write_text(f"train_mode: cpo\ntest: true\n{line}\n")

            with refused(ConfigError, key="train", place=f"in {file}, line 2", allowed="true"):
                document.read_document(file)

    @pytest.mark.parametrize(
        ("line", "key"),
        [("fuse: 0", "fuse"), ("load_best: 'no'", "load_best"), ("optimizer: adamm", "optimizer")],
    )
    def test_a_file_with_what_no_control_can_hold_is_refused(self, line: str, key: str, tmp_path: Path) -> None:
        file = tmp_path / "odd.yaml"
        file.write_text(f"train_mode: cpo\n{line}\n")

        with pytest.raises(ConfigError, match=f"^{key} is .* in {file}, line 2, but must be"):
            document.read_document(file)

    @pytest.mark.parametrize(
        ("line", "chosen"),
        [("optimizer: AdamW", "adamw"), ("train_type: LoRA", "lora"), ("dpo_cpo_loss_type: Sigmoid", "sigmoid")],
    )
    def test_a_choice_in_another_spelling_is_that_choice_and_stays_as_it_is_written(
        self, line: str, chosen: str, tmp_path: Path
    ) -> None:
        file = tmp_path / "spelled.yaml"
        file.write_text(f"train: true\ntrain_mode: cpo\n{line}\n")
        text = document.read_document(file)

        key = line.partition(":")[0]
        assert document.contents_of(text, form_fields())[key] == chosen
        assert chosen in [value for _, value in fields()[key].choices]
        assert line in changed(text, beta="0.2")

    @pytest.mark.parametrize(
        ("cleared", "gone"),
        [
            ({"beta": ""}, "beta: 0.3  # of the first run"),
            ({"lora_parameters__scale": ""}, "scale: 4"),
            ({"report_to": ""}, "report_to: [wandb]"),
            ({"quantisation": ""}, "load_in_4bits: true  # fits"),
            ({"quantisation": "load_in_8bits"}, "load_in_4bits: true  # fits"),
            ({"iters": ""}, "iters: 5"),
        ],
    )
    def test_what_is_cleared_takes_no_comment_of_others_along(self, cleared: dict[str, str], gone: str) -> None:
        text = (
            "train: true\ntrain_mode: cpo\nbeta: 0.3  # of the first run\n\n# the rows of today\ndata: d\n"
            "lora_parameters:\n  rank: 8\n  scale: 4\n  # behind the scale\nreport_to: [wandb]\n# behind the trackers\n"
            "load_in_4bits: true  # fits\n# behind the bits\niters: 5\n# the end\n"
        )

        edited = changed(text, **cleared)

        assert gone in text
        assert gone not in edited
        comments = [line.strip() for line in text.splitlines() if line.strip().startswith("#")]
        assert [line.strip() for line in edited.splitlines() if line.strip().startswith("#")] == comments

    def test_behind_a_mapping_too_the_comment_stays_once(self) -> None:
        text = (
            "train: true\ntrain_mode: cpo\nlora_parameters:\n  rank: 8  # small\n  # behind it\niters: 5\n# the end\n"
        )

        edited = changed(text, iters="")

        assert parse_settings(edited, "").values["lora_parameters"] == {"rank": 8}
        assert "iters" not in edited
        assert [edited.count(words) for words in ("# small", "# behind", "# the end")] == [1, 1, 1]

    def test_a_file_that_the_form_writes_otherwise_is_not_edited(self) -> None:
        text = "train: true\ntrain_mode: cpo\ndata:      d\nlora_parameters: { rank: 8 }\niters: ~\n"

        written = changed(text)

        assert written != text
        assert not document.is_edited(written, text)
        assert document.is_edited(changed(text, beta="0.2"), text)

    def test_a_saved_file_keeps_its_permissions_and_a_new_one_is_its_owners(self, tmp_path: Path) -> None:
        (tmp_path / "old.yaml").write_text("")
        (tmp_path / "old.yaml").chmod(0o640)

        before = os.umask(0o077)
        try:
            for name in ("old.yaml", "new.yaml"):
                document.save_document(FILE, tmp_path / name)
        finally:
            os.umask(before)

        modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("old.yaml", "new.yaml")]
        assert modes == [0o640, 0o600]

    @pytest.mark.parametrize("line_break", [b"\n", b"\r\n"])
    def test_a_saved_file_keeps_its_line_breaks(self, line_break: bytes, tmp_path: Path) -> None:
        file = tmp_path / "my.yaml"
        file.write_bytes(FILE.encode().replace(b"\n", line_break))

        document.save_document(changed(document.read_document(file), beta="0.3"), file)

        written = file.read_bytes()
        assert b"beta: 0.3" in written
        assert written.count(line_break) == written.count(b"\n") == len(written.splitlines())

    @pytest.mark.parametrize(
        "name", ["../x.yaml", "/etc/x.yaml", "a/../../x.yaml", "x.txt", "", "\0.yaml", "~/x.yaml", "a" * 300 + ".yaml"]
    )
    def test_files_elsewhere_and_of_other_kinds_are_refused(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError):
            document.path_in(tmp_path, name)

    def test_a_link_that_leads_elsewhere_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "root").mkdir()
        (tmp_path / "root" / "link").symlink_to(tmp_path)

        with refused(ConfigError, "lies outside", allowed=str(tmp_path / "root")):
            document.path_in(tmp_path / "root", "link/x.yaml")
