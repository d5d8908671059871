"""jsparse: sparse LLaMA models in JAX.

    config, params = jsparse.load("model-folder")
    output = jsparse.forward(params, tokens, config)
    jsparse.perplexity(params, config, token_ids)
    jsparse.generate(params, config, [prompt_ids], max_new_tokens=64)
    jsparse.save("new-folder", config, params)

Everything works on parameters that you hold: a plain nested dict of arrays, and a frozen config beside it.
"""

from typing import Any

from jsparse import methods
from jsparse.config import ConfigError, LlamaConfig, TrainConfig
from jsparse.hf import load, save
from jsparse.inference import Sampling, compare, generate
from jsparse.inference import evaluate as perplexity
from jsparse.model import Output, cast, forward, init

__all__ = [
    "ConfigError",
    "LlamaConfig",
    "Output",
    "Sampling",
    "TrainConfig",
    "cast",
    "compare",
    "forward",
    "generate",
    "init",
    "load",
    "methods",
    "perplexity",
    "save",
]


def __getattr__(name: str) -> Any:
    """`__version__`, from the metadata of the installed package, read when it is asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("jsparse")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
