"""The presets of CPO: what each paper's authors train with, as values of the loss's options.

They fill options of the loss only. Learning rates and batch sizes of the papers belong to models of 7B and more that
are trained as a whole, and would mislead with an adapter.
"""

from __future__ import annotations

from mlx_cpo_plugin.types import Preset

PRESETS: tuple[Preset, ...] = (
    Preset(
        "cpo-paper",
        "CPO with its likelihood term",
        # Section 3 weighs both terms equally, section 4.2 takes DPO's usual temperature.
        "Xu et al. 2024, arXiv 2401.08417, sections 3 and 4.2",
        {"dpo_cpo_loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0},
    ),
    Preset(
        "simpo",
        "SimPO",
        # The authors advise to start from gamma / beta 0.5 and beta 2 to 2.5, which is how they trained Llama-3-Base.
        "Meng et al. 2024, arXiv 2405.14734, and its repository princeton-nlp/SimPO",
        {"dpo_cpo_loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
    ),
    Preset(
        "cpo-simpo",
        "SimPO with the likelihood term of CPO",
        # No paper: these are the values of training_configs/llama-3-8b-instruct-cpo-simpo.yaml.
        "the repository fe1ixxu/CPO_SIMPO of the author of CPO",
        {"dpo_cpo_loss_type": "simpo", "beta": 10.0, "simpo_gamma": 5.4, "cpo_alpha": 0.05},
    ),
    Preset(
        "dpop",
        "DPO-Positive without a reference",
        # The paper's beta scales ratios to a reference that CPO does not have; 0.05 is what this project advises.
        "Pal et al. 2024, arXiv 2402.13228, for delta",
        {"dpo_cpo_loss_type": "dpop", "beta": 0.05, "delta": 50.0, "cpo_alpha": 0.0},
    ),
)
