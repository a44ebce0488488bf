"""Every sample, kept: an append-only store that metrics, rankings and plots are computed from without a
model."""

from .record import Judge, Provenance, SampleRecord, records_of, sample_key
from .sample_store import SampleStore

__all__ = ["Judge", "Provenance", "SampleRecord", "SampleStore", "records_of", "sample_key"]
