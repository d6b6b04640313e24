"""Files of examples made into others: another format, a part held out, no duplicates, repaired; and what they are made
of.

All read rows as training does, so what cannot be trained on is named here too. Rows are compared by the conversation
that they say, whatever format they say it in (`posttrain.data.doctor.content`).
"""

from posttrain.data.change.convert import KEEP, convert
from posttrain.data.change.dedup import dedup
from posttrain.data.change.fix import fix
from posttrain.data.change.split import split
from posttrain.data.change.stats import stats
from posttrain.data.change.targets import TARGETS

__all__ = ["KEEP", "TARGETS", "convert", "dedup", "fix", "split", "stats"]
