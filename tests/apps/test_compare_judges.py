"""Reward functions and judges that decide between answers: functions, models of MLX, endpoints."""

from __future__ import annotations

import email.utils
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load

from mlx_cpo_plugin import cli
from mlx_cpo_plugin.comparison.endpoint import Endpoint
from mlx_cpo_plugin.comparison.judge import LocalJudge, judged, prompt_of, verdict_in
from mlx_cpo_plugin.comparison.questions import Question
from mlx_cpo_plugin.comparison.rewards import load_reward, reward_figures, rewards
from mlx_cpo_plugin.comparison.statistics import Measure, figures, wilson
from mlx_cpo_plugin.comparison.table import as_text
from mlx_cpo_plugin.comparison.text_metrics import Answer
from mlx_cpo_plugin.errors import ConfigError, UserError

NAMES = ["base", "cpo", "dpo"]
QUESTIONS = [Question("prompt", f"Question {number}?", f"Question {number}?", [1]) for number in range(8)]


def silent(line: str) -> None:
    """Progress that nobody wants to see."""


def answers(*texts: str) -> list[Answer]:
    return [Answer(text, True) for text in texts]


def shown(prompt: str) -> tuple[str, str]:
    """The two answers in a judge's prompt."""
    first, second = (re.search(rf"<answer_{side}>\n(.*)\n</answer_{side}>", prompt) for side in "ab")
    assert first is not None
    assert second is not None
    return first[1], second[1]


# Both orders


def test_a_judge_that_always_takes_the_first_decides_nothing() -> None:
    found = judged(lambda _: 1.0, "j", NAMES[:2], QUESTIONS, [answers(*"abcdefgh"), answers(*"ABCDEFGH")], silent)

    (compared,) = found["comparisons"]
    assert (compared["wins"], compared["ties"], compared["losses"], compared["outcome"]) == (0, 8, 0, "undecided")
    assert found["best"] == "base"


def test_every_model_is_judged_against_the_base_then_against_the_best() -> None:
    """A judge that prefers the longer answer, in whatever order it sees them."""

    def longer(prompt: str) -> float:
        first, second = map(len, shown(prompt))
        return 0.5 if first == second else float(first > second)

    given = [answers(*["aa"] * 8), answers(*["bbbb"] * 8), answers(*["ccc"] * 6, "d", "ee")]

    found = judged(longer, "j", NAMES, QUESTIONS, given, silent)

    compared = {(one["model"], one["against"]): one for one in found["comparisons"]}
    assert list(compared) == [("cpo", "base"), ("dpo", "base"), ("dpo", "cpo")]
    assert compared["cpo", "base"]["points"] == [1.0] * 8
    assert compared["dpo", "base"]["points"] == [1.0] * 6 + [0.0, 0.5]
    assert compared["dpo", "cpo"]["points"] == [0.0] * 8
    assert [one["outcome"] for one in compared.values()] == ["better", "undecided", "worse"]
    assert compared["dpo", "base"]["win_rate"] == 6.5 / 8
    assert compared["dpo", "base"]["win_rate_low"] == wilson(6.5, 8)[0]
    assert found["best"] == "cpo"


def test_equal_answers_tie_unasked() -> None:
    def asked(prompt: str) -> float:
        raise AssertionError(prompt)

    found = judged(asked, "j", NAMES[:2], QUESTIONS, [answers(*["same"] * 8)] * 2, silent)

    assert found["comparisons"][0]["ties"] == 8


def test_replies_that_name_no_answer_are_ties_and_counted() -> None:
    replies = iter([1.0, 0.0, None, 0.0] + [1.0, 0.0] * 6)

    found = judged(
        lambda _: next(replies), "j", NAMES[:2], QUESTIONS, [answers(*"abcdefgh"), answers(*"ABCDEFGH")], silent
    )

    (compared,) = found["comparisons"]
    assert (compared["wins"], compared["ties"], compared["unclear"]) == (7, 1, 1)


