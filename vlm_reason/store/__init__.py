"""Every sample, kept: an append-only store that metrics, rankings and plots are computed from without a
model."""

from .columns import Columns, columns_of
from .record import Judge, Provenance, SampleRecord, records_of, sample_key
from .sample_store import SampleStore
from .settings import check_one_setting, drawn_twice

__all__ = [
    "Columns",
    "Judge",
    "Provenance",
    "SampleRecord",
    "SampleStore",
    "check_one_setting",
    "columns_of",
    "drawn_twice",
    "records_of",
    "sample_key",
]
