"""Layer 5: what the command line's subcommands do. Each parses nothing and prints its result."""
