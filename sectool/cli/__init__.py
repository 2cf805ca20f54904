"""The command line: one module per noun, renderers, and nothing heavy until it is needed."""