def test_a_judge_that_never_names_an_answer_is_given_up() -> None:
    given = [answers(*"abcdefgh"), answers(*"ABCDEFGH")]

    with pytest.raises(UserError, match="named no answer in 10 replies"):
        judged(lambda _: None, "j", NAMES[:2], QUESTIONS, given, silent)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        *(("A", 1.0), ("b", 0.0), ("**B**", 0.0), ("(A).", 1.0), ("T", 0.5), ("Tie", 0.5), ("A\n\nIt is clear.", 1.0)),
        *(("B\n\nAnswer A is vague, B is right.", 0.0), ("A\nBecause B is wrong.", 1.0)),
        *(("Answer: B", 0.0), ("I think that B is better.", 0.0), ("It is a tie.", 0.5)),
        *(("<think>A or B? A.</think>\nB", 0.0), ("B, since A is wrong", 0.0)),
        *(("A is better than B", None), ("", None), ("Both are good.", None), ("I cannot say.", None)),
    ],
)
def test_a_reply_is_read_after_its_thoughts_and_not_guessed(reply: str, verdict: float | None) -> None:
    assert verdict_in(reply) == verdict


# Models of MLX


def test_a_local_judge_takes_the_likelier_letter(model_folder: Path) -> None:
    model, tokenizer = load(str(model_folder))
    judge = LocalJudge(str(model_folder), silent)
    for prompt in (prompt_of("Hi!", "Hello.", "No."), prompt_of("Why?", "Because.", "I do not know.")):
        tokens = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        logits = np.array(model(mx.array(tokens)[None])[0, -1].astype(mx.float32), np.float64)
        # The tokenizer of the fixture has no token for a letter with a space in front.
        first, second = (logits[tokenizer.encode(letter, add_special_tokens=False)[-1]] for letter in "AB")

        assert judge(prompt) == float(first > second)


# Endpoints


class Reply(NamedTuple):
    """What the fake endpoint does with one request: status, headers, body; no status: it hangs up."""

    status: int | None
    body: Any = None
    headers: dict[str, str] = {}  # noqa: RUF012 - never changed


class Fake(NamedTuple):
    """A loopback server that gives the replies it is told, one a request, and keeps what it was sent."""

    url: str
    replies: list[Reply]
    requests: list[dict[str, Any]]


def completion(text: str) -> Reply:
    return Reply(200, {"choices": [{"message": {"role": "assistant", "content": text}}]})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    replies: list[Reply] = []
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({"path": self.path, "key": self.headers["Authorization"], **body})
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
            if reply.status is None:
                return
            content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(content)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield Fake(f"http://127.0.0.1:{server.server_port}/v1", replies, requests)
    server.shutdown()
    thread.join()
    server.server_close()


def endpoint(fake: Fake, *replies: Reply, key: str | None = None) -> tuple[Endpoint, list[float]]:
    """An endpoint that notes how long it waits in place of waiting."""
    waits: list[float] = []
    fake.replies[:] = replies
    return Endpoint(fake.url, "judge-1", key, timeout=5.0, wait=waits.append), waits


