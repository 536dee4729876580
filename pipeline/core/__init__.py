"""The pure core: no clock, thread, socket, disk, logger or randomness. It decides; shells carry out.

Reading order: `record` (the nouns), `kinds` (the algebra), `codec` (bytes), `sequence` (exactly once between publisher
and task), `task` (the protocol), `query` (answers).
"""
