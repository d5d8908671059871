"""The pages' commands and programs, as they stand there: what a reader copies has to work."""

import dataclasses
import functools
import re
import shlex
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse
from jsparse import config, hf
from jsparse.cli import Train, _parse
from jsparse.config import Relu, Router
from jsparse.train.optimizer import learning_rate
from pallas_kernels import pack
from tests.helpers import random_params, save_byte_tokenizer, tiny_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
IDS = (np.arange(200) * 7 % 251).tolist()


def commands() -> list[str]:
    """The lines of the pages and recipes that start with `jsparse`, without what stands in brackets as optional."""
    text = "\n".join(path.read_text() for path in [*PAGES, *RECIPES])
    found = re.findall(r"^(?:#|   ) +(jsparse [a-z](?:.*\\\n)*.*)", text, re.MULTILINE)
    return [re.sub(r"\[--[^\]]*\]", "", line.replace("\\\n#", " ").replace("\\\n", " ")) for line in found]


def test_commands_of_the_pages_and_recipes_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = commands()
    assert len(found) > 40
    for line in found:
        command = _parse(shlex.split(line, comments=True)[1:])
        if isinstance(command, Train):
            config.load(command.recipe, command.overrides)


def test_variants_that_recipes_name_are_recipes():
    word = r"(?:'[^']*'|[\w.]+=\S+)"
    count = 0
    for path in RECIPES:
        for overrides in re.findall(rf"^#  .*?  ({word}(?: {word})*)$", path.read_text(), re.MULTILINE):
            recipe, count = config.load(path, shlex.split(overrides)), count + 1
            learning_rate(recipe.optimizer, recipe.steps)
    assert count == 11


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def two_of_four(*shape: int) -> jax.Array:
    """A matrix that keeps 2 of each 4 consecutive outputs."""
    return jnp.where(jnp.arange(shape[1])[None] % 4 < 2, normal(*shape), 0.0)


def programs() -> list[pytest.param]:
    return [
        pytest.param(page, code, id=f"{page.stem}-{i}")
        for page in PAGES
        for i, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with what the programs read: two models and a text."""
    home = tmp_path_factory.mktemp("pages")
    save_byte_tokenizer(home)
    shape = {"vocab_size": 258, "num_hidden_layers": 1, "max_position_embeddings": 64, "bos_token_id": None}
    for name, made in (("smollm2", tiny_config(**shape)), ("OUT", tiny_config(**shape, router=Router(8)))):
        hf.save(home / name, made, random_params(made), tokenizer=home)
    (home / "held_out.txt").write_text("It was the best of times, it was the worst of times. " * 4)
    return home


def given(page: str, home: Path) -> dict[str, Any]:
    """What the pages say a name stands for, where no line of theirs makes it."""
    if page == "kernels":
        ffn = two_of_four(32, 64), two_of_four(32, 64), two_of_four(64, 32)
        return {
            "gate": ffn[0], "up": ffn[1], "down": ffn[2], "router": normal(2, 32), "x": normal(2, 32),
            "low": normal(8, 32), "high": normal(64, 8), "threshold": jnp.zeros(64), "weight": ffn[0],
            "ffn": [pack(w, 2, 4, "output") for w in ffn], "dense": normal(32, 32), "mask": np.eye(2, dtype=bool),
        }  # fmt: skip
    shape, params = hf.load(home / "smollm2")
    if page == "prosparse":
        shape = dataclasses.replace(shape, activation=Relu())
    tokens = jnp.asarray(IDS[:128], jnp.int32).reshape(16, 8)
    return {"config": shape, "params": params, "ids": IDS, "tokens": tokens, "batches": [tokens], "windows": tokens,
            "prompts": [IDS[:5]]}  # fmt: skip


@pytest.mark.parametrize(("page", "code"), programs())
def test_programs_of_the_pages_run(page, code, home, monkeypatch):
    monkeypatch.chdir(home)
    names = given(page.stem, home)
    monkeypatch.setattr(jsparse, "perplexity", functools.partial(jsparse.perplexity, seq_len=32))
    code = re.sub(r"max_new_tokens=\d+", "max_new_tokens=4", code).replace("rise=0.01", "rise=1e-3")
    if "tile_sparse_matmul" in code:
        names |= {"x": normal(256, 32), "hidden": normal(256, 64), "mask": jnp.eye(2, dtype=bool),
                  "w_gate": names["gate"], "w_down": names["down"]}  # fmt: skip
    if page.stem == "search":  # five thousand candidates: tests/test_search.py has a few
        code = code[: code.index("config, params =")]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as they are by default
        exec(compile(code, str(page), "exec"), names)
