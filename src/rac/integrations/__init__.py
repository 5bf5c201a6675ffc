"""Foreign formats and frameworks. Within the library, only the commands import this package."""
