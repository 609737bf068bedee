"""The subcommands of `detot`, by subject."""
