"""The subcommands of ``python -m helixpipe``: each module adds its parsers and runs them."""
