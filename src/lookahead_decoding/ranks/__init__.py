"""Processes that share every step."""
