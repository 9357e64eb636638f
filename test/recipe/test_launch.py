"""The launch scripts, run as they are typed: their flags, their table of results, their failure."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import netns
import pytest
from forks import free_port

TEST = Path(__file__).parents[1]
SCRIPTS = sorted(path.name for kind in ("pretrain_full", "train_lora") for path in TEST.glob(f"{kind}_*.sh"))
TABLE = ("Network", "RankSize", "BatchSize", "DeviceType", "CaseName", "ActualFPS", "TrainingTime", "ActualLoss",
         "E2ETrainingTime")
SMALL = ("--resolution=64,64", "--min_bucket_reso=32", "--max_bucket_reso=128", "--bucket_reso_steps=32", "--report_to=none",
         "--logging_steps=1", "--device=cpu", "--vae_name=")


def environment(**more) -> dict[str, str]:
    return {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **more}


def launch(name: str, *flags, where: Path, **more) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(TEST / name), *map(str, flags)], cwd=where, env=environment(**more), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def table(folder: Path) -> dict:
    """The result of a run, whole; as text and as JSON the same."""
    path, = (path for path in folder.glob("*_acc.log"))
    found = json.loads(path.with_suffix(".json").read_text())
    assert path.read_text() == "".join(f"{name} = {value}\n" for name, value in found.items())
    assert all(found[name] not in ("", None) for name in TABLE)
    return found


def check(folder: Path, said: str, network: str, ranks: int, batch: int, steps: range) -> None:
    """The table is right: recomputed from the times in the log, and from the losses."""
    found = table(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    counted = lines[found["WarmUpSteps"]:]
    seconds = counted[-1]["seconds"] - lines[found["WarmUpSteps"] - 1]["seconds"]
    assert 1 <= found["WarmUpSteps"] <= 2 and len(lines) == found["Steps"] and len(lines) in steps
    assert found["ActualFPS"] == pytest.approx(len(counted) * ranks * batch / seconds, rel=0.02)
    assert found["TrainingTime"] == pytest.approx(ranks * batch / found["ActualFPS"], rel=1e-3)
    assert found["ActualLoss"] == pytest.approx(sum(line["loss"] for line in lines) / len(lines), rel=1e-5)
    assert found["E2ETrainingTime"] > seconds
    assert 0 <= found["WaitShare"] < 1
    assert {name: found[name] for name in ("Network", "RankSize", "BatchSize", "DeviceType", "CaseName")} == {
        "Network": network, "RankSize": ranks, "BatchSize": batch, "DeviceType": platform.machine(),
        "CaseName": f"{network}_bs{batch}_{ranks}p_acc"}
    for title, name in (("Final Performance images/sec", "ActualFPS"), ("Final Train Loss", "ActualLoss"),
                        ("E2E Training Duration sec", "E2ETrainingTime")):
        assert f"\n{title} : {found[name]}\n" in said


@pytest.fixture(scope="module")
def data(tiny_images):
    return f"--dataset_name={tiny_images}"


def test_one_process_from_another_folder(tiny_model, data, tmp_path):
    done = launch("pretrain_full_1m_1p_sdxl.sh", f"--model_name={tiny_model}", data, *SMALL, "--max_train_epoch=10",
                  "--batch_size", 3, "--output_path=here", where=tmp_path)
    assert done.returncode == 0, done.stdout
    check(tmp_path / "here", done.stdout, "sdxl_full", 1, 3, range(18, 21))
    assert (tmp_path / "here" / "train_0.log").read_text() in done.stdout
    assert (tmp_path / "here" / "unet").is_dir() and (tmp_path / "here" / "text_encoder").is_dir()


def test_several_processes(tiny_model, data, tmp_path):
    done = launch("pretrain_full_1m_8p_sdxl.sh", f"--model_name={tiny_model}", data, *SMALL, "--max_train_steps", 11,
                  "--batch_size=1", "--nproc_per_node=2", f"--output_path={tmp_path / 'run'}", where=tmp_path)
    assert done.returncode == 0, done.stdout
    check(tmp_path / "run", done.stdout, "sdxl_full", 2, 1, range(11, 12))


PARSER = """#!{python}
import sys
from pathlib import Path
place = next(index for index, word in enumerate(sys.argv) if word.endswith(".py"))
sys.path.insert(0, str(Path(sys.argv[place]).parent))
if "result.py" not in sys.argv[place]:
    head, sys.argv[0] = {{}}, sys.argv[place]
    exec(Path(sys.argv[place]).read_text().split("if __name__ ==")[0], head)    # what stands before the imports that take seconds
    args = head["parse_args"](sys.argv[place + 1:])
    print(sys.argv[1:place], {{name: getattr(args, name) for name in ("train_batch_size", "resolution", "num_train_epochs",
          "mixed_precision", "pretrained_model_name_or_path", "dataset_name", "max_train_steps", "noise_offset")}})
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_its_flags_are_those_of_the_training_script(name, tmp_path):
    """All nine, with a Python that reads the command line as the training script does, and stops there."""
    parser = tmp_path / "python"
    parser.write_text(PARSER.format(python=sys.executable))
    parser.chmod(0o755)
    machines = ("--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port", 7000) if "nm_np" in name else ()
    flags = ("--device=cpu", "--max_train_epoch=13", "--batch_size=2", "--resolution", "512,512", "--noise_offset=0.5",
             "--output_path=run", *machines)
    done = launch(name, *flags, where=tmp_path, PYTHON=str(parser))
    assert done.returncode == 0, done.stdout
    for part in ("'train_batch_size': 2", "'resolution': (512, 512)", "'num_train_epochs': 13", "'mixed_precision': 'no'",
                 "'dataset_name': 'lambdalabs/naruto-blip-captions'", "'max_train_steps': None", "'noise_offset': 0.5"):
        assert part in done.stdout
    asked = {"1m_1p": "[]", "1m_8p": "['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=8', '--max_restarts=0']",
             "nm_np": "['-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=8', '--node_rank=1', "
                      "'--master_addr=10.0.0.1', '--master_port=7000']"}
    assert asked[name.split("_", 2)[2].rsplit("_", 1)[0]] in done.stdout


