"""The spool: what a publisher records, in files, so that it outlives the process.

    spool folder/            VERSION, and a slot for each process that records or once did
        <producer id>/       a slot: LOCK is locked (flock) by the process that owns it, as long as it lives
            ring-N           a segment: deltas as records of 16 bytes, written through shared memory, without a call to disk
            log-N            the journal: which series the records belong to, sealed batches, what was acknowledged

Reading order: `ring` (segments), `frames` (records with checksums in a file), `ledger` (what the records of the journal
mean), `journal` (the file that is appended to), `slot` (folders and locks), `live` (the spool of a process that records),
`leftover` (the slot of one that is gone), `drain` (sends those), `look` (what is there, without a change).
"""
