"""What a step guesses: token trees, and where candidates come from. Integers only, no torch."""
