"""The ``sppo`` command: train, evaluate and inspect from a shell."""
