"""Ways to train inference modules, one file each, behind one interface."""

from .base import IMTraining, Phase
from .jeidnn import JEIDNN
from .plain import Plain

__all__ = ["IM_TRAININGS", "IMTraining", "Phase"]

IM_TRAININGS: dict[str, type[IMTraining]] = {
    "plain": Plain,
    "jeidnn": JEIDNN,
}
