"""Events in DuckDB, control history in SQLite, queries and time travel."""
