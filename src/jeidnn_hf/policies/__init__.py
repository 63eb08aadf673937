"""Exit policies, one file each; each is fitted to a budget on an ExitRecord, and is saved with a model."""

from ..gates import ExitPolicy
from .active import ActiveExits, choose_active_exits
from .eenet import EENetScheduler
from .learned import LearnedGates, check_active_exits
from .patience import Patience
from .quota import QuotaThresholds
from .random import RandomExits
from .threshold import ConfidenceThreshold

__all__ = [
    "POLICIES",
    "ActiveExits",
    "ConfidenceThreshold",
    "EENetScheduler",
    "LearnedGates",
    "Patience",
    "QuotaThresholds",
    "RandomExits",
    "check_active_exits",
    "choose_active_exits",
    "policy_class",
]

POLICIES: dict[str, type[ExitPolicy]] = {
    "gates": LearnedGates,
    "threshold": ConfidenceThreshold,
    "quota": QuotaThresholds,
    "patience": Patience,
    "random": RandomExits,
    "eenet": EENetScheduler,
}


def policy_class(name: str) -> type[ExitPolicy]:
    """The class behind a name of `POLICIES`; a ValueError for any other."""
    if name not in POLICIES:
        raise ValueError(f"Expected policy to be one of {tuple(POLICIES)}, but got {name!r}.")
    return POLICIES[name]
