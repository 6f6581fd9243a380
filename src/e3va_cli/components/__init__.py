"""Options as dataclass fields, and the registry of the components that declare them."""
