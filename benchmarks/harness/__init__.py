"""Infrastructure of the suites: registration, result files, timing, checking, operations and peers."""
