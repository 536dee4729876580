"""Implementations of the ports: each module wraps one outside system, and translates its errors into those of
`pipeline.errors`.
"""
