"""What is minimised: functions of a model and a batch, with their metrics."""
