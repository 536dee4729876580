"""Dashboards, alerts and scrape config; their source is in `source`."""
