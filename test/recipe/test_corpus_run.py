"""Whole runs over the corpus of bad input: with --skip_bad_images none stops, and nothing that is left out goes unnamed."""

import json
import re

import corpus
import pytest
from pieces import note_calls

from library.data import loader
from library.errors import UserError

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of the corpus, what is to come of each file)."""
    folder = tmp_path_factory.mktemp("corpus")
    return folder, corpus.make(folder)


def rows_of(part: str, name: str, case: corpus.Case) -> set[str]:
    """The images of a file of the corpus that are trained on."""
    if part == "tars":
        return {f"{name}/{row}" for row in case.rows if row != "00003.png"}    # which is cut short
    return set() if case.fault or case.note else {name}


BUCKETS = ("--enable_bucket", "--min_bucket_reso", 32, "--max_bucket_reso", 128, "--bucket_reso_steps", 32)


@pytest.mark.parametrize("part, flags", [
    ("images", ()), ("images", (*BUCKETS, "--vae_cache_disable")), ("images", (*BUCKETS, "--vae_cache_ondemand")),
    ("captions", ()), ("tars", ()), ("tars", ("--vae_cache_disable",))], ids=str)
def test_a_run_over_bad_input(train, made, tmp_path, monkeypatch, capfd, part, flags):
    folder, cases = made
    cases = {name.partition("/")[2]: case for name, case in cases.items() if name.startswith(f"{part}/")}
    loaders = note_calls(monkeypatch, loader, "Loader")
    out = train("--train_data_dir", folder / part, "--skip_bad_images", *flags, "--num_train_epochs", 1,
                "--embedding_cache_dir", tmp_path / "cache", without=("max_train_steps",))
    said = "".join(capfd.readouterr())
    good = set().union(*(rows_of(part, name, case) for name, case in cases.items()))
    assert set(loaders[0][0][0].table.name.tolist()) == good
    for name, case in cases.items():
        if case.fault or case.note:
            assert name in said, f"{name} is left out in silence"
            assert re.search(case.fault or case.note, said)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) >= len(good) // 2 - len(good) // 4 and all(0 < line["loss"] < 100 for line in lines)


@pytest.mark.parametrize("part", ["images", "captions", "tars"])
def test_without_the_flag_it_stops_before_it_starts(train, made, tmp_path, part):
    with pytest.raises(UserError, match="--skip_bad_images"):
        train("--train_data_dir", made[0] / part, "--output_dir", tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.safetensors"))
