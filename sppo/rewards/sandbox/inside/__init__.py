"""Programs that the sandbox executes. They import nothing from the package, which does not exist inside."""
