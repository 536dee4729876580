"""Folding of partitions.

Start with `partition`, which carries out the protocol of one task. `loop` runs many partitions; `active` is the life of
each, `commits` the schedule of commits. `restore` opens and rebuilds stores, `follower` applies a changelog to them, for
`replicas` (standbys, servers), too. `foreign`, `covered` and `history` deal with records that others wrote or the log lost.
"""
