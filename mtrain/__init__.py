"""mtrain: a trainer for models with 100 to 10,000 tasks."""

__version__ = "0.1.0"
