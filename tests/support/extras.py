"""Tests that need a package of an extra, which is looked for and not imported.

Gradio takes seconds to import: a module of tests that names it at its top would cost each worker these seconds.
"""

from importlib.util import find_spec

import pytest

STUDIO = [
    pytest.mark.skipif(find_spec("gradio") is None, reason="needs the extra 'studio'"),
    pytest.mark.slow,
]
