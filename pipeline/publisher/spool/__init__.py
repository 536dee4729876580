"""The spool: what a publisher records, in files, so that it outlives the process.

    spool folder/            VERSION, and a slot for each process that records or once did
        <name>/              a slot: LOCK is locked (flock) by the process that owns it, as long as it lives
            ring-S-N         segment N of ring S: deltas as records in shared memory, written without a call to the disk
            spool.db         SQLite: batches, what is pending, the series, which segments there are and what is read of them
            SEAL             the number of the last transaction, so that a database that lost one is found out

Reading order: `ring` (records and segments), `slot` (folders and locks), `database` (what is in the database, and how it is
checked), `live` (the spool of a process that records; `apart`: what nothing may interrupt there), `leftover` (the slot of
one that is gone), `look` (what is there, without a change).
"""
