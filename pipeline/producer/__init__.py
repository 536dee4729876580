"""Whoever sends: `cell` and `buffer` hold deltas, `client` drains them, `delivery` sends; `gateway` is for HTTP clients."""
