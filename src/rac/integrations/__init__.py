"""Other people's formats and frameworks. Nothing inside the library imports this room but the verbs."""