def test_an_endpoint_is_asked_as_openais_is(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret\n")
    judge, waits = endpoint(fake, completion("B"), key="MY_KEY")

    assert judge("Which?") == 0.0

    assert fake.requests == [
        {
            "path": "/v1/chat/completions",
            "key": "Bearer secret",
            "model": "judge-1",
            "messages": [{"role": "user", "content": "Which?"}],
            "temperature": 0,
        }
    ]
    assert waits == []


def test_no_key_is_sent_that_was_not_named(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    judge, _ = endpoint(fake, completion("A"))

    judge("Which?")

    assert fake.requests[0]["key"] is None


@pytest.mark.parametrize(
    ("fault", "seconds"),
    [
        (Reply(429, {}, {"Retry-After": "7"}), 7.0),
        (Reply(429, {}), 1.0),
        (Reply(503, b"<html>", {"Retry-After": "soon"}), 1.0),
        (Reply(None), 1.0),
        (Reply(200, b"<html>Welcome</html>"), 1.0),
        (Reply(200, {"choices": []}), 1.0),
        (Reply(200, {"choices": [{"message": {"content": None}}]}), 1.0),
        (Reply(200, b"{", {"Content-Length": "100"}), 1.0),
        (Reply(400, {"error": {"message": "Unsupported value: 'temperature'"}}), 0.0),
    ],
)
def test_what_may_pass_is_tried_again_after_the_time_that_is_asked_for(
    fake: Fake, fault: Reply, seconds: float
) -> None:
    judge, waits = endpoint(fake, fault, completion("A"))

    assert judge("Which?") == 1.0
    assert waits == [seconds]
    assert len(fake.requests) == 2


def test_a_time_to_wait_may_be_a_date(fake: Fake) -> None:
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    judge, waits = endpoint(fake, Reply(429, {}, {"Retry-After": date}), completion("A"))

    judge("Which?")

    assert 25 < waits[0] <= 30


def test_models_that_take_no_temperature_are_not_asked_again_with_one(fake: Fake) -> None:
    judge, _ = endpoint(fake, Reply(400, {"error": "temperature"}), completion("A"))

    judge("Which?")
    judge("Which?")

    assert ["temperature" in sent for sent in fake.requests] == [True, False, False]


@pytest.mark.parametrize(
    ("reply", "requests", "sentence"),
    [
        (Reply(401, {}), 1, r"it refuses the key in MY_KEY \(401\); name the variable of a valid key by --judge-key"),
        (Reply(404, {}), 1, r"it knows no such path or model \(404\); check the URL and --judge-model"),
        (Reply(302, {}, {"Location": "http://127.0.0.1:9/"}), 1, r"it redirects to another address \(302\)"),
        (Reply(422, {}), 1, "it says 422"),
        (Reply(429, {}, {"Retry-After": "3600"}), 1, "it says 429; try again later"),
        (Reply(500, {}), 4, "it says 500; try again later"),
        (Reply(None), 4, "try again later"),
        (Reply(200, b"\x00<html>"), 4, r"its reply is no chat completion but '\\x00<html>'"),
    ],
)
def test_what_does_not_pass_is_one_sentence_without_the_key(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, reply: Reply, requests: int, sentence: str
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    judge, _ = endpoint(fake, reply, key="MY_KEY")

    with pytest.raises(UserError, match=sentence) as error:
        judge("Which?")

    assert len(fake.requests) == requests
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_an_endpoint_that_never_answers_is_given_up_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[float | None] = []
    settimeout = socket.socket.settimeout
    monkeypatch.setattr(
        socket.socket, "settimeout", lambda self, value: (allowed.append(value), settimeout(self, 0.05))[1]
    )
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, and says nothing
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        judge = Endpoint(url, "judge-1", timeout=30.0, wait=lambda _: None)

        with pytest.raises(UserError, match="no answer within 30 seconds"):
            judge("Which?")

    assert set(allowed) == {30.0}


def test_a_port_that_nobody_listens_at_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    judge = Endpoint(f"http://127.0.0.1:{port}/v1", "judge-1", wait=pytest.fail)

    with pytest.raises(UserError, match="nobody listens there"):
        judge("Which?")


@pytest.mark.parametrize(
    ("url", "sent_to"),
    [
        ("http://h:1/v1/", "http://h:1/v1/chat/completions"),
        ("https://h/v1/chat/completions", "https://h/v1/chat/completions"),
        ("http://h", "http://h/chat/completions"),
    ],
)
def test_the_path_of_chat_completions_is_added_where_it_is_missing(url: str, sent_to: str) -> None:
    assert Endpoint(url, "m").url == sent_to


@pytest.mark.parametrize("url", ["localhost:1234", "ftp://h/v1", "http://", "http://user:secret@h/v1"])
def test_what_is_no_endpoint_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is no endpoint"):
        Endpoint(url, "m")


@pytest.mark.parametrize(("value", "reason"), [("", "not set"), ("geheim\u00fc", "unusable")])
def test_a_key_that_cannot_be_sent_is_refused(monkeypatch: pytest.MonkeyPatch, value: str, reason: str) -> None:
    monkeypatch.setenv("MY_KEY", value)

    with pytest.raises(ConfigError, match=f"it is {reason}") as error:
        Endpoint("http://h", "m", "MY_KEY")

    assert "geheim" not in str(error.value)


# Reward functions


def test_a_reward_function_gets_what_mlx_lm_lora_gives_it(tmp_path: Path) -> None:
    file = tmp_path / "my_rewards.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Scale:\n    by: float = 1.0\n"
        "OFFSET = 10\nseen = []\n"
        "def reward(prompts, completions, answer, types=None):\n"
        "    seen.append((prompts, completions, answer, types))\n"
        "    return [None if not text else OFFSET + len(text) for text in completions]\n"
    )
    questions = [Question("test.jsonl:1", "<|x|>Hi", "Hi", [1], "Hello.", "No."), QUESTIONS[0]]
    reward = load_reward(f"{file}:reward")

    values = rewards("reward", reward, questions, answers("four", ""))

    np.testing.assert_array_equal(values, [14.0, np.nan])
    assert reward.__globals__["seen"] == [(["Hi", "Question 0?"], ["four", ""], ["Hello.", ""], [None, None])]


def test_what_a_reward_function_prints_is_not_among_the_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "f.py").write_text("print('loaded')\ndef f(**_):\n    print('asked')\n    return [1]\n")

    rewards("f", load_reward(f"{tmp_path / 'f.py'}:f"), QUESTIONS[:1], answers("a"))

    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "loaded\nasked\n")


