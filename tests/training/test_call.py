"""Calls of train_cpo and evaluate_cpo, as scripts that know mlx-lm-lora make them."""

from __future__ import annotations

import inspect
import json
import re
import sys
from dataclasses import MISSING, fields, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
import pandas
import pytest
from datasets import Dataset
from mlx_lm_lora.trainer import cpo_trainer, datasets, dpo_trainer, sft_trainer
from support.data_tokenizers import tokenizer_named
from support.refusals import refused
from support.tiny import add_adapter, assert_same, build_model, build_pairs, parameters, preference_rows

import mlx_cpo_plugin
from mlx_cpo_plugin.data import PreferencePair
from mlx_cpo_plugin.errors import ConfigError, DataError
from mlx_cpo_plugin.plugins import loss_types
from mlx_cpo_plugin.training import objective
from mlx_cpo_plugin.training.call import caller_seed, pairs_of, training_arguments
from mlx_cpo_plugin.training.trainer import CPOTrainingArgs, evaluate_cpo, train_cpo
from mlx_cpo_plugin.types import LossType

mlx_cpo_plugin.activate()

HOST = {"train_cpo": cpo_trainer._host_train_cpo, "evaluate_cpo": cpo_trainer._host_evaluate_cpo}
OURS = {"train_cpo": train_cpo, "evaluate_cpo": evaluate_cpo}
# As mlx-lm-lora 5.8.6 and 5.10.2 have them: parameter -> default; callables and instances only have to be optional.
PARAMETERS: dict[str, dict[str, Any]] = {
    "train_cpo": {
        "model": MISSING,
        "optimizer": MISSING,
        "train_dataset": MISSING,
        "val_dataset": None,
        "args": CPOTrainingArgs,
        "loss_fn": cpo_trainer.cpo_loss,
        "training_callback": None,
    },
    "evaluate_cpo": {
        **dict.fromkeys(("model", "dataset", "batch_size", "num_batches", "beta", "delta"), MISSING),
        **dict.fromkeys(("max_seq_length", "loss_type"), MISSING),
        "loss_fn": cpo_trainer.cpo_loss,
    },
}


def evaluate(model: Any, data: Any, loss_type: str = "sigmoid", **more: Any) -> tuple[Any, ...]:
    return evaluate_cpo(
        model, data, batch_size=2, num_batches=-1, beta=0.1, delta=5.0, max_seq_length=64, loss_type=loss_type, **more
    )


@pytest.mark.parametrize("name", sorted(OURS))
def test_the_parameters_of_the_host_come_first_in_its_order_and_the_others_are_optional(name: str) -> None:
    host, ours = (inspect.signature(of[name]).parameters for of in (HOST, OURS))
    expected = PARAMETERS[name]

    assert list(host) == list(expected)
    assert list(ours)[: len(host)] == list(host)
    for parameter in ours.values():
        needed = expected.get(parameter.name) is MISSING
        assert (parameter.default is inspect.Parameter.empty) is needed, parameter.name
        if parameter.name in expected and expected[parameter.name] is None:
            assert parameter.default is None


def test_the_arguments_have_all_of_the_hosts_with_its_defaults() -> None:
    ours = {field.name: field.default for field in fields(CPOTrainingArgs)}

    for field in fields(dpo_trainer.DPOTrainingArgs):
        assert ours[field.name] == field.default, field.name


def test_the_hosts_own_arguments_train_as_the_plugins(tmp_path: Path) -> None:
    settings = {"batch_size": 2, "iters": 3, "beta": 0.3, "loss_type": "dpop", "delta": 2.0, "seed": 0}
    adapters = {}
    for name, kind in (("ours", CPOTrainingArgs), ("host", dpo_trainer.DPOTrainingArgs), ("any", SimpleNamespace)):
        given = {key: value for key, value in settings.items() if key != "seed" or name == "ours"}
        args = kind(**given, adapter_file=str(tmp_path / name / "adapters.safetensors"))
        model = add_adapter(build_model())
        np.random.seed(0)
        train_cpo(model, optimizers.SGD(learning_rate=0.1), build_pairs(6), None, args)
        adapters[name] = parameters(model)

    assert_same(adapters["host"], adapters["ours"])
    assert_same(adapters["any"], adapters["ours"])


