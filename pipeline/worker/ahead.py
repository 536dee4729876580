"""What becomes of a store that is ahead of its changelog: the log lost what the store still has.

The store is the better copy, so it is never deleted. But it can't be used either: the changelog is what every owner, standby
and server restores from, and once others have gone on from there, the two are different histories. Writing the store's
entries into the changelog would mix them, and count twice what was counted in both. So a person decides. With `accept_loss`
the changelog counts, and the store is kept under another name, for `pipeline inspect` and whatever a person makes of it.
"""

from __future__ import annotations

import logging

import pipeline.metrics as m
from pipeline.errors import StoreAhead
from pipeline.metrics import Metrics
from pipeline.ports import Stores

_log = logging.getLogger(__name__)
HINT = "bring the changelog back, or start with --accept-loss to keep the store aside and go on with what the changelog says"


def set_store_aside(partition: int, stores: Stores, error: StoreAhead, *, accept_loss: bool, metrics: Metrics) -> None:
    """Keep a partition's store, which is closed, under another name, so that `open` makes a new one.

    Raises the error again, with what can be done, unless somebody has decided with `accept_loss`.
    """
    if not accept_loss:
        raise StoreAhead(f"{error}; {HINT}") from None
    kept = stores.set_aside(partition, str(error))
    metrics.inc(m.STORES_SET_ASIDE, 1, partition)
    _log.error("%s; the store is kept as %s, and the changelog counts", error, kept)
