"""Ways to train inference modules, one file each, behind one interface."""

from .base import IMTraining, Phase
from .boosted import Boosted
from .imta import IMTA
from .jeidnn import JEIDNN
from .plain import Plain

__all__ = ["IM_TRAININGS", "IMTraining", "Phase"]

IM_TRAININGS: dict[str, type[IMTraining]] = {
    "plain": Plain,
    "jeidnn": JEIDNN,
    "boosted": Boosted,
    "imta": IMTA,
}
