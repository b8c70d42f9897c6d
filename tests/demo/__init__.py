"""The bundled bases."""
