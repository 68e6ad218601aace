"""The page: its tabs, how they work together, and how it looks."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from mlx_cpo_plugin.studio.chat_tab import Chats, build_chat_tab
from mlx_cpo_plugin.studio.check_tab import build_check_tab
from mlx_cpo_plugin.studio.child import Jobs
from mlx_cpo_plugin.studio.compare_tab import build_compare_tab
from mlx_cpo_plugin.studio.live_runs import LiveRuns
from mlx_cpo_plugin.studio.run_tab import build_run_tab
from mlx_cpo_plugin.studio.runs_tab import build_runs_tab
from mlx_cpo_plugin.studio.train_tab import build_train_tab

STYLE = Path(__file__).with_name("style.css")
SCRIPT = Path(__file__).with_name("page.js")
# What is seen until the page's own scripts have been read.
HEAD = """<style>
body:not(:has(.gradio-container))::before { content: "CPO training"; display: block; padding: 1.5rem; }
body:not(:has(.gradio-container))::before { font: 600 1.4rem system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { body:not(:has(.gradio-container)) { background: #0f0f11; color: #f4f4f5; } }
</style>"""
_FONTS = ["system-ui", "sans-serif"]
_MONOSPACED = ["ui-monospace", "monospace"]


class Page(NamedTuple):
    """The page and what it follows.

    Attributes:
        changes: returns a text that is another one once there is something new to show.
    """

    blocks: gr.Blocks
    changes: Callable[[], str]


def build_page(root: Path, name: str) -> Page:
    """Return the page.

    Args:
        root: the folder in which runs start and configurations lie.
        name: the configuration file to begin with, below ``root``; empty for what was last in the form.
    """
    live, chats = LiveRuns(root), Chats()
    checks, comparisons, estimates, exports = Jobs(), Jobs(), Jobs(), Jobs()
    atexit.register(chats.end_all)

    def leave(request: gr.Request) -> None:
        for jobs in (checks, comparisons, estimates, exports):
            jobs.cancel(request.session_hash)
        chats.end(request.session_hash)

    def newest_run(chosen: str | None) -> Any:
        names = live.reported()
        return gr.update(choices=names, value=chosen if chosen in names else next(iter(names), None))

    def compare_run(folder: str) -> tuple[Any, Any]:
        return gr.Tabs(selected="compare"), gr.update(choices=live.reported(), value=live.name(Path(folder)))

    with gr.Blocks(title="MLX CPO", analytics_enabled=False) as page:
        gr.HTML("<h1>CPO training</h1>")
        banner = gr.HTML("", elem_id="banner")
        looking = gr.Button("Look", elem_id="look")  # which the script presses where there is something new
        with gr.Tabs() as tabs:
            with gr.Tab("Train", id="train"):
                form = build_train_tab(root, name)
            with gr.Tab("Check", id="check"):
                build_check_tab(root, form, checks)
            with gr.Tab("Run", id="run") as run_tab:
                run = build_run_tab(root, form, banner, live, estimates, exports)
            with gr.Tab("Compare", id="compare") as compare_tab:
                compared = build_compare_tab(live, comparisons)
            with gr.Tab("Chat", id="chat") as chat_tab:
                talked = build_chat_tab(live, chats)
            with gr.Tab("Runs", id="runs") as runs_tab:
                runs = build_runs_tab(live)
        for tab, run_of_tab in ((compare_tab, compared), (chat_tab, talked)):
            tab.select(newest_run, run_of_tab, run_of_tab, show_progress="hidden")
        runs_tab.select(lambda: gr.update(choices=live.reported()), None, runs, show_progress="hidden")
        opened = form.load(page.load)
        for event in (opened.then, run_tab.select):
            event(run.visit, [run.watched, form.yaml], run.visited, show_progress="hidden").then(
                run.look, run.inputs, run.outputs, show_progress="hidden"
            )
        how: Any = {"show_progress": "hidden", "queue": False, "trigger_mode": "always_last"}
        looking.click(run.look, run.inputs, run.outputs, **how)
        page.unload(leave)
        run.compare.click(compare_run, run.watched, [tabs, compared])
    return Page(page, live.changes)


def appearance() -> dict[str, Any]:
    """Return theme and style: fonts of the system only, so that nothing is fetched."""
    theme = gr.themes.Base(font=_FONTS, font_mono=_MONOSPACED, text_size="md", spacing_size="sm")
    theme.set(
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
    )
    return {"theme": theme, "css_paths": STYLE, "head": HEAD, "js": SCRIPT.read_text(encoding="utf-8")}
