"""A report of stored samples: every figure with its interval, every plot, every rationale, in one HTML file.

    built = build(["runs/base/samples", "runs/trained/samples"])
    write(built, "report.html")

`system` reads stores, `rows`, `curves` and `rationales` compute, `page` and `plots` draw; none needs a model.
"""

from .building import Built, ReportConfig, build
from .figures import Report
from .page import html
from .writing import Written, write

__all__ = ["Built", "Report", "ReportConfig", "Written", "build", "html", "write"]
