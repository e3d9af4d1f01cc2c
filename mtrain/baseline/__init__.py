"""Did sharing help: baselines that learn each task by itself, or all of them by a linear model, on a run's tasks and splits."""
