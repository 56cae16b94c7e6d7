"""Which codec a link needs: step times predicted before anything is trained.

model.py    an alpha-beta model of a step
measure.py  what it needs to know of this machine and its links
table.py    ``commrt plan``
"""

from commrt.plan.measure import measure_cluster, measure_codec, measure_link
from commrt.plan.model import (
    INSIDE,
    Cluster,
    CodecTimes,
    Job,
    Link,
    Prediction,
    parse_rate,
    predict,
    recommend,
)
from commrt.plan.table import plan_table

__all__ = [
    "INSIDE",
    "Cluster",
    "CodecTimes",
    "Job",
    "Link",
    "Prediction",
    "measure_cluster",
    "measure_codec",
    "measure_link",
    "parse_rate",
    "plan_table",
    "predict",
    "recommend",
]
