"""Text to token windows: stores, order, packing, prefetch."""

from jsparse.data.loader import Batch, Loader
from jsparse.data.store import Store, build, open_source

__all__ = ["Batch", "Loader", "Store", "build", "open_source"]
