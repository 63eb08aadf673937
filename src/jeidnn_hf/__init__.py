"""Image classifiers that spend on each picture only the computation it needs, and say how sure they are."""

from importlib import import_module
from typing import TYPE_CHECKING

from .auto import register

__version__ = "0.1.0"

_HOMES = {
    "EarlyExitImageClassificationPipeline": "pipeline_jeidnn",
    "JEIDNNConfig": "configuration_jeidnn",
    "JEIDNNForImageClassification": "modeling_jeidnn",
    "JEIDNNImageProcessor": "image_processing_jeidnn",
    "JEIDNNOutput": "modeling_jeidnn",
    "JEIDNNTrainer": "trainer",
    "JEIDNNTrainingArguments": "training_args",
    "EvaluationReport": "evaluation",
    "ExitRecord": "record",
    "OperatingPoint": "operating_point",
    "evaluate": "evaluation",
}

__all__ = [
    "EarlyExitImageClassificationPipeline",
    "EvaluationReport",
    "ExitRecord",
    "JEIDNNConfig",
    "JEIDNNForImageClassification",
    "JEIDNNImageProcessor",
    "JEIDNNOutput",
    "JEIDNNTrainer",
    "JEIDNNTrainingArguments",
    "OperatingPoint",
    "evaluate",
]

if TYPE_CHECKING:
    from .configuration_jeidnn import JEIDNNConfig
    from .evaluation import EvaluationReport, evaluate
    from .image_processing_jeidnn import JEIDNNImageProcessor
    from .modeling_jeidnn import JEIDNNForImageClassification, JEIDNNOutput
    from .operating_point import OperatingPoint
    from .pipeline_jeidnn import EarlyExitImageClassificationPipeline
    from .record import ExitRecord
    from .trainer import JEIDNNTrainer
    from .training_args import JEIDNNTrainingArguments


def __getattr__(name: str):
    """Imports a public name when it is first asked for: the command line answers before torch is loaded."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register()
