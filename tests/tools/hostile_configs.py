"""Hostile configurations: YAML files, command lines and calls, made by a grammar and by spoiling valid ones."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import yaml

from mlx_cpo_plugin.plugins import loss_types, train_modes
from mlx_cpo_plugin.settings import command_line, config
from mlx_cpo_plugin.settings.command_line import known_options
from mlx_cpo_plugin.settings.options import UNCHECKED_KEYS
from mlx_cpo_plugin.types import Option

Case = dict[str, Any]

CANARY = "canary"
"""What a YAML file that runs code would leave behind in the current folder."""

# YAML for one value. PyYAML's full loader would run the code that some of them name.
FRAGMENTS = (
    *("", "null", "~", "true", "YES", "0", "-1", "1e-5", "1e400", "-1e400", ".inf", "-.Inf", ".nan", "NaN", "Infinity"),
    *("0x" + "f" * 40, "-" + "9" * 400, "1_000", "1:30:00", "0o17"),
    *("'5'", '"0.1"', "'true'", "2024-01-01", "2024-99-99", "0000-00-00", "2001-12-14t21:59:43.10-99:99", "=", "<<"),
    *("!!int ''", "!!int x", "!!float ''", "!!bool x", "!!timestamp x", "!!binary '*'", "!!binary aGk=", "!!null x"),
    *("!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!omap {a: 1}", "!!str 5", "!!seq {}", "!!map []", "!x y"),
    f"!!python/object/apply:os.mkdir [{CANARY}]",
    f"!!python/object/new:os.system ['touch {CANARY}']",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/tuple [1, 2]",
    "!!python/object:pathlib.Path {}",
    *(
        r'"\ud800"',
        r'"a\0b"',
        r'"a\nb"',
        r'"\e[31mred"',
        r'"\u202egnp"',
        '"\\x"',
        "'unclosed",
        "[1, 2",
        "{a: 1",
        "a: b: c",
    ),
    *("../../x", "/etc/passwd", "~", "~nobody/x", "..", ".", "/", "\\", "a/../../b", "CON", "x" * 300, "y" * 5000),
    *("{}", "[]", "[[]]", "{a: {b: {c: d}}}", "[1, [2, [3]]]", "{? [a] : b}", "{? {a: b} : c}", "{1: 2}", "{null: 1}"),
    *(
        "*nowhere",
        "&a [*a]",
        "&a {b: *a}",
        "{<<: 5}",
        "{<<: [1]}",
        "{<<: {rank: 4}}",
        "&a {<<: *a}",
        "*base",
        "{<<: *base}",
    ),
    *("|\n  text", ">-\n  text\n\n  more", "\t5", "5\t# comment", "%TAG", "@at", "`tick", "- 1\n- 2", "\n  - 1\n - 2"),
)
# The same for calls of main({...}), as JSON can hold them, with NaN and infinities.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 1e-5, 1e308, math.nan, math.inf, -math.inf, 0.5),
    *(
        "",
        " ",
        "5",
        "true",
        "nan",
        "\ud800",
        "a\0b",
        "a\nb",
        "\x1b[31m",
        "../../x",
        "/etc/passwd",
        "~nobody/x",
        "x" * 5000,
    ),
    *([], [[]], [1], ["a"], [None], [{"path": 5}], {}, {"a": 1}, {"": 1}, {"rank": None}, {"a": {"b": {"c": []}}}),
    {"name": "cosine_decay", "arguments": [1, 2, 3, 4, 5]},
    {"adam": {"betas": "x"}},
    {"adamw": None},
)
ODD_KEYS = (
    *(
        "",
        "<<",
        "=",
        "5",
        "null",
        "true",
        "1.5",
        "? [a, b]",
        "? {a: b}",
        '"a\\nb"',
        '"\\e[2J"',
        r'"\ud800"',
        "k" * 5000,
    ),
    *("__class__", "plugin_resolved", "loss_options", "config_file", "config", "beta.x", ".", "lora_parameters.rank"),
    *(
        "!!python/name:os.system",
        "&k beta",
        "*k",
        "'beta'",
        '"beta"',
        "beta ",
        "Beta",
        "be ta",
        "b\u0435ta",
        "trust_remote_code",
    ),
)
NESTED: dict[str, tuple[str, ...]] = {
    "lora_parameters": ("rank", "dropout", "scale", "alpha", "rnak"),
    "optimizer_config": ("adam", "adamw", "muon", "sgd"),
    "lr_schedule": ("name", "arguments", "warmup", "warmup_init", "wramup"),
    "hf_dataset": ("path", "config", "train_split", "valid_split", "chosen_feature", "mask_prompt", "trian_split"),
}
VALID_INSIDES: dict[str, tuple[Any, ...]] = {
    "report_to": (["wandb"], ["tensorboard", "swanlab"], "trackio, wandb", "none"),
    "lora_parameters": ({"rank": 4}, {"rank": 8, "dropout": 0.1, "scale": 2}),
    "optimizer_config": ({"adam": {"eps": 1e-6}}, {"adamw": {"betas": [0.9, 0.99], "weight_decay": 0.1}}),
    "lr_schedule": ({"name": "cosine_decay", "arguments": [1e-5, 100], "warmup": 10},),
    "hf_dataset": ([{"path": "rows", "train_split": "train[:9]"}], {"path": "rows", "config": {"name": "main"}}),
}


@cache
def options() -> dict[str, Option]:
    """Every option of CPO."""
    return known_options([train_modes()["cpo"]], loss_types().values())


def make(random: Random) -> Case:
    """A configuration: bytes of a YAML file (as Latin-1 text, or None) and a call, as words or a mapping."""
    content = None if random.random() < 0.1 else yaml_file(random)
    call: Case = {"words": words(random)} if random.random() < 0.1 else {"mapping": mapping(random)}
    return {"yaml": None if content is None else content.decode("latin-1"), **call}


def run(case: Case, folder: Path) -> None:
    """Resolve a configuration as ``main`` does, and look at what is accepted.

    Raises:
        UserError: it is refused.
        AssertionError: what is accepted cannot be used, or code of the file was run.
    """
    file = folder / "my.yaml"
    if case["yaml"] is not None:
        file.write_bytes(case["yaml"].encode("latin-1"))
    if "words" in case:
        call: Any = [word.replace("{file}", str(file)) for word in case["words"]]
    else:
        call = {**case["mapping"]}
        if case["yaml"] is not None:
            call.setdefault("config", str(file))
    command_line.requested_mode(call)
    resolved = config.resolve(call)
    assert not (folder / CANARY).exists(), "the file ran code"
    for name, option in options().items():
        value = getattr(resolved.settings, name)
        assert value is None or isinstance(value, option.type), f"{name} is {type(value)}"
        assert not isinstance(value, float) or math.isfinite(value), f"{name} is not finite"
    text = " ".join([str(vars(resolved.settings)), *resolved.notes])
    assert len(text) < 1_000_000, "the settings are too long to print"
    studio = resolved.settings.lm_studio_name
    assert studio is None or (folder / studio).resolve().parent == folder.resolve(), "lm_studio_name leaves its folder"
    for note in resolved.notes:
        assert note.isprintable(), "a note is more than one line"


def valid_settings(random: Random) -> dict[str, Any]:
    """A few settings that are allowed together."""
    chosen = random.sample(sorted(options()), random.randint(1, 8))
    given = {name: valid_value(options()[name], random) for name in chosen if not name.startswith("load_in")}
    return {"train_mode": "cpo", **given, "train": True}


def valid_value(option: Option, random: Random) -> Any:
    """A value that ``option`` allows."""
    if option.name in VALID_INSIDES:
        return random.choice(VALID_INSIDES[option.name])
    if option.choices:
        return random.choice(option.choices)
    if option.type is bool:
        return random.random() < 0.5
    if option.type is int:
        return random.randint(max(1, int(option.minimum or 1)), 15)
    name = random.choice(["name", "a-b", "x.y"])
    return {float: random.uniform(0.01, 0.9), str: name, dict: {"a": True}, list: [name]}[option.type]


def yaml_file(random: Random) -> bytes:
    """The bytes of a configuration file."""
    kind = random.random()
    if kind < 0.03:
        return random.choice(
            [b"", b"\n", b"# comment\n", b"---\n...\n", b"\xef\xbb\xbf", b"\0", b"- a\n", b"text", b"\xff\xfe"]
        )
    text = yaml.safe_dump(valid_settings(random), sort_keys=False, default_flow_style=random.random() < 0.1)
    lines = text.splitlines()
    for _ in range(random.choice((0, 1, 1, 1, 2, 3))):
        spoil_lines(lines, random)
    text = "\n".join(lines) + "\n"
    if random.random() < 0.2:
        return spoil_bytes(text.encode("utf-8", "surrogatepass"), random)
    return text.encode("utf-8", "surrogatepass")


def spoil_lines(lines: list[str], random: Random) -> None:
    """Change one thing in the lines of a file."""
    place = random.randint(0, len(lines))
    change = random.random()
    if change < 0.55:
        lines.insert(place, f"{key(random)}: {random.choice(FRAGMENTS)}")
    elif change < 0.75:
        outer = random.choice(sorted(NESTED))
        inner = random.choice(NESTED[outer]) if random.random() < 0.8 else key(random)
        dash = "- path: rows\n  " if outer == "hf_dataset" and random.random() < 0.5 else "  "
        lines.append(f"{outer}:\n{dash}{inner}: {random.choice(FRAGMENTS)}")
    elif change < 0.85 and lines:
        place = random.randrange(len(lines))
        name, _, value = lines[place].partition(":")
        lines[place] = (
            f"{near_miss(name, random)}:{value}" if random.random() < 0.5 else f"{name}: {random.choice(FRAGMENTS)}"
        )
    elif change < 0.9 and lines:
        lines.insert(place, random.choice(lines))
    elif change < 0.95:
        lines.insert(
            place, random.choice(("\t", "---", "...", "%YAML 9.9", "- item", "? ", ": x", "base: &base {rank: 2}"))
        )
    elif lines:
        place = random.randrange(len(lines))
        lines[place] = random.choice((" ", "\t", "  ")) + lines[place]


def key(random: Random) -> str:
    """The name of a setting, often of one that there is."""
    if random.random() < 0.15:
        return random.choice(ODD_KEYS)
    name = random.choice([*options(), *UNCHECKED_KEYS])
    return near_miss(name, random) if random.random() < 0.15 else name


def near_miss(name: str, random: Random) -> str:
    """``name`` with one mistake in it."""
    place = random.randrange(len(name)) if name else 0
    return random.choice(
        (
            name[:place] + name[place + 1 :],
            name[:place] + name[place : place + 1] * 2 + name[place + 1 :],
            name.replace("_", "-"),
            name.upper(),
            name + "s",
        )
    )


def spoil_bytes(content: bytes, random: Random) -> bytes:
    """``content`` damaged as a file may be, or in another encoding."""
    place = random.randint(0, len(content))
    return random.choice(
        (
            lambda: content[:place],
            lambda: content[:place] + random.randbytes(random.randint(1, 4)) + content[place:],
            lambda: content[:place] + random.randbytes(1) + content[place + 1 :],
            lambda: content[:place] + b"\0" + content[place:],
            lambda: b"\xef\xbb\xbf" + content,
            lambda: content.decode("utf-8", "replace").encode("utf-16"),
            lambda: content.decode("utf-8", "replace").encode("utf-32"),
            lambda: content.replace(b"\n", random.choice((b"\r", b"\r\n", b"\x0b", b"\xc2\x85", b"\xe2\x80\xa8"))),
            lambda: content.replace(b"  ", b"\t"),
            lambda: content.replace(b": ", b":"),
            lambda: content[:place] + b"x" * 200_000 + content[place:],
            lambda: content[:place] + b"# " + b"y" * 300_000 + b"\n" + content[place:],
            lambda: content + content,
            lambda: bytes(byte ^ (1 << random.randrange(8)) if random.random() < 0.01 else byte for byte in content),
        )
    )()


def mapping(random: Random) -> dict[str, Any]:
    """The argument of ``main({...})``."""
    values = valid_settings(random) if random.random() < 0.5 else {"train_mode": "cpo"}
    for _ in range(random.choice((0, 0, 0, 1, 2))):
        name = random.choice([*options(), "config", "train_mode"]) if random.random() < 0.9 else random.choice(ODD_KEYS)
        values[name] = random.choice(VALUES)
        if name in NESTED and random.random() < 0.5:
            values[name] = {random.choice(NESTED[name]): random.choice(VALUES)}
    return values


def words(random: Random) -> list[str]:
    """The words of a command line; ``{file}`` stands for the configuration file."""
    line = ["--train-mode", "cpo", "--train", "--config", "{file}"]
    if random.random() < 0.1:
        line = random.sample(line, 3)
    for _ in range(random.randint(1, 3)):
        name = key(random)
        flag = "--" + (name if random.random() < 0.2 else name.replace("_", "-"))
        value = random.choice(FRAGMENTS) if random.random() < 0.7 else str(random.choice(VALUES[-20:]))
        line += random.choice(
            ([flag, value], [flag], [f"{flag}={value}"], [value], [flag[: random.randint(2, 9)], value])
        )
    return line
