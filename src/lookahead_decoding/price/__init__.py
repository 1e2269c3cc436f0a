"""What a step is worth: how many rows pay, and what was counted. Integers only, no torch."""
