"""What to train, in what order: presets and schedules."""
