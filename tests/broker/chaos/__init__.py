"""The exactness drive: workers, broker and disk fail in every way under a known load, and every answer is compared.

`python -m tests.broker.chaos --help`. Read `scenarios` first; then `load` (deltas whose sums are known), `watch` (checks
made each second), `fleet` (the workers), `audit` (checks of the logs at the end), `drive` (everything together). Harm done
by other clients is in `hostile` and `anew`: they publish beside the load (`others`, which a `ledger` checks), or write to
the app's topics (`stranger`, `tail`).
"""