def test_reward_functions_of_mlx_lm_lora_and_of_modules_in_this_folder_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rewards_of_this_folder.py").write_text(
        "def one(prompts, completions, answer, types=None): return [1]\n"
    )
    monkeypatch.chdir(tmp_path)
    tagged = "<think>\n1\n</think>\n<answer>\n2\n</answer>"

    assert rewards("x", load_reward("rewards_of_this_folder:one"), QUESTIONS[:1], answers("a")) == [1.0]
    hosts = load_reward("mlx_lm_lora.trainer.grpo_reward_functions:r1_int_reward_func")
    assert rewards("x", hosts, QUESTIONS[:2], answers(tagged, "2 apples")).tolist() == [0.5, 0.0]


@pytest.mark.parametrize(
    ("source", "entry", "sentence"),
    [
        ("", "reward", "names no function; write MODULE:FUNCTION"),
        ("", "no_such_module:f", r"cannot be imported \(ModuleNotFoundError"),
        ("", "{file}:f", r"cannot be imported \(AttributeError"),
        ("raise KeyError('x')", "{file}:f", r"cannot be imported \(KeyError"),
        ("f = 3", "{file}:f", "is no function"),
        ("def f(): pass", "{file}:f", r"failed \(TypeError"),
        ("def f(**_): return ['good']", "{file}:f", r"failed \(ValueError"),
        ("def f(**_): return None", "{file}:f", r"failed \(TypeError"),
        ("def f(**_): return [1, 2]", "{file}:f", "returned 2 numbers for 1 answer;"),
        ("def f(**_): return {0: 0.5}", "{file}:f", r"failed \(TypeError: it returned a dict"),
        ("def f(**_): return '7'", "{file}:f", r"failed \(TypeError: it returned a str"),
        ("def f(**_): return [float('-inf')]", "{file}:f", "returned -inf, of which there is no mean"),
        ("raise SystemExit(0)", "{file}:f", r"cannot be imported \(SystemExit"),
        ("def f(**_): raise SystemExit(0)", "{file}:f", r"failed \(SystemExit"),
    ],
)
def test_a_reward_function_that_is_none_is_one_sentence(tmp_path: Path, source: str, entry: str, sentence: str) -> None:
    (tmp_path / "f.py").write_text(source)

    with pytest.raises(UserError, match=sentence):
        rewards("f", load_reward(entry.format(file=tmp_path / "f.py")), QUESTIONS[:1], answers("a"))


@pytest.mark.parametrize(("kept", "count"), [(0, None), (1, 1)])
def test_questions_of_which_an_answer_has_no_reward_are_left_out_unless_all_are(kept: int, count: int | None) -> None:
    comparison: Any = SimpleNamespace(
        names=NAMES[:2], questions=QUESTIONS[:2], answers=[answers("a", "b"), answers("c", "d")]
    )
    entry = "f.py:f", lambda completions, **_: [0.5] * kept + [None, float("nan")][kept:]

    if count is None:
        with pytest.raises(UserError, match="nothing to compare"):
            reward_figures(comparison, *entry)
    else:
        assert reward_figures(comparison, *entry)["count"] == count


