"""Where deltas wait. `table` is where recorded deltas accumulate until they are drained, `view` what apps record to,
`drafts` how what was drained becomes batches, `flusher` what is done with a table each time, `spool` what outlives a kill.

The first two exist twice: in Python, which says what they do, and in the native core, which does the same (`table_type`).
"""

from __future__ import annotations

from pipeline import native
from pipeline.publisher.table import Table


def table_type() -> type[Table]:
    """Return the native table where the native core is in use, and else the plain one.

    The native class is no subclass of the plain one, but has the same interface; so have the views that it defines.
    """
    extension = native.extension()
    return Table if extension is None else extension.Table
