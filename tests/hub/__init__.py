"""A small Hub over HTTP for the real huggingface_hub client; see server.py."""

from tests.hub.server import Hub

__all__ = ["Hub"]
