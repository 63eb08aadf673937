"""The metrics as modules of Hugging Face's ``evaluate``, loaded from this package, offline:

    evaluate.load(jeidnn_hf.evaluate_modules.path("ece")).compute(predictions=probs, references=labels)

Each takes its inputs in batches and hands them to the function of ``metrics.py`` or ``conformal.py``.
"""

from __future__ import annotations

from pathlib import Path

NAMES = ("accuracy_at_cost", "ece", "prediction_sets", "proper_scores")


def path(name: str) -> str:
    """Folder of one of NAMES, for ``evaluate.load``; a ValueError for another."""
    if name not in NAMES:
        raise ValueError(f"Expected an evaluate module among {NAMES}, but got {name!r}.")
    return str(Path(__file__).parent / name)
