"""Preference data: rows of any accepted format, tokenised and cut to length.

The way of a row, a module a step:

1. :mod:`~.reading`: the settings' files, folders (:mod:`~.folders`) and Hugging Face datasets, one after the other;
   :mod:`~.files`: each file to raw rows.
2. :mod:`~.ranked`: a row with several answers to rows of two; :mod:`~.rows`: a raw row, by its :mod:`~.columns`, to a
   conversation, out of :mod:`~.messages`, or to plain text.
3. :mod:`~.rendering`: a conversation to text under the chat template, and where the answers stand in it.
4. :mod:`~.tokens`: text to tokens, by the :mod:`~.tokenizer`, and these to a :mod:`~.pair` that fits.
5. :mod:`~.conversion`: steps 2 to 4 for all rows, in several processes where there are many.
6. :mod:`~.dataset`: all pairs of a split, with a :mod:`~.report` of what was left out; :mod:`~.given`: data sets of a
   call; :mod:`~.batches`: to arrays.
"""

from mlx_cpo_plugin.data.dataset import PreferenceDataset, load_dataset, pairs_of_rows
from mlx_cpo_plugin.data.given import as_pairs
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.data.report import DataReport

__all__ = ["DataReport", "PreferenceDataset", "PreferencePair", "as_pairs", "load_dataset", "pairs_of_rows"]
