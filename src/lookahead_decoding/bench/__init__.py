"""Measuring honestly: methods taking turns on the same prompts, and one result type for table, file and plot."""

METHODS = ("autoregressive", "lookahead", "paper", "hf-greedy", "hf-static", "hf-prompt-lookup", "parallel")
