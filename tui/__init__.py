"""The incident console. Nothing here yet: it will be a client of the local API (`sectool.api`), like the CLI."""
