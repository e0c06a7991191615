"""infra.local."""
