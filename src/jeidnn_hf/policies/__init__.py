"""Policies other than the learned gates, one file each; each takes a budget and is fitted on an ExitRecord."""

from .threshold import ConfidenceThreshold

__all__ = ["ConfidenceThreshold"]
