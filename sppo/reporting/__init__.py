"""What a run reports: metrics, trackers, pictures, a summary and a model card."""
