"""What the shipped recipes name: prompts with their rewards, and the models to start from."""
