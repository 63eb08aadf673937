"""Ways to train inference modules, one file each, behind one interface."""

from .base import IMTraining, Phase
from .boosted import Boosted
from .diffbranch import DiffBranch
from .imta import IMTA
from .jeidnn import JEIDNN
from .l2w_den import L2WDEN
from .plain import Plain
from .soft_targets import SoftTargets

__all__ = ["IM_TRAININGS", "IMTraining", "Phase"]

IM_TRAININGS: dict[str, type[IMTraining]] = {
    "plain": Plain,
    "soft_targets": SoftTargets,
    "jeidnn": JEIDNN,
    "diffbranch": DiffBranch,
    "l2w_den": L2WDEN,
    "boosted": Boosted,
    "imta": IMTA,
}
