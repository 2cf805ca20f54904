"""What is known of this host beyond what its kernel and its operator say: where it stands, what is wrong with it."""