def test_columns_of_large_numbers_do_not_run_into_each_other() -> None:
    values = np.array([[-200.5, 123.5, 99.25], [310.25, -520.75, 8.5]])
    measure = figures(Measure("reward f", "answers"), NAMES[:2], values)

    lines = as_text({"measures": [measure], "preference": [], "answers": [], "models": []}).splitlines()

    assert all(len(line) <= 80 for line in lines)
    for line in lines[1:4]:
        mean, low, to, high = line[30:56].split()
        assert float(low) < float(mean) < float(high)
        assert to == "to"


# The command


def compared(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    assert cli.main(["compare", *words, "--json", "-"]) == code
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def test_rewards_and_a_judge_stand_among_the_measures_and_fit_into_80_columns(
    settings: dict[str, Any],
    run_main: Callable[..., None],
    tmp_path: Path,
    fake: Fake,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also a judge that fails on the way, whose other measures are not lost, and a local one."""
    run_main({**settings, "learning_rate": 0.05})
    (tmp_path / "r.py").write_text(
        "def length(prompts, completions, **_): return [len(text) for text in completions]\n"
    )
    words = [settings["adapter_path"], "--prompt", "Hi", "--rows", "2", "--max-tokens", "4"]
    of_judge = ["--judge-url", fake.url, "--judge-model", "judge-1"]
    fake.replies[:] = [completion("A")]

    figures, said = compared([*words, *of_judge, "--reward", f"{tmp_path / 'r.py'}:length"], 0, capsys)

    by_name = {measure["name"]: measure for measure in figures["measures"]}
    lengths = [np.mean([len(one["models"][place]["text"]) for one in figures["answers"]]) for place in (0, 1)]
    assert [model["mean"] for model in by_name["reward length"]["models"]] == pytest.approx(lengths)
    assert by_name["judge"]["judge"] == f"judge-1 at {fake.url.split('/')[2]}"
    assert by_name["judge"]["comparisons"][0]["ties"] == 3
    assert "The judge compares tuned with base, prompt 3 of 3." in said
    assert cli.main(["compare", *words, *of_judge]) == 0
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 80
    assert re.search(r"^judge, 3 answers +win rate", table, re.MULTILINE)

    fake.replies[:] = [completion("A"), Reply(401, {})]
    figures, said = compared([*words, *of_judge, "--reward", f"{tmp_path / 'r.py'}:length"], 2, capsys)
    assert [one["name"] for one in figures["measures"]][:4] == ["accuracy", "margin", "reward length", "length"]
    assert said.splitlines()[-1].startswith("error: The judge judge-1 at 127.0.0.1")

    figures, _ = compared([*words, "--judge", settings["model"]], 0, capsys)
    assert [measure["count"] for measure in figures["measures"] if measure["name"] == "judge"] == [3]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--judge", "m", "--judge-url", "http://h"], "--judge and --judge-url name two judges; give one of them."),
        (["--judge-url", "http://h"], "--judge-url and --judge-model belong together; give both."),
        (["--judge-model", "m"], "--judge-url and --judge-model belong together; give both."),
        (["--judge-key", "K"], "--judge-key is for an endpoint; give --judge-url, too."),
        (["--judge-url", "http://[::1", "--judge-model", "m"], "--judge-url http://[::1 is no endpoint; write https"),
        (["--judge-url", "http://..h/v1", "--judge-model", "m"], "--judge-url http://..h/v1 is no endpoint; write"),
        (["--judge-url", "http://h/é", "--judge-model", "m"], "--judge-url http://h/é is no endpoint; write"),
        (["--judge", "/no/model"], "--judge names '/no/model', which does not exist"),
        (["--reward", "no_such_module:f"], "--reward no_such_module:f cannot be imported"),
        (["--judge", "m", "--rows", "0"], "--rows 0 leaves no answers to measure"),
        pytest.param(
            ["--metric", "chrf", "--prompt", "Hi", "--rows", "0"],
            "--rows 0 leaves no answers to measure",
            marks=pytest.mark.skipif(find_spec("sacrebleu") is None, reason="needs sacrebleu"),
        ),
    ],
)
def test_a_mistake_in_who_decides_is_said_before_anything_is_loaded(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", str(tmp_path / "nothing"), *words]) == 2

    assert capsys.readouterr().err.startswith(f"error: {sentence}")
