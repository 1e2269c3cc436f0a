"""Requests, and the loop that answers them."""
