"""Sentences on the page: what is wrong, and what there is to know."""

from __future__ import annotations

from html import escape


def fault_html(text: object) -> str:
    """Return what is wrong as a piece of the page; nothing where nothing is."""
    return f'<p class="fault" role="alert">{escape(str(text))}</p>' if str(text) else ""


def note_html(text: str) -> str:
    """Return a sentence as a piece of the page."""
    return f'<p class="note">{escape(text)}</p>'
