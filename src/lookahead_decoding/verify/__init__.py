"""Which tokens a step emits."""
