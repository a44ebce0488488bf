"""Every sample, kept: an append-only store that metrics, rankings and plots are computed from without a
model."""

from .columns import Columns, columns_of
from .record import Judge, Provenance, SampleRecord, records_of, sample_key
from .sample_store import SampleStore

__all__ = [
    "Columns",
    "Judge",
    "Provenance",
    "SampleRecord",
    "SampleStore",
    "columns_of",
    "records_of",
    "sample_key",
]
