"""Under other people's trainers. To import one changes nothing: each has a ``patch()`` and an ``unpatch()``."""
