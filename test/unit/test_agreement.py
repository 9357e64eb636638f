"""Processes that disagree are refused at the start, and told what differs, where. Here they are threads."""

import os
import threading
from argparse import Namespace
from pathlib import Path

import numpy as np
import psutil
import pytest

from library.data.specs import Fixed, Origin, Spec
from library.data.table import Text, build, flatten
from library.errors import UserError
from library.training import agreement, processes
from library.validation import class_images


@pytest.fixture
def among(monkeypatch):
    """`among(world, function)`: function(rank) in as many threads that meet as processes do -> what each returned or raised."""
    own = threading.local()

    def among(world, function):
        meeting, given, ends = threading.Barrier(world, timeout=20), {}, [None] * world

        def gather(values, faulty=False):
            given[own.rank] = (faulty, values)
            meeting.wait()
            parts = [given[rank] for rank in range(world)]
            meeting.wait()
            if len({apart for apart, _ in parts}) > 1:
                raise processes.Apart("they do not see the same")
            return [value for _, part in parts for value in part]

        for name, value in (("rank", lambda: own.rank), ("world", lambda: world), ("gather", gather),
                            ("host", lambda: "abcdefgh"[own.rank // 2]), ("machine", lambda: f"boot {own.rank // 2}")):
            monkeypatch.setattr(processes, name, value)

        def run(rank):
            own.rank = rank
            try:
                ends[rank] = function(rank)
            except (UserError, SystemExit) as error:
                ends[rank] = error

        threads = [threading.Thread(target=run, args=[rank]) for rank in range(world)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        return ends

    return among


def refused(ends) -> str:
    """What the main process says; the others leave with its status and say nothing."""
    assert isinstance(ends[0], UserError), ends
    assert all(isinstance(end, SystemExit) and end.code == 2 for end in ends[1:]), ends
    return str(ends[0])


def test_flags(among):
    def flags(rank, **other):
        return Namespace(learning_rate=1e-4, seed=1, train_data_dir=f"/data{rank}", output_dir=f"/mnt{rank}/out", **other)

    assert among(4, lambda rank: agreement.check_start(flags(rank), "cpu")) == [None] * 4
    said = refused(among(4, lambda rank: agreement.check_start(
        Namespace(**vars(flags(rank)) | {"learning_rate": 2e-4 if rank == 2 else 1e-4}), "cpu")))
    assert "--learning_rate is 0.0001 on rank 0 (host a, and 2 more) and 0.0002 on rank 2 (host b)" in said
    said = refused(among(2, lambda rank: agreement.check_start(flags(rank, **({"use_ema": True} if rank else {})), "cpu")))
    assert "--use_ema is absent on rank 0 (host a) and True on rank 1 (host a)" in said
    said = refused(among(2, lambda rank: agreement.check_start(flags(rank), "cpu" if rank else "npu")))
    assert "the device is npu on rank 0 (host a) and cpu on rank 1 (host a)" in said


def test_at_most_three_differences_are_told(among):
    said = refused(among(2, lambda rank: agreement.check("their flags", {f"--f{n}": rank for n in range(5)}, "Do.")))
    assert said.count(" on rank 0 ") == 3 and "and 2 more. Do." in said


def test_versions_and_code(among, monkeypatch):
    kept = agreement.version
    monkeypatch.setattr(agreement, "version", lambda name: f"9.{processes.rank()}" if name == "numpy" else kept(name))
    said = refused(among(2, lambda rank: agreement.check_start(Namespace(), "cpu")))
    assert "what is installed: numpy is 9.0 on rank 0 (host a) and 9.1 on rank 1 (host a)." in said
    monkeypatch.setattr(agreement, "version", kept)
    code = agreement._code()
    monkeypatch.setattr(agreement, "_code", lambda: code | {"library/flags.py": f"d{processes.rank()}"})
    said = refused(among(2, lambda rank: agreement.check_start(Namespace(), "cpu")))
    assert "their code: library/flags.py is d0 on rank 0 (host a) and d1 on rank 1 (host a)." in said


def test_every_file_of_the_code_counts():
    found, root = agreement._code(), Path(agreement.__file__).parents[2]
    assert {str(path.relative_to(root)) for path in root.glob("library/**/*.py")} <= set(found)
    assert len(set(found.values())) > 50


def test_the_model(among, tmp_path):
    for rank in range(2):
        (tmp_path / f"{rank}").mkdir()
        (tmp_path / f"{rank}/config.json").write_text("{}")
        with open(tmp_path / f"{rank}/weights", "wb") as file:    # mostly a hole
            file.truncate(200 * 2**20)

    def check(rank):
        return agreement.check_model({f"unet/{name}": tmp_path / f"{rank}/{name}" for name in ("weights", "config.json")})

    assert among(2, check) == [None, None]
    with open(tmp_path / "1/weights", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert "unet/weights is " in refused(among(2, check))
    (tmp_path / "1/config.json").write_text('{"a": 1}')
    assert "unet/config.json is " in refused(among(2, check))


def table(names, content, captions):
    records = np.zeros(len(names), [("width", "i4"), ("height", "i4"), ("content", "S32")])
    records["width"], records["height"], records["content"] = 80, 64, content
    texts, start = flatten([[text] for text in captions])
    return build(Spec("set", Origin("folder", "x"), Fixed((64, 64))), records, np.array(names, Text), texts, start)[0]


@pytest.mark.parametrize("other, said", [
    ({}, None),
    ({"captions": ["one", "zwei", "three"]}, "b.png is not the same"),
    ({"content": [b"1", b"2", b"4"]}, "c.png is not the same"),
    ({"names": ["a.png", "c.png", "d.png"]}, "row 2 is b.png on rank 0 and c.png on rank 1; row 3 is c.png on rank 0 and d.png"),
    ({"names": ["a.png", "b.png"], "content": [b"1", b"2"], "captions": ["one", "two"]},
     "row 3 is c.png on rank 0 and nothing on rank 1"),
    ({"names": list("abcd"), "content": [b"1"] * 4, "captions": ["one"] * 4},
     "rank 0 (host a, 3 images) and rank 1 (host a, 4 images)")])
def test_the_data(among, other, said):
    usual = {"names": ["a.png", "b.png", "c.png"], "content": [b"1", b"2", b"3"], "captions": ["one", "two", "three"]}
    tables = [table(**usual), table(**usual | other)]
    ends = among(2, lambda rank: agreement.check_table(tables[rank]))
    assert ends == [None, None] if said is None else said in refused(ends)
    if "names" in other:
        ends = among(2, lambda rank: agreement.check_names(tables[rank].name, "x"))
        assert "the images in x differ" in refused(ends)


def test_faults_that_not_all_meet(among):
    def check(rank):
        agreement.check_fault(UserError(f"fault {rank}"))

    def one(rank):
        if rank:
            agreement.check_fault(UserError("mine"))
        else:
            processes.gather(["something else"])

    assert among(3, check) == [None] * 3
    with pytest.raises(processes.Apart):    # compared already: nobody is waited for
        agreement.check_fault(processes.Apart("x"))
    ends = among(2, one)
    assert isinstance(ends[0], processes.Apart) and str(ends[1]) == "mine"


def test_teams(among, tmp_path):
    """By what they see: one folder under other names is one, and folders of one name are none."""
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    folders = [tmp_path / "a", tmp_path / "link", tmp_path / "b", tmp_path / "a"]
    assert among(4, lambda rank: processes.team(folders[rank])) == [[0, 1, 3], [0, 1, 3], [2], [0, 1, 3]]
    assert not list((tmp_path / "a").iterdir())
    assert among(2, lambda rank: processes.share([*range(5)], [0, 1])) == [[0, 2, 4], [1, 3]]
    assert among(3, lambda rank: processes.alike("x" if rank == 1 else "y")) == [([0, 2], "a"), ([1], "a"), ([0, 2], "a")]


def test_a_folder_that_cannot_be_written_to_is_one_on_each_machine(among, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "touch", lambda path: (_ for _ in ()).throw(PermissionError()))
    assert among(4, lambda rank: processes.team(tmp_path)) == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_the_output_is_one_folder(among, tmp_path):
    assert among(4, lambda rank: agreement.check_output(tmp_path)) == [None] * 4
    said = refused(among(4, lambda rank: agreement.check_output(tmp_path / str(rank // 2))))
    assert "rank 2 (host b) does not see what rank 0 (host a) writes there" in said


def test_machines_are_told_apart_and_face_each_other(monkeypatch):
    """By more than their names; gloo listens where the first process is reached, and only if there are several machines."""
    name = processes.machine()
    assert name == processes.machine() and name.startswith(processes.host()) and len(name) > len(processes.host()) + 30
    monkeypatch.setattr(processes, "host", lambda: "localhost")
    assert processes.machine() != name
    loopback = next(name for name, found in psutil.net_if_addrs().items() if any(one.address == "127.0.0.1" for one in found))
    usual = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "7000", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    for other, faced in (({}, loopback), ({"LOCAL_WORLD_SIZE": "2"}, None), ({"LOCAL_WORLD_SIZE": None}, None),
                         ({"MASTER_ADDR": "none.invalid"}, None), ({"MASTER_ADDR": None}, None),
                         ({"GLOO_SOCKET_IFNAME": "eth7"}, "eth7")):
        with monkeypatch.context() as patch:
            patch.delenv("GLOO_SOCKET_IFNAME", raising=False)
            for key, value in (usual | other).items():
                patch.delenv(key, raising=False) if value is None else patch.setenv(key, value)
            processes.face_others()
            assert os.environ.pop("GLOO_SOCKET_IFNAME", None) == faced


def test_what_accelerates_configs_say(among, monkeypatch):
    def engine(precision="no", kind="MULTI_CPU"):
        return Namespace(mixed_precision=precision, distributed_type=Namespace(value=kind))

    assert among(2, lambda rank: agreement.check_engine(engine())) == [None] * 2
    assert "mixed_precision is bf16 on rank 0 (host a) and fp16 on rank 1" in refused(
        among(2, lambda rank: agreement.check_engine(engine("fp16" if rank else "bf16"))))
    assert "distributed_type is MULTI_GPU on rank 0" in refused(
        among(2, lambda rank: agreement.check_engine(engine(kind="FSDP" if rank else "MULTI_GPU"))))


def test_class_images_go_to_one_folder(among, tmp_path):
    assert among(2, lambda rank: class_images.missing(tmp_path / "shared", 2, 0)) == [[0, 1]] * 2
    ends = among(2, lambda rank: class_images.missing(tmp_path / f"own{rank}", 2, 0))
    assert all("is not one folder for all processes" in str(end) for end in ends)
    (tmp_path / "own1" / "one.png").touch()
    assert "the images to draw is 2 on rank 0" in refused(
        among(2, lambda rank: class_images.missing(tmp_path / f"own{rank}", 2, 0)))