def test_arguments_of_another_trainer_are_told_what_is_wrong_with_them() -> None:
    with refused(ConfigError, key="loss_type"):
        train_cpo(
            add_adapter(build_model()),
            optimizers.SGD(learning_rate=0.1),
            build_pairs(2),
            [],
            sft_trainer.SFTTrainingArgs(),
        )


@pytest.mark.parametrize("args", [{"iters": 1}, False, object()])
def test_arguments_without_any_name_that_is_known_are_refused(args: Any) -> None:
    with refused(ConfigError, key="args", place="in the call"):
        train_cpo(add_adapter(build_model()), optimizers.SGD(learning_rate=0.1), build_pairs(2), args=args)


@pytest.mark.parametrize(
    ("loss_type", "options", "key"),
    [
        ("simpo", {"simpo_gama": 3.0}, "simpo_gama"),
        ("sigmoid", {"nope": 1}, "nope"),
        ("sigmoid", {"simpo_gamma": 1.0}, "simpo_gamma"),
        ("hinge", {"label_smoothing": 0.1}, "label_smoothing"),
        ("mine", {"mine_k": 1}, "loss_type"),
        ("sigmoid", ["simpo_gamma"], "loss_options"),
    ],
)
def test_options_that_the_loss_does_not_use_are_refused(loss_type: str, options: Any, key: str) -> None:
    args = CPOTrainingArgs(loss_type=loss_type, loss_options=options)
    with refused(ConfigError, key=key):
        train_cpo(add_adapter(build_model()), optimizers.SGD(learning_rate=0.1), build_pairs(2), args=args)
    with refused(ConfigError, key=key):
        evaluate_cpo(build_model(), build_pairs(2), 1, 1, 0.1, 50.0, 64, loss_type, loss_options=options)


def test_an_adapter_file_that_would_get_another_name_is_refused_before_training() -> None:
    with refused(ConfigError, "a name that ends in .safetensors", key="adapter_file"):
        training_arguments(CPOTrainingArgs(adapter_file="adapters/mine"))


def test_without_an_adapter_file_the_default_one_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    train_cpo(
        add_adapter(build_model()),
        optimizers.SGD(learning_rate=0.1),
        build_pairs(2),
        args=CPOTrainingArgs(iters=1, adapter_file=None),  # type: ignore[arg-type]
    )

    assert (tmp_path / "adapters.safetensors").is_file()


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "dpop"])
def test_the_hosts_loss_function_gives_the_losses_and_gradients_of_the_loss_of_that_name(
    loss_type: str, tmp_path: Path
) -> None:
    pairs, adapters, losses = build_pairs(5), [], []
    for number, loss_fn in enumerate([None, cpo_trainer.cpo_loss]):
        model = add_adapter(build_model())
        args = CPOTrainingArgs(
            loss_type=loss_type,
            delta=5.0,
            batch_size=4,
            iters=2,
            adapter_file=str(tmp_path / f"{number}/adapters.safetensors"),
        )
        losses.append(evaluate(model, pairs, loss_type, loss_fn=loss_fn)[0])
        train_cpo(model, optimizers.SGD(learning_rate=0.05), pairs, None, args, loss_fn)
        adapters.append(parameters(model))

    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert_same(adapters[1], adapters[0], tolerance=1e-5)


@pytest.mark.parametrize("scoring", ["shared", "plain"])
def test_a_loss_with_the_hosts_parameters_counts_scored_tokens_by_its_masks(scoring: str) -> None:
    def by_masks(
        policy_chosen_score: Any, policy_rejected_score: Any, chosen_masks: Any, rejected_masks: Any, **_: Any
    ) -> tuple[mx.array, ...]:
        chosen, rejected = (masks[:, 1:].sum(-1) for masks in (chosen_masks, rejected_masks))
        return mx.mean(3 * chosen + 5 * rejected), mx.zeros(2), chosen.sum(), {}

    pairs = build_pairs(5)
    expected = np.mean([3 * pair.chosen_scored.sum() + 5 * pair.rejected_scored.sum() for pair in pairs])

    assert evaluate(build_model(), pairs, "one of my own", loss_fn=by_masks, scoring=scoring)[0] == pytest.approx(
        expected
    )


