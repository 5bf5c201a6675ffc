"""The verbs of the command line, one module each; `rac.cli` imports the one that is called.

Each module has a frozen dataclass `Command` whose fields are the options, and whose `run()` gives the exit code.
"""
