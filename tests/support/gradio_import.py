"""Imports Gradio as the page does, which takes half of the time."""

from mlx_cpo_plugin.studio.command import gradio_writes_no_stubs

with gradio_writes_no_stubs():
    import gradio  # noqa: F401 - for whoever imports it next
