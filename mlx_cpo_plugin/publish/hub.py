"""Pushing an adapter or a model to the Hugging Face hub: which files go, and what can go wrong, in one sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from mlx_cpo_plugin.checkpoints import ADAPTER_CONFIG, ADAPTER_FILE
from mlx_cpo_plugin.checkpoints.adapter import CheckpointError, adapter_metadata
from mlx_cpo_plugin.checkpoints.run_identity import read_record
from mlx_cpo_plugin.errors import ConfigError, UserError, first_line, named, printable
from mlx_cpo_plugin.marked_text import is_edited
from mlx_cpo_plugin.publish.card import CARD_FILE, PLOT_FILE, model_card, without_paths

_OF_EVERY_MODEL = (CARD_FILE, PLOT_FILE, "LICENSE*", "NOTICE*")
_OF_ADAPTER = (ADAPTER_FILE, ADAPTER_CONFIG, *_OF_EVERY_MODEL)
_OF_MODEL = (
    *("model*.safetensors", "model.safetensors.index.json", "*.gguf", "Modelfile"),
    *("config.json", "generation_config.json", "*processor*.json", "chat_template*", "additional_chat_templates/*"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *_OF_EVERY_MODEL,
)
_OF_PEFT = ("adapter_model.safetensors", ADAPTER_CONFIG, *_OF_MODEL)
# Small files in which whoever made the model may have left the paths of a machine.
_MAY_HOLD_PATHS = ("*config.json",)
_ADVICE = {
    401: "the token is missing or not valid: run hf auth login, or set HF_TOKEN",
    403: "the token does not allow it: take one with write access to this namespace",
    404: "there is no such namespace or repository, or the token may not see it: check the name",
}


class HubError(UserError):
    """Nothing can be pushed, or the hub has refused it or cannot be reached."""


class PushAfterRunError(HubError):
    """A run is complete and saved, but its adapter could not be pushed."""

    exit_code = 3


@dataclass(frozen=True)
class Upload:
    """What is going to be pushed.

    Attributes:
        files: name in the repository -> a file, or its contents where these are not those of a file.
        left_out: names in the folder that stay here.
    """

    files: dict[str, Path | bytes]
    left_out: tuple[str, ...]

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }


def upload_of(folder: Path, repo: str, *, fused: bool = False, base_model: str | None = None) -> Upload:
    """Return what belongs to the adapter in a folder, or else to the model in it; changes nothing.

    A card that nobody has edited is made anew, for the name of the repository.

    Args:
        fused: the fused model beside an adapter, in place of the adapter.
        base_model: its name on the hub, where the run was given a folder.

    Raises:
        HubError: there is neither, or a file cannot be read.
        ReportError: the run's settings cannot be read.
    """
    if not folder.is_dir():
        raise HubError(f"There is no folder {named(str(folder))}; give that of an adapter or a model.", key="folder")
    there = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    is_adapter = ADAPTER_FILE in there and not fused
    record = read_record(folder) if is_adapter else None
    if record is not None and not record.has_written(_metadata(folder / ADAPTER_FILE)):
        raise HubError(
            f"{ADAPTER_FILE} in {named(str(folder))} was not written by the run that the card would describe; move it "
            "to a folder of its own, and push that.",
            key="folder",
            place=str(folder),
        )
    patterns = _OF_ADAPTER if is_adapter else _OF_PEFT if "adapter_model.safetensors" in there else _OF_MODEL
    files: dict[str, Path | bytes] = {
        name: path for name, path in there.items() if any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    if not any(name.endswith((".safetensors", ".gguf")) for name in files):
        what = "no fused model" if fused else "neither an adapter nor a model"
        raise HubError(f"{named(str(folder))} holds {what}; give another folder.", key="folder", place=str(folder))
    try:
        if "config.json" in files:
            files |= {name: there[name] for name in _code_of(folder) if name in there}
        files |= {name: text for name in files if (text := _without_paths(name, folder)) is not None}
    except (OSError, ValueError) as error:
        raise HubError(
            f"A file in {named(str(folder))} cannot be read ({first_line(error)}); check it.", place=str(folder)
        ) from error
    if (is_adapter or fused) and not is_edited(folder / CARD_FILE):
        card = model_card(folder, "mlx" if fused else "adapter", base_model=base_model, here=repo)
        files[CARD_FILE] = card.text.encode("utf-8")
        files |= {PLOT_FILE: card.plot} if card.plot else {}
    beside = {path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith(".")}
    left_out = beside - {name.partition("/")[0] + "/" * ("/" in name) for name in files}
    return Upload(dict(sorted(files.items())), tuple(sorted(left_out)))


def _code_of(folder: Path) -> set[str]:
    """Return the files of Python that a model's configuration names, and those that these import from beside them."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError("config.json holds no object")
    values = [config.get("model_file"), *dict(config.get("auto_map") or {}).values()]
    # "module.Class", or several of them; mlx_lm's is the name of the file.
    named = [part for value in values for part in (value if isinstance(value, list) else [value]) if part]
    new = {f"{str(part).rpartition('--')[2].removesuffix('.py').partition('.')[0]}.py" for part in named}
    found: set[str] = set()
    while new:
        found |= new
        texts = [(folder / name).read_text(encoding="utf-8") for name in new if (folder / name).is_file()]
        new = {
            f"{module}.py" for text in texts for module in re.findall(r"^\s*from \.(\w+)", text, re.MULTILINE)
        } - found
    return found


