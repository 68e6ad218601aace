"""A Python that has imported what is slow to import and forks a process for each request.

Started by ``support.fresh_environment`` with an environment's Python, so the start-up files of that environment were
read. A request is a line of JSON on standard input, and its answer, the exit code, a line on standard output.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import sys
from types import ModuleType
from typing import Any

# What mlx_lm imports that is neither MLX nor knows of it: it takes most of the time that the host needs to start.
SLOW = ("transformers.models.auto.tokenization_auto", "transformers.tokenization_utils_tokenizers", "datasets")


def forked() -> dict[str, Any] | None:
    """Fork for each request; return it in the process that is to fulfil it, and None in this one at the end."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            request: dict[str, Any] = json.loads(line)
            return request
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


def become(request: dict[str, Any]) -> None:
    """Take on the environment, the folder and the streams of a process of its own."""
    signal.alarm(request["seconds"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    for descriptor, name in enumerate((os.devnull, *request["streams"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), descriptor)
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [folder for folder in path if folder and folder not in sys.path]


def run(what: str, *rest: str) -> None:
    """Do what Python does with these words."""
    if what == "-m":
        name, *sys.argv[1:] = rest
        sys.path[0] = os.getcwd()
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif what == "-c":
        code, *sys.argv[1:] = rest
        sys.path[0] = ""
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(main))
    else:
        sys.argv = [what, *rest]
        sys.path[0] = os.path.dirname(what)
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    for module in SLOW:
        __import__(module)
    gc.freeze()  # or the collector touches every page of each fork, which copies it
    if (own := forked()) is not None:
        become(own)
        run(*own["words"])
