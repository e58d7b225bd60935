"""The command ``sppo``."""
