"""Reads: merged views from stores, the bound on how stale they are, and the HTTP API.

`api` has the routes; `params` and `problems` turn requests and errors into values and back. `service` runs reads for an
event loop: `reader` merges stores, `ends` and `staleness` bound the age of what is missing. `dead_letters` lists and replays
what was refused; `stored_state` and `controls` serve writes. Start at `reader`.
"""
