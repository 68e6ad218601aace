"""The page: its tabs, how they work together, and how it looks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from mlx_cpo_plugin.studio.check_tab import build_check_tab
from mlx_cpo_plugin.studio.compare_tab import build_compare_tab
from mlx_cpo_plugin.studio.run_tab import build_run_tab, folder_to_watch
from mlx_cpo_plugin.studio.runs_tab import build_runs_tab, run_names
from mlx_cpo_plugin.studio.train_tab import build_train_tab

STYLE = Path(__file__).with_name("style.css")
_FONTS = ["system-ui", "sans-serif"]
_MONOSPACED = ["ui-monospace", "monospace"]


def build_page(root: Path, text: str, name: str) -> gr.Blocks:
    """Return the page.

    Args:
        root: the folder in which runs start and configurations lie.
        text: the configuration to begin with.
        name: its file, below ``root``; may be empty.
    """
    with gr.Blocks(title="MLX CPO", analytics_enabled=False) as page:
        gr.HTML("<h1>CPO training</h1>")
        with gr.Tabs():
            with gr.Tab("Train", id="train"):
                yaml = build_train_tab(root, text, name)
            with gr.Tab("Check", id="check"):
                build_check_tab(root, yaml)
            with gr.Tab("Run", id="run"):
                run = build_run_tab(root, yaml)
            with gr.Tab("Compare", id="compare") as compare_tab:
                compared = build_compare_tab(root)
            with gr.Tab("Runs", id="runs") as runs_tab:
                runs = build_runs_tab(root)
        compare_tab.select(lambda: gr.update(choices=run_names(root)), None, compared, show_progress="hidden")
        runs_tab.select(lambda: gr.update(choices=run_names(root)), None, runs, show_progress="hidden")
        page.load(lambda text: folder_to_watch(root, text), yaml, run.watched).then(
            run.look, [run.watched, run.seen], [*run.parts, run.seen], show_progress="hidden"
        )
    return page


def appearance() -> dict[str, Any]:
    """Return theme and style: fonts of the system only, so that nothing is fetched."""
    theme = gr.themes.Base(font=_FONTS, font_mono=_MONOSPACED, text_size="md", spacing_size="sm")
    theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
    return {"theme": theme, "css_paths": STYLE}
