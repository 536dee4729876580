"""Whoever folds: `follower` restores a store, `partition` carries out one task's protocol, `loop` runs many."""
