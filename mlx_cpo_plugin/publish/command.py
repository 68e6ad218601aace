"""The arguments of ``mlx-cpo push``, and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of a run, or of an exported model")
    parser.add_argument("repo", metavar="REPO", help="repository on the hub, name or account/name; made if need be")
    parser.add_argument("--public", action="store_true", help="make the repository public, or push to one that is")
    parser.add_argument("--fused", action="store_true", help="push the fused model in the folder, not the adapter")
    parser.add_argument("--base-model", metavar="NAME", help="the base model's name on the hub, for the model card")
    parser.add_argument("--dry-run", action="store_true", help="list the files and their sizes; push nothing")


def run_push(chosen: argparse.Namespace) -> int:
    """Push, or list what would be pushed.

    Raises:
        HubError: there is nothing to push, or the hub refuses it or cannot be reached.
        ReportError: the run's settings cannot be read.
    """
    from mlx_cpo_plugin.data.columns import first_few
    from mlx_cpo_plugin.publish.hub import push, upload_of
    from mlx_cpo_plugin.settings.nested import repository

    for key, name in (("REPO", chosen.repo), ("--base-model", chosen.base_model)):
        if name is not None:
            repository(name, key, lambda _: "on the command line")
    upload = upload_of(chosen.folder, chosen.repo, fused=chosen.fused, base_model=chosen.base_model)
    for name, size in upload.sizes().items():
        print(f"{size:>16,}  {name}")
    if upload.left_out:
        print(f"Not pushed: {first_few(upload.left_out, 12)}.")
    if chosen.dry_run:
        visible = "public" if chosen.public else "private"
        print(f"Nothing is pushed: this is what would go to {chosen.repo} ({visible}).")
        return 0
    push(upload, chosen.repo, private=not chosen.public, say=print)
    return 0
