"""Source of the Grafana dashboards: `python -m dashboards.source` writes dashboards/*.json. It needs the extra `dev`."""
