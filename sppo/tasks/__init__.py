"""Datasets, rewards and initial models of the shipped recipes."""
