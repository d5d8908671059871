"""Hugging Face model folders in and out, GGUF in. No torch, no pickle, no remote code."""

from jsparse.hf.config import read_config
from jsparse.hf.folder import load, save, tokenizer_in
from jsparse.hf.gguf import import_gguf, load_gguf
from jsparse.hf.prune import prune_folder

__all__ = ["import_gguf", "load", "load_gguf", "prune_folder", "read_config", "save", "tokenizer_in"]
