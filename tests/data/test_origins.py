"""Where a batch's tokens come from: held against the batches themselves, the documents' names and the text."""

from __future__ import annotations

import collections
import json
import pathlib
import random

import numpy as np
import pytest

from gptjax.data.origins import batch_origins, step_batch
from gptjax.data.pipeline import Split, batch_documents, load_dataset
from tests.small import small

KNOBS = {
    "data.source": "jsonl",
    "data.packing": "packed",
    "data.eval_fraction": 0.3,
    "data.seq_len": 32,
    "data.batch_size": 4,
    "model.vocab_size": 0,
    "model.max_seq_len": 32,
}
CASES = {
    "packed": {},
    "padded": {"data.packing": "padded"},
    "windows": {"data.packing": "windows"},
    "in order": {"data.shuffle": False},
    "batch warm-up": {"train.batch_warmup_start": 1, "train.batch_warmup_steps": 4},
    "length warm-up": {"train.seq_len_warmup_start": 8, "train.seq_len_warmup_steps": 4},
    "windows, length warm-up": {"data.packing": "windows", "train.seq_len_warmup_start": 8, "train.seq_len_warmup_steps": 4},
    "masked": {"objective.name": "masked"},
    "masked windows": {"objective.name": "masked", "data.packing": "windows"},
    "spans": {"objective.name": "span"},
    "windows with a gap": {"objective.name": "infill", "data.packing": "windows"},
    "prefix": {"objective.name": "prefix"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("documents")
    for name in ("a", "b"):
        texts = ["".join(rng.choices("abcdefgh ij", k=rng.randint(3, 60))) for _ in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    return folder


@pytest.mark.parametrize("is_mixture", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_each_place_of_a_batch_is_the_token_of_its_document(folder, case: str, is_mixture: bool):
    where = {"data.path": str(folder / "a.jsonl")}
    if is_mixture:
        where = {"data.mixture": tuple(f"{name}=jsonl:{folder / name}.jsonl" for name in "ab")}
    config = small(KNOBS, CASES[case], where)
    dataset = load_dataset(config, lambda line: None)
    config = dataset.settled(config)
    for step, skipped in ((0, 0), (1, 0), (2, 5), (5, 0), (37, 11)):
        batch = step_batch(config, dataset.train, step, skipped)
        origins = batch_origins(config, dataset.train, step, skipped)
        assert origins.place.shape == batch["tokens"].shape
        _check_rows(config.objective.name, origins, batch)
        names = set()
        for source, document in zip(origins.source[origins.place >= 0], origins.document[origins.place >= 0], strict=True):
            split = origins.splits[source]
            names.add(f"{split.source}:{split.names[document]}" if is_mixture else split.names[document])
        # Of an empty end of a window that a longer row has, the step's list of documents may say one more.
        listed = set(batch_documents(config, dataset.train, step, skipped))
        assert names == listed if config.data.packing != "windows" else names <= listed


def _check_rows(objective: str, origins, batch) -> None:
    for row in range(len(batch["tokens"])):
        for segment in np.unique(batch["segment_ids"][row][batch["segment_ids"][row] > 0]):
            here = np.zeros(origins.place.shape, bool)
            here[row] = origins.segment_ids[row] == segment
            text = origins.ids(here)
            shown = batch["tokens"][row][batch["segment_ids"][row] == segment]
            if objective in ("causal", "prefix"):
                np.testing.assert_array_equal(text, shown)
            elif objective == "masked":
                targets = batch["targets"][row][batch["segment_ids"][row] == segment]
                np.testing.assert_array_equal(text[targets >= 0], targets[targets >= 0])
                np.testing.assert_array_equal(text[targets < 0], shown[targets < 0])
            else:  # tokens change their places, and others come between them
                assert not collections.Counter(text.tolist()) - collections.Counter(shown.tolist())


def test_places_beyond_31_bits(folder, monkeypatch: pytest.MonkeyPatch):
    """A small data set, counted as if batches had room for 4 bits of a place."""
    config = small(KNOBS, {"data.path": str(folder / "a.jsonl")})
    dataset = load_dataset(config, lambda line: None)
    whole = batch_origins(config, dataset.train, 3)
    monkeypatch.setattr("gptjax.data.origins._LOW_BITS", 4)
    again = batch_origins(config, dataset.train, 3)
    assert isinstance(dataset.train, Split) and whole.place.max() > 1 << 4
    np.testing.assert_array_equal(whole.place, again.place)
    np.testing.assert_array_equal(whole.document, again.document)
