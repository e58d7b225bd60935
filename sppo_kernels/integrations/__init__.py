"""Integrations with other trainers. Importing one changes nothing: each has a ``patch()`` and an ``unpatch()``."""
