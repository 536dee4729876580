"""The embedded log: topics, partitions and transactions as in Kafka, in one RocksDB of one process.

Start with `log`. `chunks` is the layout of records, `checkpoint` a file beside the log that shows the loss of its newest
files, `integrity` the check and repair when it is opened, `reader` a cursor, `cleaner` retention and compaction.
"""