@pytest.mark.parametrize(
    ("result", "found"),
    [
        (lambda losses: losses.mean(), "an array of shape []"),
        (lambda losses: losses[:, None], "an array of shape [2, 1]"),
        (lambda losses: mx.concatenate([losses, losses]), "an array of shape [4]"),
        (lambda losses: losses.mean().item(), "float"),
        (lambda losses: (losses, {}), "tuple"),
        (lambda losses: np.array(losses), "ndarray"),
        (lambda losses: None, "NoneType"),
        (lambda losses: losses > 0, "an array of mlx.core.bool"),
        (lambda losses: losses.astype(mx.int32), "an array of mlx.core.int32"),
        (lambda losses: losses.astype(mx.complex64), "an array of mlx.core.complex64"),
    ],
)
def test_a_loss_that_is_not_one_number_a_pair_is_told_what_to_return(result: Any, found: str) -> None:
    def mine(chosen_logps: mx.array, rejected_logps: mx.array) -> Any:
        with mx.stream(mx.cpu):
            return result(mx.stop_gradient(rejected_logps - chosen_logps))

    told = re.escape(f"returns {found} for 2 pairs")
    ends = re.escape("must return the loss of each pair, not their mean, as an mlx.core.array of floats of shape [2].")
    with pytest.raises(ConfigError, match=f"mine .*{told}.*{ends}$"):
        evaluate(build_model(), build_pairs(4), loss_fn=mine)


def of_one_argument(logps: mx.array) -> mx.array:
    return logps


def of_one_more(chosen_logps: mx.array, rejected_logps: mx.array, margin: float) -> mx.array:
    return rejected_logps - chosen_logps + margin


def by_one_mask(policy_chosen_score: mx.array, **options: Any) -> mx.array:
    return policy_chosen_score.mean()


def by_masks_and_more(margin: float, policy_chosen_score: mx.array, **options: Any) -> mx.array:
    return policy_chosen_score.mean() + margin


@pytest.mark.parametrize("loss", ["sigmoid", 7, of_one_argument, of_one_more, by_masks_and_more])
def test_what_cannot_be_called_as_a_loss_is_refused_before_training(loss: Any) -> None:
    with refused(ConfigError, key="loss_fn"):
        evaluate(build_model(), build_pairs(4), loss_fn=loss)


@pytest.mark.parametrize("loss", [mx.logaddexp, by_one_mask])
def test_functions_that_do_not_tell_all_their_parameters_are_losses(loss: Any) -> None:
    assert np.isfinite(evaluate(build_model(), build_pairs(4), loss_fn=loss)[0])


@pytest.mark.parametrize(
    "callback", ["a name", SimpleNamespace(on_train_loss_report=print), SimpleNamespace(on_val_loss_report=print)]
)
def test_a_callback_without_the_methods_of_the_host_is_refused_before_training(callback: Any, tmp_path: Path) -> None:
    args = CPOTrainingArgs(iters=1, adapter_file=str(tmp_path / "made" / "adapters.safetensors"))

    with refused(ConfigError, key="training_callback", place="in the call"):
        train_cpo(add_adapter(build_model()), optimizers.SGD(0.1), build_pairs(4), build_pairs(2), args, None, callback)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("loss_type", ["sigmoid", "mine"])
