"""What a run records: the run folder, metrics and their definitions, timeline, environment, trackers."""
