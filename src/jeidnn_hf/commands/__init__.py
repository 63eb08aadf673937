"""The commands of ``jeidnn``, one per module, thin over the rooms; what is slow to import is imported when one runs."""
