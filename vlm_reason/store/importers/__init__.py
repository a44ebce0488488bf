"""Samples that another program drew, taken into a store: its metrics then need neither that program nor its model."""

from .importing import FORMATS, Imported, import_samples
from .source import Reading

__all__ = ["FORMATS", "Imported", "Reading", "import_samples"]