@pytest.mark.skipif(bool(netns.lacking()), reason=netns.lacking())
def test_two_machines(tiny_model, data, tmp_path):
    port = free_port()
    with netns.machines() as machines:
        runs = []
        for rank, machine in enumerate(machines):
            command = ["bash", str(TEST / "pretrain_full_nm_np_sdxl.sh"), "--nnodes=2", "--nproc_per_node=1",
                       f"--node_rank={rank}", f"--master_ip={netns.ADDRESSES[0]}", f"--master_port={port}", "--max_train_epoch=6",
                       f"--model_name={tiny_model}", data, *SMALL, "--batch_size=1", f"--output_path={tmp_path / 'run'}"]
            log = (tmp_path / f"log{rank}").open("w")
            runs.append(subprocess.Popen(netns.on(machine, command), cwd=tmp_path, env=environment(**netns.environment(machine)),
                                         stdout=log, stderr=subprocess.STDOUT))
        codes = [run.wait(timeout=300) for run in runs]
    said = [(tmp_path / f"log{rank}").read_text() for rank in range(2)]
    assert codes == [0, 0], said
    check(tmp_path / "run", said[0], "sdxl_full", 2, 1, range(16, 19))
    assert "Final Performance" not in said[1], "the first machine alone tells the result"


def test_it_fails_when_training_fails(data, tmp_path):
    done = launch("pretrain_full_1m_1p_sdxl.sh", f"--model_name={tmp_path}/none", data, *SMALL, "--output_path=run",
                  where=tmp_path)
    assert done.returncode == 2
    assert "error: training ended with status 2; all it said is in run/train_0.log" in done.stdout
    assert f"{tmp_path}/none" in (tmp_path / "run" / "train_0.log").read_text()
    assert "Final" not in done.stdout


@pytest.mark.parametrize("flags, said", [
    (("--batch_size=0",), "--batch_size=0: give a whole number above 0"),
    (("--batch_size",), "--batch_size: its value is missing"),
    (("--nproc_per_node=two",), "--nproc_per_node=two"),
    (("--nnodes=2", "--node_rank=1"), "--master_ip is missing"),
    (("--nnodes=2", "--node_rank=2", "--master_ip=10.0.0.1"), "--node_rank=2: of 2 machines, the last has rank 1"),
    (("--device=tpu",), "--device=tpu: there are auto, npu, cuda and cpu"),
    (("--device=npu",), "--device=npu: PyTorch finds no such device here, but cpu"),
    (("--model_name=",), "--model_name is missing"),
    (("--dataset_name=",), "--dataset_name is missing")])
def test_mistakes_are_named(flags, said, tmp_path):
    done = launch("pretrain_full_nm_np_sdxl.sh", *flags, where=tmp_path)
    assert done.returncode == 2
    assert f"error: {said}" in done.stdout
    assert not list(tmp_path.iterdir())


def test_there_are_three_for_each_task():
    tasks = {("pretrain_full", "sdxl"), ("train_lora", "sdxl"), ("pretrain_full", "sd3")}
    assert set(SCRIPTS) == {f"{kind}_{size}_{family}.sh" for kind, family in tasks for size in ("1m_1p", "1m_8p", "nm_np")}
    for name in SCRIPTS:
        text = (TEST / name).read_text()
        assert len(text.splitlines()) <= 18
        assert f"script=train_{'lora_' if 'lora' in name else ''}{'sd3' if 'sd3' in name else 'sdxl'}.py\n" in text
        assert f"nproc_per_node={1 if '1m_1p' in name else 8}\n" in text