def test_a_loss_that_returns_a_mean_is_refused_in_training_whether_given_or_registered(
    loss_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mean(chosen_logps: mx.array, rejected_logps: mx.array) -> mx.array:
        return (rejected_logps - chosen_logps).mean()

    monkeypatch.setattr(objective, "loss_types", lambda: {**loss_types(), "mine": LossType("mine", "Mine", mean, "")})
    given = mean if loss_type == "sigmoid" else None
    args = CPOTrainingArgs(iters=1, loss_type=loss_type, adapter_file=str(tmp_path / "adapters.safetensors"))

    with pytest.raises(ConfigError, match=r"mean of .* returns an array of shape \[\] for 2 pairs, but must return"):
        train_cpo(add_adapter(build_model()), optimizers.SGD(learning_rate=0.1), build_pairs(4), None, args, given)
    assert not list(tmp_path.iterdir())


def test_a_loss_whose_shape_depends_on_the_pairs_is_told_in_the_run() -> None:
    def mine(chosen_logps: mx.array, rejected_logps: mx.array) -> mx.array:
        return (rejected_logps - chosen_logps)[:2]

    with pytest.raises(ConfigError, match=r"returns an array of shape \[2\] for 4 pairs"):
        evaluate_cpo(build_model(), build_pairs(4), 4, -1, 0.1, 5.0, 64, "sigmoid", mine, scoring="plain")


@pytest.mark.parametrize("what", ["loss", "rewards"])
def test_a_loss_that_is_not_finite_for_ordinary_log_probs_is_told_so_before_training(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mine(*logps: mx.array, **_: Any) -> mx.array:
        return mx.log(logps[0])

    ours = loss_types()["sigmoid"]
    broken = replace(ours, fn=mine) if what == "loss" else replace(ours, rewards=mine)
    monkeypatch.setattr(objective, "loss_types", lambda: {"sigmoid": broken})

    with pytest.raises(ConfigError, match=r"mine of .* returns \[nan, nan\] for log-probs of -1 and -2, beta 0.1"):
        evaluate(build_model(), build_pairs(3))


@pytest.mark.parametrize("what", ["fn", "rewards"])
def test_a_loss_that_raises_is_named_before_training(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(*_: mx.array, **__: Any) -> mx.array:
        raise KeyError("half done")

    broken = replace(loss_types()["sigmoid"], **{what: mine})
    monkeypatch.setattr(objective, "loss_types", lambda: {"sigmoid": broken})

    with pytest.raises(ConfigError, match=r"mine of .* fails \(KeyError: 'half done'\) for log-probs of -1 and -2"):
        evaluate(build_model(), build_pairs(3))


@pytest.mark.parametrize("result", [0.5, None, (), mx.zeros((1, 2)), (None, mx.zeros(1))])
def test_a_loss_with_the_hosts_parameters_is_told_to_return_a_mean(result: Any) -> None:
    def mine(policy_chosen_score: Any, **_: Any) -> Any:
        return result

    with pytest.raises(ConfigError, match=r"mine .* must return their mean loss, alone or first in a tuple"):
        evaluate(build_model(), build_pairs(3), loss_fn=mine)


@pytest.mark.parametrize("rewards", [lambda logps, **_: logps.mean(), lambda logps, **_: 1.0])
def test_rewards_that_are_not_one_number_an_answer_are_told_so(rewards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = replace(loss_types()["sigmoid"], rewards=rewards)
    monkeypatch.setattr(objective, "loss_types", lambda: {**loss_types(), "sigmoid": mine})

    with pytest.raises(ConfigError, match="must return the reward of each answer as"):
        evaluate(build_model(), build_pairs(3))


@pytest.mark.parametrize("form", [iter, tuple, Dataset.from_list, datasets.CacheDataset])
def test_rows_train_in_whatever_holds_them(form: Any, tmp_path: Path) -> None:
    tokenizer = tokenizer_named("chatml")
    rows, trained = preference_rows(4), []
    for number, data in enumerate([rows, form(rows)]):
        model = add_adapter(build_model(vocab_size=len(tokenizer)))
        args = CPOTrainingArgs(iters=2, batch_size=2, seed=0, adapter_file=str(tmp_path / f"{number}/a.safetensors"))
        train_cpo(model, optimizers.SGD(learning_rate=0.1), data, None, args, tokenizer=tokenizer)
        trained.append(parameters(model))

    assert_same(*trained)


def test_the_number_of_scored_tokens_is_an_array_as_the_hosts() -> None:
    pairs = build_pairs(3)

    assert evaluate(build_model(), pairs)[2].item() == sum(
        int(pair.chosen_scored.sum() + pair.rejected_scored.sum()) for pair in pairs
    )


def test_a_model_that_is_no_module_is_evaluated() -> None:
    model = build_model()

    class Model:
        def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
            return model(tokens)

        def eval(self) -> None:
            """Has no modes."""

    loss, rewards, _, _ = evaluate(Model(), build_pairs(3))
    expected, expected_rewards, _, _ = evaluate(model, build_pairs(3), scoring="plain")

    assert (loss, rewards) == (expected, expected_rewards)


def test_no_validation_is_made_of_no_batches(tmp_path: Path) -> None:
    told: list[Any] = []
    callback = SimpleNamespace(on_train_loss_report=lambda info: None, on_val_loss_report=told.append)
    args = CPOTrainingArgs(iters=2, val_batches=0, adapter_file=str(tmp_path / "adapters.safetensors"))

    train_cpo(
        add_adapter(build_model()),
        optimizers.SGD(learning_rate=0.1),
        build_pairs(4),
        build_pairs(2),
        args,
        training_callback=callback,
    )

    assert told == []


# What callers seed.


def test_the_seed_is_that_of_numpy_as_long_as_nothing_was_drawn() -> None:
    np.random.seed(7)
    mx.random.seed(3)
    mx.random.normal((2,))  # adapters

    assert caller_seed() == 7
    np.random.random()
    assert caller_seed() == 0


def test_the_seed_is_that_of_mlx_where_numpys_has_been_drawn_from() -> None:
    np.random.seed(7)
    np.random.random()
    mx.random.seed(5)

    assert caller_seed() == 5
    assert training_arguments(CPOTrainingArgs(seed=1)).seed == 1


def test_a_seed_of_the_caller_orders_the_rows_and_is_recorded(tmp_path: Path) -> None:
    adapters = {}
    for name, seed, given in (("set", 7, None), ("given", 0, 7), ("other", 8, None)):
        np.random.seed(seed)
        model = add_adapter(build_model())
        file = tmp_path / name / "adapters.safetensors"
        args = CPOTrainingArgs(iters=3, batch_size=2, adapter_file=str(file), seed=given)
        train_cpo(model, optimizers.SGD(learning_rate=0.1), build_pairs(12), None, args)
        adapters[name] = parameters(model)

    assert_same(adapters["set"], adapters["given"])
    with pytest.raises(AssertionError):
        assert_same(adapters["other"], adapters["given"])
    assert "seed: 7\n" in (tmp_path / "set" / "run_settings.yaml").read_text()


# Which data sets are taken.


def test_rows_need_their_tokenizer_and_the_error_says_so() -> None:
    rows = preference_rows(4)

    with refused(DataError, key="tokenizer"):
        evaluate(build_model(), rows)
    tokenizer = tokenizer_named("chatml")
    model = build_model(vocab_size=len(tokenizer.get_vocab()))
    assert evaluate(model, rows, tokenizer=tokenizer)[:2] == evaluate(model, pairs_of(rows, 64, tokenizer))[:2]


@pytest.mark.parametrize(
    "data", [pandas.DataFrame(preference_rows(4)), {"train": preference_rows(4)}, 7, "rows.jsonl", b"rows"]
)
def test_what_holds_no_rows_one_by_one_is_refused(data: Any) -> None:
    with refused(DataError, key="data", allowed="a list of mappings"):
        pairs_of(data, 64, tokenizer_named("chatml"))


def test_a_row_without_answers_is_skipped_among_others() -> None:
    empty = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [], "rejected": []}

    pairs = pairs_of([*preference_rows(3), empty], 64, tokenizer_named("chatml"))

    assert len(pairs) == 3
    assert sum(map(len, pairs.report.skipped.values())) == 1


@pytest.mark.parametrize(("size", "prompt"), [(None, 2), (1, 1), ("1", 1)])
def test_where_a_prompt_of_token_ids_ends_may_be_said(size: Any, prompt: int) -> None:
    sizes = {"chosen_prompt_length": size, "rejected_prompt_length": size}

    (pair,) = pairs_of([{"chosen": [1, 2, 3], "rejected": [1, 2, 4], **sizes}], 64)

    assert int(pair.chosen_scored.sum()) == 3 - prompt


@pytest.mark.parametrize("row", ["row", None, ("Hi", "Yes", "No"), b"row", {"chosen": [1, 2], "rejected": [1, 2.5]}])
def test_an_item_that_is_no_preference_is_told_what_may_stand_there(row: Any) -> None:
    with refused(DataError, "token ids.* or rows of text", key="data", place="item 0"):
        pairs_of([row], 64, tokenizer_named("chatml"))


@pytest.mark.parametrize("token", [-1, 2.5, True, 2**31, 2**70, float("nan")])
def test_what_is_no_token_id_is_refused_with_its_item(token: Any) -> None:
    items = [{"chosen": [1, 2, 3], "rejected": [1, 2, 4]}, {"chosen": [token], "rejected": [1, 2, 4]}]

    with refused(DataError, key="data", place="item 1"):
        pairs_of(items, 64)


def test_a_token_beyond_the_vocabulary_of_the_model_is_refused_with_its_item() -> None:
    model = build_model()
    last = model.args.vocab_size - 1
    items = [{"chosen": [1, 2, 3], "rejected": [1, 2, 4]}, {"chosen": [1, 2, 3], "rejected": [1, 2, last]}]

    assert np.isfinite(evaluate(model, items)[0])
    items[1]["rejected"].append(last + 1)
    with refused(DataError, key="data", place="item 1", allowed=f"0 to {last}"):
        evaluate(model, items)


def test_wrappers_of_the_host_keep_what_is_known_of_their_rows() -> None:
    rows = [*preference_rows(3), {"prompt": "Hi", "chosen": "Same.", "rejected": "Same."}]
    config = SimpleNamespace(train_mode="cpo", max_seq_length=64)
    parts = [datasets.create_dataset(rows, tokenizer_named("chatml"), config) for _ in range(2)]

    pairs = pairs_of(datasets.CacheDataset(datasets.ConcatenatedDataset(parts)), 64)

    assert (pairs.report.rows, len(pairs)) == (8, 6)
    assert [pair.source for pair in pairs] == ["row 1", "row 2", "row 3"] * 2


def test_rows_of_an_unknown_length_are_cut_at_messages_when_the_length_is_known() -> None:
    tokenizer = tokenizer_named("headers")
    question = {"role": "user", "content": "What is the answer? " * 4}
    turns = [question, {"role": "assistant", "content": "No."}] * 3
    rows = [{"prompt": [*turns, question], "chosen": "The answer is: Yes.", "rejected": "The dog is in the fog!"}]

    made = datasets.create_dataset(rows, tokenizer, SimpleNamespace(train_mode="cpo"))
    cut = datasets.create_dataset(rows, tokenizer, SimpleNamespace(train_mode="cpo", max_seq_length=80))

    assert made[0].length > 80 >= cut[0].length
    assert pairs_of(datasets.CacheDataset(made), 80)[0].prompt.tolist() == cut[0].prompt.tolist()
    assert cut[0].prompt[0] == tokenizer.bos_token_id


def test_a_token_that_begins_all_items_stays_first_where_prompts_are_cut() -> None:
    items = [{"chosen": [1, *range(10, 20 + n), 2], "rejected": [1, *range(10, 20), 3]} for n in range(3)]

    assert [pair.prompt[0] for pair in pairs_of(items, 8)] == [1, 1, 1]


@pytest.mark.parametrize("mode", ["dpo", "sft", None])
def test_loaders_give_other_modes_what_the_host_gives(mode: str | None, data_folder: Path) -> None:
    tokenizer = tokenizer_named("chatml")
    config = SimpleNamespace(train_mode=mode, data=str(data_folder), train=True, test=True, text_feature="chosen")
    if mode is None:
        del config.train_mode

    (train, *_), (expected, *_) = (
        datasets.load_dataset(config, tokenizer),
        datasets._host_load_dataset(config, tokenizer),
    )

    assert type(train) is type(expected)
    assert type(train) is (datasets.DPODataset if mode == "dpo" else datasets.TextDataset)
    assert [train[i] for i in range(len(train))] == [expected[i] for i in range(len(expected))]


def test_copies_of_the_loaders_in_the_host_are_the_plugins() -> None:
    from mlx_lm_lora import train, train_judge

    assert train.load_dataset is train_judge.load_dataset is datasets.load_dataset
    assert datasets.load_dataset is not datasets._host_load_dataset


def test_the_hosts_loaders_read_all_splits_and_refuse_what_is_asked_for_and_missing(data_folder: Path) -> None:
    config = SimpleNamespace(train_mode="cpo", data=str(data_folder), train=True, test=True)
    tokenizer = tokenizer_named("chatml")

    assert [len(split) for split in datasets.load_dataset(config, tokenizer)] == [10, 4, 4]
    assert [len(split) for split in datasets.load_local_dataset(data_folder, tokenizer, config)] == [10, 4, 4]
    (data_folder / "test.jsonl").unlink()
    with refused(DataError, key="test"):
        datasets.load_dataset(config, tokenizer)


def test_the_hosts_hub_loader_needs_the_mode_once_and_takes_any_row(data_folder: Path, tmp_path: Path) -> None:
    entry = {
        "path": "json",
        "train_split": "train",
        "valid_split": "train[:2]",
        "config": {"data_files": str(data_folder / "train.jsonl"), "cache_dir": str(tmp_path / "cache")},
    }
    config = SimpleNamespace(train_mode="cpo", hf_dataset=entry, train=True, test=False)

    train, valid, test = datasets.load_dataset(config, tokenizer_named("chatml"))

    assert (len(train), len(valid), len(test)) == (10, 2, 0)
    assert isinstance(train[0], PreferencePair)


class ToolError(Exception):
    """As the SDK has it."""


def tools_of_the_mcp_server(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The functions of the host's MCP server by name, with as much of its SDK as making them takes."""
    tools: dict[str, Any] = {}

    class Server:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def tool(self, **_: Any) -> Any:
            return lambda function: tools.setdefault(function.__name__, function)

        def __getattr__(self, _: str) -> Any:
            return lambda *_, **__: lambda function: function

    kinds = dict.fromkeys(("CallToolResult", "TextContent", "ToolAnnotations"), SimpleNamespace)
    for name, content in {
        "mcp": {},
        "mcp.server": {},
        "mcp.server.mcpserver": {"MCPServer": Server},
        "mcp.server.mcpserver.exceptions": {"ToolError": ToolError},
        "mcp.types": kinds,
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    server = pytest.importorskip("mlx_lm_lora.mcp_server")
    server.create_server()
    return tools


def test_the_mcp_server_inspects_rows_as_they_will_be_read(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspect_dataset = tools_of_the_mcp_server(monkeypatch)["inspect_dataset"]
    answers = [[{"role": "assistant", "content": text}] for text in ("Yes.", "No.")]
    row = {"input": {"messages": [{"role": "user", "content": "Sure?"}]}}
    row |= dict(zip(("preferred_output", "non_preferred_output"), answers, strict=True))
    same = row | {"non_preferred_output": answers[0]}
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (row, row, same)))

    result = inspect_dataset(str(tmp_path), str(model_folder), "cpo")

    assert result.structured_content == {"valid": True, "rows": {"train": 2, "valid": 0, "test": 0}}
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "Hi"}) + "\n")
    with pytest.raises(ToolError, match=r"train\.jsonl has no column for the chosen answer"):
        inspect_dataset(str(tmp_path), str(model_folder), "cpo")
