"""The exactness drive: workers, broker and disk fail in every way under a known load, and every answer is compared.

`python -m tests.broker.chaos --help`. Read `scenarios` first; then `load` (what is known), `watch` (what is checked each
second), `fleet` (the workers), `audit` (what is checked in the logs at the end), `drive` (all of it together). What others
do to an app is in `hostile` and `anew`: they publish beside the load (`others`, which a `ledger` checks), or write to its
topics (`stranger`, `tail`).
"""
