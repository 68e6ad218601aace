"""What tests and the scripts that they start share; importing it sets up every process of theirs alike."""

import os
import signal

# Compilation on a CPU costs seconds of a C++ compiler; tests that are about it switch it on for themselves.
os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
# Tests and their child processes share the cores; OpenBLAS's threads would wait for one another.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from mlx_cpo_plugin.blas import use_fast_blas

use_fast_blas()

# No test cuts the power, and to wait for the disk takes a third of a run.
os.fsync = lambda descriptor: None

# A shell that runs the tests in the background has them, and all that they start, ignore these.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
