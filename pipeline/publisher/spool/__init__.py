"""The spool: files in which a publisher records deltas and keeps batches, so that they outlive the process.

    spool folder/            VERSION, and a slot for each process that records or once did
        <name>/              a slot: LOCK is locked (flock) by the process that owns it, as long as it lives
            ring-S-N         segment N of ring S: deltas as records in shared memory, written without a call to the disk
            spool.db         SQLite: batches, pending deltas, the series, which segments there are and how far they are read
            SEAL             the number of the last transaction, so that a database that lost one is found out

Reading order: `ring` (records and segments), `slot` (folders and locks), `database` (rows and their checks), `live` (the
spool of a process that records), `orphan` (the slot of a process that is gone), `publisher` (a publisher's side of it).
"""
