"""Everything that reads: merged views from stores, how stale they are, and the HTTP API."""
