"""Preference data: rows of any accepted format, tokenised and cut to length."""

from mlx_cpo_plugin.data.dataset import DataReport, PreferenceDataset, as_pairs, load_dataset, pairs_of_rows
from mlx_cpo_plugin.data.pair import PreferencePair

__all__ = ["DataReport", "PreferenceDataset", "PreferencePair", "as_pairs", "load_dataset", "pairs_of_rows"]
