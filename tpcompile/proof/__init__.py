"""Is the engine the model, and is the pruned model good enough: ``validate`` and ``verify``."""
