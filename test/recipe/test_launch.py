"""The launch scripts, run as they are typed, on the CPU and on the stand-in for an NPU: flags, table of results, failure."""

import json
import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import netns
import numpy as np
import pytest
import result
from forks import free_port

TEST = Path(__file__).parents[1]
SCRIPTS = sorted(path.name for kind in ("pretrain_full", "train_lora") for path in TEST.glob(f"{kind}_*.sh"))
TABLE = ("Network", "RankSize", "BatchSize", "DeviceType", "CaseName", "ActualFPS", "TrainingTime", "ActualLoss",
         "E2ETrainingTime")
SMALL = ("--resolution=64,64", "--min_bucket_reso=32", "--max_bucket_reso=128", "--bucket_reso_steps=32", "--report_to=none",
         "--logging_steps=1", "--lr_scheduler=constant", "--vae_name=")
DEVICES = {"cpu": {}, "npu": {"PYTHONPATH": str(TEST / "npu_sim"), "NPU_SIM_DEVICES": "2"}}    # and the environment of each
PRECISION, STEPS = {"cpu": "no", "npu": "bf16"}, {"cpu": 8, "npu": 4}    # of two processes; the stand-in is slow


def environment(**more) -> dict[str, str]:
    return {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "npu" and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.fail("the stand-in for an NPU is built with g++, and there is none: apt-get install g++")
    return request.param


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


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check(folder: Path, said: str, network: str, ranks: int, batch: int, steps: int, accumulation: int = 1, old: int = 0,
          paused: tuple[int, ...] = ()) -> None:
    """The table is right: recomputed from the times in the log, and from the losses.

    old: how many steps are of a launch before. paused: steps after which there was something else to do than training.
    """
    found, lines, images = table(folder), metrics(folder), ranks * batch * accumulation
    seconds = [line["seconds"] - before["seconds"] for before, line in zip(lines, lines[1:], strict=False)]    # from step 2 on
    for line, passed in zip(lines[1:], seconds, strict=True):
        if line["step"] == old + 1:
            continue    # the first after a restart
        if line["step"] - 1 in paused:
            assert passed > images / line["images_per_s"] * 1.02
        else:
            assert passed == pytest.approx(images / line["images_per_s"], rel=0.02)
    counted = lines[old + found["WarmUpSteps"]:]
    assert found["Steps"] == len(lines) == steps and found["CountedSteps"] == len(counted)
    assert 0.1 * (steps - old) <= found["WarmUpSteps"] <= 2
    if not paused:
        passed = counted[-1]["seconds"] - lines[old + found["WarmUpSteps"] - 1]["seconds"]
        assert found["ActualFPS"] == pytest.approx(len(counted) * images / passed, rel=0.02)
        assert found["E2ETrainingTime"] > passed
    assert found["ActualFPS"] == pytest.approx(len(counted) / sum(1 / line["images_per_s"] for line in counted), rel=1e-3)
    assert found["TrainingTime"] == pytest.approx(images / found["ActualFPS"], rel=1e-3)
    assert found["ActualLoss"] == pytest.approx(sum(line["loss"] for line in lines) / len(lines), rel=1e-5)
    assert 0 <= found["WaitShare"] < 1
    assert {name: found[name] for name in ("Network", "RankSize", "BatchSize", "DeviceType", "CaseName")} == {
        "Network": network, "RankSize": ranks, "BatchSize": batch, "DeviceType": platform.machine(),
        "CaseName": f"{network}_bs{batch}_{ranks}p_acc"}
    for title, name in (("Final Performance images/sec", "ActualFPS"), ("Final Train Loss", "ActualLoss"),
                        ("E2E Training Duration sec", "E2ETrainingTime")):
        assert f"\n{title} : {found[name]}\n" in said


def check_device(folder: Path, device: str, precision: str) -> None:
    """What launch.sh adds for an NPU, and that the run was on it."""
    flags = json.loads(max(folder.glob("checkpoint-*/manifest.json")).read_text())["flags"]
    assert flags["mixed_precision"] == precision and flags["attention_mechanism"] == ("npu" if device == "npu" else "default")
    assert ("Ascend (simulated)" in (folder / "report.html").read_text()) == (device == "npu")


@pytest.fixture(scope="module")
def data(tiny_images):
    return f"--dataset_name={tiny_images}"


def test_one_process_from_another_folder(tiny_model, data, tmp_path):
    """With accumulation and validation images; then the run is continued, and its end is launched again."""
    drawn = ("--validation_prompt=a cat", "--num_validation_images=1", "--validation_steps=4",
             "--validation_num_inference_steps=1", "--validation_guidance=1")
    command = ("pretrain_full_1m_1p_sdxl.sh", f"--model_name={tiny_model}", data, *SMALL, "--device=cpu", "--batch_size", 3,
               "--gradient_accumulation_steps=2", "--output_path=here", *drawn)
    done, out = launch(*command, "--max_train_epoch=10", where=tmp_path), tmp_path / "here"
    assert done.returncode == 0, done.stdout
    steps = len(metrics(out))
    assert 9 <= steps <= 10
    check(out, done.stdout, "sdxl_full", 1, 3, steps, 2, paused=(4, 8))
    check_device(out, "cpu", "no")
    assert (out / "train_0.log").read_text() in done.stdout
    assert (out / "unet").is_dir() and (out / "text_encoder").is_dir()

    again = (*command, "--resume_from_checkpoint=latest", "--max_train_steps")
    done = launch(*again, steps + 4, where=tmp_path)
    assert done.returncode == 0, done.stdout
    check(out, done.stdout, "sdxl_full", 1, 3, steps + 4, 2, old=steps, paused=(4, 8, 12))


def test_one_npu(tiny_model, data, tmp_path):
    done = launch("pretrain_full_1m_1p_sdxl.sh", f"--model_name={tiny_model}", data, *SMALL, "--device=npu", "--batch_size=2",
                  "--max_train_steps=4", f"--output_path={tmp_path / 'run'}", where=tmp_path, **DEVICES["npu"])
    assert done.returncode == 0, done.stdout
    check(tmp_path / "run", done.stdout, "sdxl_full", 1, 2, 4)
    check_device(tmp_path / "run", "npu", "fp16")


@pytest.fixture(scope="module")
def two(tiny_model, data, tmp_path_factory):
    """`two(device)`: the losses of two processes in batches of 1, run once by pretrain_full_1m_8p_sdxl.sh, and checked."""
    @cache
    def two(device: str) -> list[float]:
        out = tmp_path_factory.mktemp(device) / "run"
        done = launch("pretrain_full_1m_8p_sdxl.sh", f"--model_name={tiny_model}", data, *SMALL, f"--device={device}",
                      "--max_train_steps", STEPS[device], "--batch_size=1", "--nproc_per_node=2", f"--output_path={out}",
                      f"--mixed_precision={PRECISION[device]}", where=out.parent, **DEVICES[device])
        assert done.returncode == 0, done.stdout
        check(out, done.stdout, "sdxl_full", 2, 1, STEPS[device])
        check_device(out, device, PRECISION[device])
        return [line["loss"] for line in metrics(out)]
    return two


def test_several_processes(two, device):
    np.testing.assert_allclose(two(device), two("cpu")[:STEPS[device]], rtol=1e-2)


PARSER = """#!{python}
import os
import sys
from pathlib import Path
if sys.argv[1] == "-c":
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
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
    machines = ("--nnodes=2", "--node_rank=1", "--master_addr=127.0.0.1", "--master_port", 7000) if "nm_np" in name else ()
    flags = ("--device=cpu", "--max_train_epoch=13", "--batch_size=2", "--resolution", "512,512", "--noise_offset=0.5",
             "--output_path=run", *machines)
    done = launch(name, *flags, where=tmp_path, PYTHON=str(parser))
    assert done.returncode == 0, done.stdout
    for part in ("'train_batch_size': 2", "'resolution': (512, 512)", "'num_train_epochs': 13", "'mixed_precision': 'no'",
                 "'dataset_name': 'lambdalabs/naruto-blip-captions'", "'max_train_steps': None", "'noise_offset': 0.5"):
        assert part in done.stdout
    asked = {"1m_1p": "[]", "1m_8p": "['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=8', '--max_restarts=0']",
             "nm_np": "['-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=8', '--node_rank=1', "
                      "'--master_addr=127.0.0.1', '--master_port=7000']"}
    assert asked[name.split("_", 2)[2].rsplit("_", 1)[0]] in done.stdout

    done = launch(name, "--device=cpu", "--output_dir=other", "--train_batch_size", 3, "--dataset_config=sets.toml", "--vae=v",
                  "--pretrained_model_name_or_path=m", *machines, where=tmp_path, PYTHON=str(parser))    # by the script's names
    assert "'train_batch_size': 3" in done.stdout and "'pretrained_model_name_or_path': 'm'" in done.stdout
    assert "'dataset_name': None" in done.stdout and (tmp_path / "other" / f"train_{len(machines) and 1}.log").exists()


@pytest.mark.skipif(bool(netns.lacking()), reason=netns.lacking())
def test_two_machines(tiny_model, data, two, device, tmp_path):
    """The same run as that of two processes of one machine."""
    port, out = free_port(), tmp_path / "run"
    with netns.machines() as machines:
        runs = []
        for rank, machine in enumerate(machines):
            command = ["bash", str(TEST / "pretrain_full_nm_np_sdxl.sh"), "--nnodes=2", "--nproc_per_node=1",
                       f"--node_rank={rank}", f"--master_ip={netns.ADDRESSES[0]}", f"--master_port={port}", "--max_train_epoch=2",
                       f"--model_name={tiny_model}", data, *SMALL, "--batch_size=1", f"--output_path={out}", f"--device={device}",
                       f"--mixed_precision={PRECISION[device]}"]
            log = (tmp_path / f"log{rank}").open("w")
            runs.append(subprocess.Popen(netns.on(machine, command), cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT,
                                         env=environment(**netns.environment(machine), **DEVICES[device])))
        codes = [run.wait(timeout=300) for run in runs]
    said = [(tmp_path / f"log{rank}").read_text() for rank in range(2)]
    assert codes == [0, 0], said
    losses = [line["loss"] for line in metrics(out)]
    assert 5 <= len(losses) <= 6
    check(out, said[0], "sdxl_full", 2, 1, len(losses))
    check_device(out, device, PRECISION[device])
    assert "Final Performance" not in said[1], "the first machine alone tells the result"
    steps = min(len(losses), STEPS[device])
    np.testing.assert_allclose(losses[:steps], two(device)[:steps], rtol=1e-5)


def test_it_fails_when_training_fails(data, tmp_path):
    done = launch("pretrain_full_1m_1p_sdxl.sh", f"--model_name={tmp_path}/none", data, *SMALL, "--device=cpu",
                  "--output_path=run", where=tmp_path)
    assert done.returncode == 2
    assert "error: training ended with status 2; all it said is in run/train_0.log" in done.stdout
    assert f"{tmp_path}/none" in (tmp_path / "run" / "train_0.log").read_text()
    assert "Final" not in done.stdout


@pytest.mark.parametrize("flags, said", [
    (("--batch_size=0",), "--batch_size=0: give a whole number above 0"),
    (("--batch_size",), "--batch_size: its value is missing"),
    (("--nproc_per_node=two",), "--nproc_per_node=two"),
    (("--nnodes=2", "--node_rank=1"), "--master_ip is missing"),
    (("--nnodes=2", "--node_rank=2", "--master_ip=127.0.0.1"), "--node_rank=2: of 2 machines, the last has rank 1"),
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


CANN = """export ASCEND_HOME_PATH=$HOME/Ascend/cann PATH=$PATH:$NOT_SET
"""
STARTED = """#!{python}
import json, os, sys
if sys.argv[1] == "-c":
    if "devices.best" in sys.argv[2]:
        print("npu")
        sys.exit()
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
if "result.py" not in sys.argv[1]:
    print(json.dumps(dict(os.environ)))
"""


@pytest.mark.skipif(Path("/usr/local/Ascend").exists(), reason="this machine's own CANN would be found")
def test_cann_is_found_and_its_variables_are_set(tmp_path):
    """With a Python that tells the environment in which it is to train. What the user has set stays."""
    python, cann = tmp_path / "python", tmp_path / "Ascend" / "cann" / "set_env.sh"
    python.write_text(STARTED.format(python=sys.executable))
    python.chmod(0o755)
    cann.parent.mkdir(parents=True)
    cann.write_text(CANN)
    usual = {name: value for name, value in environment().items() if not name.startswith(("HCCL", "ASCEND"))}
    told = []
    for flags in ((), ("--device=cpu",), ("--nnodes=2", "--node_rank=1", "--master_ip=127.0.0.1")):
        done = subprocess.run(["bash", str(TEST / "pretrain_full_nm_np_sdxl.sh"), "--nnodes=1", "--output_path=run", *flags],
                              cwd=tmp_path, text=True, capture_output=True,
                              env={**usual, "PYTHON": str(python), "HOME": str(tmp_path), "HCCL_BUFFSIZE": "50"})
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout.splitlines()[0]))
    for found in told:
        assert found["ASCEND_HOME_PATH"] == f"{tmp_path}/Ascend/cann" and found["HCCL_BUFFSIZE"] == "50"
        assert found["TASK_QUEUE_ENABLE"] == "2" and int(found["HCCL_EXEC_TIMEOUT"]) <= 17340
    assert [found.get("HCCL_IF_IP") for found in told] == [None, None, "127.0.0.1"]
    assert [found.get("ACCELERATE_USE_CPU") for found in told] == [None, "true", None]
    text = (TEST / "env_npu.sh").read_text()
    assert all(name in text for name in told[0] if name.startswith(("HCCL", "ASCEND")) and name != "ASCEND_HOME_PATH")


def log_of(losses: list, start: int = 0, every: int = 1, seconds: float = 0.5) -> list[dict]:
    """Lines of metrics.jsonl, each of `every` steps in batches of 4."""
    return [{"step": start + every * (number + 1), "loss": loss, "images_per_s": 4 * every / seconds, "wait": 0.25,
             "seconds": seconds * (number + 1)} for number, loss in enumerate(losses)]


def told_of(folder: Path, lines: list[dict], old: int = 0) -> dict:
    """The table of a run with these lines, of which `old` are of launches before; and of another run in its folder, before it."""
    flags = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    for step, written, batch in ((9999, 1.0, 64), (lines[-1]["step"], 2.0, 4)):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / "manifest.json").write_text(
            json.dumps({"step": step, "written": written, "flags": flags, "global_batch": batch}))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return result.result(folder, "net", 60.0, text.splitlines()[:old])


def test_steps_without_a_loss(tmp_path):
    """As those that --spike_guard skipped: null in the log."""
    found = told_of(tmp_path / "a", log_of([1.0, None, 3.0, None]))
    assert found["ActualLoss"] == 2.0 and (found["RankSize"], found["Steps"], found["CountedSteps"]) == (1, 4, 3)
    found = told_of(tmp_path / "b", log_of([7.0, 5.0] + 150 * [None]))    # none in the last 100
    assert found["ActualLoss"] == 6.0 and found["ActualFPS"] == 8.0
    lines = log_of([None, None])
    with pytest.raises(ValueError, match="none of its steps has a loss"):
        told_of(tmp_path / "c", lines)
    done = subprocess.run([sys.executable, TEST / "result.py", tmp_path / "c", "--network=net", "--seconds=1"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == (
        f"result.py: error: {tmp_path / 'c'} holds no finished run: none of its steps has a loss\n")


def test_the_loss_is_that_of_the_last_hundred_steps(tmp_path):
    lines = log_of([9.0] * 5 + [1.0] * 9, every=10) + log_of([3.0], start=140, every=5)
    assert told_of(tmp_path, lines)["ActualLoss"] == pytest.approx((9 * 10 * 1.0 + 5 * 3.0 + 10 * 9.0) / 105, abs=1e-6)


@pytest.mark.parametrize("old, seconds, warm_up, counted", [
    (0, 170 + 25, 30, 270), (20, 22.5, 10, 90), (30, 170 + 25, 30, 270)], ids=["new", "continued", "at its end"])
def test_the_speed_is_that_of_this_launch(tmp_path, old, seconds, warm_up, counted):
    """200 steps of one second, 100 of a quarter. A launch that had nothing to do tells the speed of those before."""
    lines = log_of([1.0] * 20, every=10, seconds=10.0) + log_of([1.0] * 10, start=200, every=10, seconds=2.5)
    found = told_of(tmp_path, lines, old)
    assert (found["WarmUpSteps"], found["CountedSteps"], found["Steps"]) == (warm_up, counted, 300)
    assert found["ActualFPS"] == pytest.approx(4 * counted / seconds, abs=1e-3) and found["WaitShare"] == 0.25