def push(upload: Upload, repo: str, *, private: bool, say: Callable[[str], object]) -> None:
    """Commit the files to a repository of models, which is made if it does not exist.

    Raises:
        HubError: the hub refuses it or cannot be reached, or a repository that is public should be private.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="mlx-cpo-plugin")
    with _explained(repo):
        # A name without a namespace is one of the account's.
        full = api.create_repo(repo, private=private, exist_ok=True).repo_id
        is_private = bool(api.repo_info(full).private)
    if private and not is_private:
        raise HubError(
            f"{named(full)} is there already and public; push to another name, or allow it with --public or "
            "hub_private_repo: false.",
            key="hub_private_repo",
            place=full,
        )
    operations = [CommitOperationAdd(name, content) for name, content in upload.files.items()]
    with _explained(repo):
        api.create_commit(full, operations, commit_message="Push with mlx-cpo-plugin")
    size = sum(upload.sizes().values())
    visible = "private" if is_private else "public"
    say(f"Pushed {len(operations)} files, {size / 1e6:,.1f} MB, to {api.endpoint}/{full} ({visible}).")


def require_token(repo: str) -> None:
    """Raise ConfigError where there is no token for the push that a run is to end with."""
    from huggingface_hub import get_token

    if not get_token():
        raise ConfigError(
            f"push_to_hub names {named(repo)}, but there is no token of the hub: run hf auth login, set HF_TOKEN, or "
            "remove the key.",
            key="push_to_hub",
        )


def _metadata(file: Path) -> dict[str, str]:
    try:
        return adapter_metadata(file)
    except CheckpointError as error:
        raise HubError(f"{first_line(error).removesuffix('.')}; train it again.", place=str(file)) from error


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            yield path
    for path in sorted((folder / "additional_chat_templates").glob("*")):
        if path.is_file():
            yield path


def _without_paths(name: str, folder: Path) -> bytes | None:
    """Return what a file would hold without paths; None where it holds none, or is no configuration."""
    if not any(fnmatchcase(name, pattern) for pattern in _MAY_HOLD_PATHS):
        return None
    values = json.loads((folder / name).read_text(encoding="utf-8"))
    local = _local_paths_removed(values)
    return None if local == values else (json.dumps(local, indent=4, ensure_ascii=False) + "\n").encode("utf-8")


def _local_paths_removed(value: object) -> object:
    """Return JSON values in which every path that leads from the root or the home of a machine is its last part."""
    if isinstance(value, dict):
        return {key: _local_paths_removed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_local_paths_removed(inner) for inner in value]
    # A token such as "/think" begins with a slash, too.
    is_local = isinstance(value, str) and value.startswith(("/", "~/")) and len(Path(value).parts) > 2
    return without_paths(value) if is_local else value


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn whatever the hub's client raises into a HubError; its own errors come from several HTTP libraries."""
    try:
        yield
    except Exception as error:
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        reason = printable(first_line(error))
        if status is None and isinstance(error, OSError | TimeoutError) | ("connect" in type(error).__name__.lower()):
            raise HubError(f"The hub cannot be reached ({reason}); check the network and push again.") from error
        advice = _ADVICE.get(status or 0, "check the message and push again")
        answer = f"the hub answers {status}: {advice}" if status in _ADVICE else f"{reason}: {advice}"
        raise HubError(f"{named(repo)} cannot be pushed to; {answer}.", key="push_to_hub", place=repo) from error
