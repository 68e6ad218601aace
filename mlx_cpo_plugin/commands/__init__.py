"""The commands around a run, from ``check`` and ``train`` to ``doctor``, and the call from Python."""
