"""shared."""

import os

# At its first model pydantic reads the metadata of every installed package for plugins; this house has none.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
