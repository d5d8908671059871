"""Windows, packing and batches: nothing lost, nothing twice, the same on any number of hosts and after any resume."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jsparse.config import ConfigError, DataConfig, MeshConfig, Source
from jsparse.data import Batch, Loader, Store
from jsparse.data.loader import collate, cut, pack, prefetch
from jsparse.parallel import batch_sharding, make_mesh

DOCUMENTS = st.lists(st.integers(1, 40), min_size=1, max_size=30)  # lengths


def make_store(lengths, loss=None) -> Store:
    """Token i is i, so that a batch shows where it comes from."""
    offsets = np.cumsum([0, *lengths])
    return Store("store", np.arange(offsets[-1], dtype=np.uint32), offsets[:-1], loss)


def make_loader(*lengths, weights=None, **settings) -> Loader:
    stores = [make_store([n] if isinstance(n, int) else n) for n in lengths]
    sources = tuple(Source(f"store {k}", weight=w) for k, w in enumerate(weights or [1.0] * len(stores)))
    return Loader(stores, DataConfig(train=sources, **settings))


def same(a: Batch, b: Batch) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# -------------------------------------------------------------------------------------------------------------- windows


@given(length=st.integers(2, 200), seq_len=st.integers(1, 20))
@settings(deadline=None)
def test_windows_predict_each_token_but_the_first_once(length, seq_len):
    store, windows = make_store([length]), cut(make_store([length]), seq_len)
    batch = collate([(store, windows.spans(i)) for i in range(windows.count)], seq_len, segments=False)
    assert batch.targets.ravel().tolist() == list(range(1, windows.count * seq_len + 1))
    assert np.array_equal(batch.tokens + 1, batch.targets) and batch.loss_mask.all() and batch.segments is None
    assert length - 1 - windows.count * seq_len < seq_len  # the rest would not fill a window


@given(lengths=DOCUMENTS, seq_len=st.integers(1, 20))
@settings(deadline=None, max_examples=200)
def test_packing_loses_and_leaks_nothing(lengths, seq_len):
    store, windows = make_store(lengths), pack(make_store(lengths), seq_len)
    batch = collate([(store, windows.spans(i)) for i in range(windows.count)], seq_len, segments=True)
    document = np.repeat(np.arange(len(lengths)), lengths)  # of each token
    real = batch.segments > 0
    assert np.array_equal(real, batch.loss_mask)
    targets, inputs = batch.targets[real], batch.tokens[real]
    assert sorted(targets.tolist()) == sorted(set(range(len(document))) - set(store.offsets.tolist()))
    assert np.array_equal(inputs + 1, targets) and np.array_equal(document[inputs], document[targets])
    for row, segments in enumerate(batch.segments):
        for segment in range(1, segments.max() + 1):
            [places] = np.nonzero(segments == segment)
            tokens = batch.tokens[row, places]
            assert np.all(np.diff(places) == 1) and np.all(np.diff(tokens) == 1)
            # a document is split only where it exceeds a window: a segment starts with its first token or fills a row
            assert tokens[0] in store.offsets or (tokens[0] - store.offsets[document[tokens[0]]]) % seq_len == 0
        assert np.all(np.diff((segments > 0).astype(int)) <= 0)  # padding comes last


def test_packed_windows_are_full():
    lengths = np.clip(np.random.default_rng(0).lognormal(4, 1, 2000), 2, 1000).astype(int)
    windows = pack(make_store(lengths), 256)
    assert (lengths - 1).sum() / 256 / windows.count > 0.99


def test_loss_mask_belongs_to_the_target():
    loss = np.array([False, False, True, True, False, True, True])
    store = Store("sft", np.arange(7, dtype=np.uint16), np.array([0, 4]), loss)
    rows = [(store, cut(store, 6).spans(0))]
    assert collate(rows, 6, segments=False).loss_mask.tolist() == [loss[1:].tolist()]
    packed = pack(store, 5)
    batch = collate([(store, packed.spans(0))], 5, segments=True)
    assert batch.tokens.tolist() == [[0, 1, 2, 4, 5]] and batch.targets.tolist() == [[1, 2, 3, 5, 6]]
    assert batch.loss_mask.tolist() == [[False, True, True, True, True]]
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2]]


# ---------------------------------------------------------------------------------------------------------------- order


@given(windows=st.integers(1, 50), batch_size=st.integers(1, 8), seed=st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_every_window_once_an_epoch(windows, batch_size, seed):
    loader = make_loader(windows * 4 + 1, seq_len=4, batch_size=batch_size, seed=seed)
    steps = -(-3 * windows // batch_size)
    first = np.concatenate([loader.batch(step).tokens[:, 0] // 4 for step in range(steps)])[: 3 * windows]
    assert all(sorted(epoch) == list(range(windows)) for epoch in first.reshape(3, windows).tolist())


def test_epochs_and_seeds_and_sources_are_shuffled_differently():
    def order(source, **settings):
        loader = make_loader(401, 401, seq_len=4, batch_size=800, **settings)
        batch = loader.batch(0).tokens[:, 0]
        return batch[source::2].tolist()  # equal weights take turns

    both = order(0)
    epochs = both[:100], both[100:200], order(0, seed=1)[:100], order(1)[:100], list(range(0, 400, 4))
    assert len({tuple(epoch) for epoch in epochs}) == 5 and len({tuple(sorted(epoch)) for epoch in epochs}) == 1


@pytest.mark.parametrize("documents", ["windows", "packed"])
def test_a_batch_is_the_same_for_any_number_of_hosts(documents):
    loader = make_loader(
        [30, 7, 50, 3] * 5, [20] * 9, weights=[3.0, 1.0], seq_len=8, batch_size=12, documents=documents
    )
    for step in (0, 1, 77):
        whole = loader.batch(step)
        for hosts in (1, 2, 3, 4, 6, 12):
            rows = 12 // hosts
            parts = [loader.batch(step, range(host * rows, (host + 1) * rows)) for host in range(hosts)]
            assert same(whole, jax.tree.map(lambda *x: np.concatenate(x), *parts))


def test_mixture_proportions():
    loader = make_loader(4001, 401, 41, weights=[6.0, 3.0, 1.0], seq_len=4, batch_size=10)
    for step in (0, 1, 12345):
        source, _ = loader.locate(step * 10 + np.arange(10))
        assert np.abs(np.bincount(source) - [6, 3, 1]).max() <= 1
    source, window = loader.locate(np.arange(100_000))
    assert np.abs(np.bincount(source) / 100_000 - [0.6, 0.3, 0.1]).max() < 1e-4
    assert [len(np.unique(window[source == k])) for k in range(3)] == [1000, 100, 10]


# ----------------------------------------------------------------------------------------------------------- on devices


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
@pytest.mark.parametrize("documents", ["windows", "packed"])
def test_global_batches_hold_the_same_on_every_mesh(sizes, documents):
    loader = make_loader([9, 30] * 9, seq_len=8, batch_size=8, documents=documents, prefetch=1)
    mesh = make_mesh(MeshConfig(*sizes))
    with loader.iterate(5, mesh) as batches:
        for step in (5, 6, 7):
            batch = next(batches)
            assert same(batch, loader.batch(step))
            assert all(x.sharding == batch_sharding(mesh) for x in jax.tree.leaves(batch))
            assert (batch.tokens.dtype, batch.targets.dtype, batch.loss_mask.dtype) == (np.int32, np.int32, bool)


def test_each_row_is_read_once(monkeypatch):
    loader = make_loader(100, seq_len=8, batch_size=8)
    read, whole = [], loader.batch
    monkeypatch.setattr(loader, "batch", lambda step, rows: [read.append(rows), whole(step, rows)][1])
    loader.global_batch(0, make_mesh(MeshConfig(2, 2, 2)))
    assert sorted(read, key=lambda r: r.start) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]


def test_a_resumed_run_sees_the_same_batches():
    mesh = make_mesh(MeshConfig())
    settings = {"weights": [2.0, 1.0], "seq_len": 8, "batch_size": 8, "documents": "packed", "seed": 3}
    with make_loader([30, 7, 50, 3] * 5, [20] * 9, **settings).iterate(0, mesh) as batches:
        straight = [next(batches) for _ in range(9)]
    with make_loader([30, 7, 50, 3] * 5, [20] * 9, **settings).iterate(6, mesh) as batches:
        resumed = [next(batches) for _ in range(3)]
    assert all(same(a, b) for a, b in zip(straight[6:], resumed, strict=True))


# ------------------------------------------------------------------------------------------------------------- prefetch


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_prefetch_works_ahead_and_stops(ahead):
    made = []

    def make(step):
        made.append(step)
        return step * 10

    with prefetch(make, 4, ahead) as results:
        assert [next(results) for _ in range(5)] == [40, 50, 60, 70, 80]
    assert made == sorted(made) and 5 <= len(made) <= 5 + ahead
    assert not any(thread.name.startswith("jsparse-data") for thread in threading.enumerate())


def test_prefetch_runs_before_it_is_asked():
    started = threading.Event()
    with prefetch(lambda step: started.set(), 0, 2):
        assert started.wait(timeout=60)


def test_errors_reach_the_consumer_in_turn():
    def make(step):
        if step == 2:
            raise OSError("disk gone")
        return step

    with pytest.raises(OSError, match="disk gone"), prefetch(make, 0, 3) as results:
        assert [next(results), next(results)] == [0, 1]
        next(results)
    assert not any(thread.name.startswith("jsparse-data") for thread in threading.enumerate())


def test_leaving_drops_what_has_not_begun(monkeypatch):
    started, gate, made = threading.Event(), threading.Event(), []
    shutdown = ThreadPoolExecutor.shutdown

    def make(step):
        made.append(step)
        started.set()
        gate.wait(timeout=60)

    def open_gate_and_shutdown(pool, wait=True, cancel_futures=False):
        shutdown(pool, wait=False, cancel_futures=cancel_futures)
        gate.set()
        shutdown(pool, wait)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", open_gate_and_shutdown)
    with pytest.raises(KeyboardInterrupt), prefetch(make, 0, 50):
        started.wait(timeout=60)
        raise KeyboardInterrupt
    assert made == [0]


# ------------------------------------------------------------------------------------------------------------ bad input


def test_bad_settings():
    with pytest.raises(ConfigError, match=r"store: expected at least 9 tokens \(data.seq_len \+ 1\), got 8"):
        make_loader(100, 8, seq_len=8)
    with pytest.raises(ConfigError, match="store: expected at least"):
        make_loader([1] * 100, seq_len=8, documents="packed")
    with pytest.raises(ConfigError, match="expected `windows`, as bare does not know its documents, got 'packed'"):
        pack(Store("bare", np.arange(9, dtype=np.uint16)), 8)
    with pytest.raises(ConfigError, match=r"data\.train: expected one source or more"):
        Loader([], DataConfig())
    with pytest.raises(ConfigError, match=r"data\.batch_size: expected a multiple of .* \(8\), got 12"):
        make_loader(100, seq_len=8, batch_size=12).iterate(0, make_mesh(MeshConfig(4, 2, 1)))
    with pytest.raises(ConfigError, match="weight: expected a positive number, got 0"):
        Source("x", weight=0)
