"""Reporting of runs: metrics, experiment trackers, plots, a summary and a model card."""
