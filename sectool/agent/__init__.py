"""The daemon's root process: keys, policy revisions, workloads, and supervision of store and workers."""
