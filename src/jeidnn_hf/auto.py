"""Makes the Auto classes and pipelines of transformers know this package, when they are imported and not before.

Importing the Auto classes takes torch and seconds, so ``import jeidnn_hf`` leaves it to whoever uses them: a finder on
``sys.meta_path`` sees their modules come and registers ours once they are there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def _configs(auto: ModuleType) -> None:
    from .configuration_jeidnn import JEIDNNConfig

    auto.AutoConfig.register(JEIDNNConfig.model_type, JEIDNNConfig, exist_ok=True)


def _models(auto: ModuleType) -> None:
    from .modeling_jeidnn import JEIDNNConfig, JEIDNNForImageClassification

    auto.AutoModelForImageClassification.register(JEIDNNConfig, JEIDNNForImageClassification, exist_ok=True)


def _image_processors(auto: ModuleType) -> None:
    from .configuration_jeidnn import JEIDNNConfig
    from .image_processing_jeidnn import JEIDNNImageProcessor

    auto.AutoImageProcessor.register(JEIDNNConfig, image_processor_classes={"pil": JEIDNNImageProcessor}, exist_ok=True)


def _pipelines(_: ModuleType) -> None:
    from . import pipeline_jeidnn  # noqa: F401 - registers itself, also where it is what imports transformers' pipelines


class _AfterImport(MetaPathFinder):
    """Calls a function on a module right after its import."""

    def __init__(self, actions: dict[str, Callable[[ModuleType], None]]):
        self.waiting = dict(actions)

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        action = self.waiting.pop(fullname, None)
        spec = action and find_spec(fullname)  # by the other finders, as it waits no longer
        if spec is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            action(module)

        spec.loader.exec_module = exec_module
        return spec


def register() -> None:
    """Registers with what is imported already, and with the rest when it is."""
    actions = {
        "transformers.models.auto.configuration_auto": _configs,
        "transformers.models.auto.modeling_auto": _models,
        "transformers.models.auto.image_processing_auto": _image_processors,
        "transformers.pipelines": _pipelines,
    }
    sys.meta_path.insert(0, _AfterImport({name: actions[name] for name in actions if name not in sys.modules}))
    for name in actions:
        if name in sys.modules:
            actions[name](sys.modules[name])
