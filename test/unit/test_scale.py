"""A million images: the table is built, shuffled and its first batch composed in seconds and in little memory.

In a process of its own, which imports what the table needs and so measures that alone.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ROWS = 1_000_000
CPU_SECONDS, PEAK_MB = 10, 500

MILLION = f"""
import json, resource, sys
import numpy as np
from library.data import captions
from library.data.sampler import Sampler
from library.data.specs import Buckets, Fixed, Origin, Spec
from library.data.table import Text, build, flatten

draw = np.random.default_rng(0)
records = np.zeros({ROWS}, [("width", "i4"), ("height", "i4"), ("content", "S32")])
records["width"], records["height"] = draw.integers(200, 5000, (2, {ROWS}))
digits = np.frombuffer(b"0123456789abcdef", "S1")
for start in range(0, {ROWS}, 50_000):
    records["content"][start:start + 50_000] = digits[draw.integers(0, 16, (50_000, 32))].view("S32")[:, 0]
names = np.array([f"folder/{{row:08d}}.jpg" for row in range({ROWS})], Text)
# two captions for every tenth image, as a source gives them: lists of texts
texts = [[f"a photo of number {{row}}, in colour, by hand"] * (1 + (row % 10 == 0)) for row in range({ROWS})]

def peak():    # in MB. Linux lets ru_maxrss begin with that of the process that started this one
    if sys.platform == "linux":
        return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

def seconds():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

before = seconds()
flat, start = flatten(texts)
options = json.loads(sys.argv[1])
size = Buckets((1024, 1024), **options) if options else Fixed((1024, 1024), "center")
rules = captions.Rules(shuffle=True, keep=1, empty=0.1)
table, _ = build(Spec("set", Origin("folder", "x"), size, rules), records, names, flat, start)
order = Sampler(table.bucket_of, 1, 256)
bucket, rows, visits = order.batch(0)
batch = [(captions.pick(table.texts(row), rules, 1, row, visit, 4), table.time_ids(row, visit))
         for row, visit in zip(rows.tolist(), visits.tolist())]
spent = seconds() - before

last = order.steps_before(1) - 1
shown = {{table.buckets[where] for where in table.bucket_of[rows]}}
print(json.dumps(dict(
    seconds=spent, peak=peak(), rows=len(table), batch=len(batch),
    buckets=len(shown), target=[[ids[5], ids[4]] for _, ids in batch][0], shape=list(table.buckets[bucket]), steps=last + 1,
    texts=int(start[-1]), torch="torch" in sys.modules, different=len({{text for text, _ in batch}}),
    last=len(set(order.batch(last)[1].tolist())))))
"""


def measure(**options) -> dict:
    done = subprocess.run([sys.executable, "-c", MILLION, json.dumps(options)], cwd=REPOSITORY, text=True, capture_output=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("options", [
    {"shortest": 512, "longest": 2048}, {"no_upscale": True}, {}], ids=str)
def test_a_million_rows(options):
    found = measure(**options)
    assert not found["torch"]
    assert found["peak"] < PEAK_MB, f"{found['peak']:.0f} MB"
    assert found["seconds"] < CPU_SECONDS, f"{found['seconds']:.1f} s"
    assert found["rows"] == ROWS and found["texts"] == ROWS * 11 // 10
    assert found["batch"] == found["last"] == 256 and found["different"] > 200
    assert found["buckets"] == 1 and found["target"] == found["shape"]
    assert ROWS // 256 - 1000 < found["steps"] <= ROWS // 256
