"""Image classifiers that spend on each picture only the computation it needs, and say how sure they are."""

__version__ = "0.1.0"

from .configuration_jeidnn import JEIDNNConfig
from .modeling_jeidnn import JEIDNNForImageClassification, JEIDNNOutput

__all__ = ["JEIDNNConfig", "JEIDNNForImageClassification", "JEIDNNOutput"]
