"""The pure core: no clock, thread, socket, disk, logger or randomness. It decides; shells carry out.

Reading order: `record` (the nouns), `merge` (the algebra), `codec` (bytes), `sequence` (exactly once between publisher
and task), `route`, `task` (the protocol), `view` (answers).
"""
