"""The model being served: how it evaluates trees, its cache, and how a step runs."""
