"""benchmarks/gpu.py and what it runs, without a GPU: fake scripts in real processes, toy sizes."""

import importlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from runs import ROOT, start, wait_for

GIB = 2**30
# Prints and writes a table with its batch and the results that gpu.json has so far.
FINE = """
import json, sys
from pathlib import Path
file = Path(sys.argv[-1])
known = file.with_name("gpu.json")
before = json.loads(known.read_text())["results"] if known.exists() else []
row = {"batch": int(sys.argv[4]), "before": len(before), "nothing": None}
file.write_text(json.dumps({"tables": [{"title": "Times", "rows": [row]}]}))
"""
SCRIPTS = {
    "fine.py": FINE,
    "large.py": "import sys\nif int(sys.argv[4]) > 9:\n"
    "    class OutOfMemoryError(RuntimeError): pass\n"
    f"    raise OutOfMemoryError('CUDA out of memory. Tried\\nthis')\n{FINE}",
    "wrong.py": "raise ValueError('two\\nlines')",
    "exit.py": "import os; os._exit(3)",
    "crash.py": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "slow.py": "import os, subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print(os.getpid(), child.pid, flush=True)\ntime.sleep(600)",
}


@pytest.fixture
def script(monkeypatch):
    """A function that imports a script of benchmarks/ by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    # The scripts import `timing` by its plain name.
    return lambda name: importlib.import_module(
        "timing" if name == "timing" else f"benchmarks.{name}"
    )


@pytest.fixture
def gpu(script):
    return script("gpu")


@pytest.fixture
def run_fakes(gpu, tmp_path, monkeypatch, capfd):
    """A function: names of SCRIPTS -> (how many failed, gpu.json, what was printed)."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name, source in SCRIPTS.items():
        (folder / name).write_text(source)
    monkeypatch.setattr(gpu, "HERE", folder)

    def run(*names, minutes=1, batch=32, seconds=0):
        cases = [gpu.Case(f"{name}.py", f"--k {k}", batch, seconds) for k, name in enumerate(names)]
        failed = gpu.run_all(cases, gpu.Results(tmp_path / "gpu.json", {}, ""), minutes)
        return failed, json.loads((tmp_path / "gpu.json").read_text()), capfd.readouterr().out

    return run


def card(memory, bf16=True):
    return {"memory": memory, "bf16": bf16}


def test_one_measurement_of_each_kind_comes_before_others(gpu):
    cases = gpu.plan(card(80 * GIB))
    scripts = [case.script for case in cases]
    assert scripts[:4] == ["kernel_times.py", "fcmae.py", "mae.py", "steps.py"]
    assert len(set(scripts)) == len(set(scripts[:7])) == 6
    assert len({case.name for case in cases}) == len(cases) == len(gpu.PLAN)
    best = [case for case in cases if "fp32" not in case.options]
    assert cases[: len(best)] == best


@pytest.mark.parametrize(
    ("gib", "fcmae", "mae"), [(80, 64, 128), (40, 64, 128), (24, 32, 64), (8, 8, 16), (2, 4, 4)]
)
def test_batches_depend_on_memory(gib, fcmae, mae, gpu):
    cases = gpu.plan(card(int(gib * 0.99 * GIB)))
    assert [case.batch for case in cases[1:3]] == [fcmae, mae]
    assert [case.script for case in cases[1:3]] == ["fcmae.py", "mae.py"]


def test_cards_without_bf16_get_fp32_once(gpu):
    names = [case.name for case in gpu.plan(card(80 * GIB, bf16=False))]
    assert not any("bf16" in name or "BEST" in name for name in names)
    assert names.count("fcmae-base-fp32-64") == 1


def test_every_command_of_the_plan_is_valid(gpu, script, monkeypatch):
    class Parsed(Exception):
        """Options are valid."""

    timing = script("timing")

    def parsed(options):
        raise Parsed

    monkeypatch.setattr(timing, "settle", parsed)
    monkeypatch.setattr(timing, "Report", lambda _, options: parsed(options))
    for case in [*gpu.plan(card(80 * GIB)), *gpu.TOYS]:
        _, path, *options = case.command(case.batch, "--device cpu --rounds 15")
        monkeypatch.setattr(sys, "argv", [path, *options, "--json", "file"])
        with pytest.raises(Parsed):
            script(case.script.removesuffix(".py")).main()


def test_results_appear_as_they_come(run_fakes):
    failed, found, printed = run_fakes("fine", "fine", "fine")
    assert failed == 0
    rows = [result["tables"][0]["rows"][0] for result in found["results"]]
    assert [row["before"] for row in rows] == [0, 1, 2]
    assert printed.count("| batch | before | nothing |") == 3
    assert "| 32 | 1 | – |" in printed


def test_what_runs_out_of_memory_is_repeated_with_a_smaller_batch(run_fakes):
    failed, found, printed = run_fakes("large", "fine")
    assert failed == 0
    assert [result["batch"] for result in found["results"]] == [8, 32]
    assert "large-0-32, batch 16: OutOfMemoryError: CUDA out of memory. Tried; trying 8" in printed
    assert "(batch 8, not 32," in printed


def test_batches_do_not_become_too_small_to_mean_anything(run_fakes, gpu, monkeypatch):
    monkeypatch.setattr(gpu, "MINIMUM", 10)
    failed, found, printed = run_fakes("large", "fine", batch=20)
    assert (failed, found["results"][0]["batch"]) == (1, 10)
    assert "failed: OutOfMemoryError: CUDA out of memory. Tried" in printed


def test_errors_and_crashes_do_not_end_the_rest(run_fakes):
    failed, found, printed = run_fakes("wrong", "exit", "crash", "fine")
    problems = [result["problem"] for result in found["results"]]
    assert problems == ["ValueError: two", "exit code 3", "ended by SIGSEGV", ""]
    assert failed == 3
    assert all(f"failed: {problem}" in printed for problem in problems if problem)
    assert found["left_out"] == []


def test_what_there_is_no_time_for_is_left_out_and_listed(run_fakes):
    failed, found, printed = run_fakes("fine", "fine", minutes=0.1, seconds=7)
    assert (failed, found["results"]) == (0, [])
    commands = [f"python benchmarks/fine.py --k {k} --batch_size 32" for k in (0, 1)]
    assert found["left_out"] == commands
    assert all(f"    {command}\n" in printed for command in commands)


def test_what_takes_too_long_is_stopped_with_its_children(run_fakes, tmp_path):
    failed, found, _ = run_fakes("slow", "fine", minutes=0.05)
    assert [result["problem"] for result in found["results"]][:1] == ["stopped: the time is up"]
    assert failed == 1
    assert "python benchmarks/slow.py --k 0 --batch_size 32" in found["left_out"]
    for pid in (tmp_path / "slow-0-32.txt").read_text().split():
        wait_for(lambda pid=pid: ended(pid))


def ended(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_without_transformers_its_model_is_left_out(script, monkeypatch, capsys):
    mae = script("mae")
    monkeypatch.setattr(mae, "find_spec", lambda name: None)
    candidates = mae.build("tiny", torch.device("cpu"), compiled=False, predict_ratio=1)
    assert list(candidates) == ["ours", "official", "official, SDPA"]
    rows = mae.compared({("ours", "bf16"): 1.0, ("official", "bf16"): 2.0})
    assert rows[0] == ["ours", "bf16", 1000.0, 2.0, None, None, None]


def test_nothing_measured_needs_transformers_to_be_imported():
    code = "import sys; sys.modules['transformers'] = None; import mae, fcmae, finetune, steps"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", check=True)


def test_a_candidate_with_torchs_kernels_is_as_good(script):
    """On a GPU, where it is one of the candidates."""
    fcmae, used = script("fcmae"), []
    candidates = fcmae.build("atto", torch.device("cpu"), compiled=False)
    candidates["packed, torch's"] = fcmae.Candidate(candidates["packed"].model, kernels="reference")
    model = candidates["packed, torch's"].model
    model.register_forward_pre_hook(lambda *_: used.append(os.environ.get("SFER_KERNELS")))
    data = torch.randn(1, 3, 224, 224), torch.rand(1, 49)
    rows, problem = fcmae.check(candidates, "fp32", *data)
    assert not problem
    assert rows[-1][0] == "packed, torch's"
    assert used == ["reference"]
    assert "SFER_KERNELS" not in os.environ


def test_wrong_gradients_are_reported(script):
    fcmae = script("fcmae")
    candidates = fcmae.build("atto", torch.device("cpu"), compiled=False)
    candidates["packed"].model.pred.weight.data *= 1.01
    data = torch.randn(1, 3, 224, 224), torch.rand(1, 49)
    assert fcmae.check(candidates, "fp32", *data)[1] == "gradients differ, fp32: packed"


def test_a_candidate_that_cannot_be_compiled_is_left_out(script, tmp_path, capsys):
    timing = script("timing")
    options = SimpleNamespace(json=tmp_path / "file.json", device="cpu", threads=1)
    report = timing.Report("title", options)

    def attempt(error):
        if error:
            raise error

    candidates = {"ours": OSError(), "ours, compiled": OSError("no\ncompiler"), "compiled": None}
    report.keep_working(candidates, attempt)
    assert list(candidates) == ["ours", "compiled"]
    with pytest.raises(torch.OutOfMemoryError):
        report.keep_working({"compiled": torch.OutOfMemoryError()}, attempt)
    with pytest.raises(SystemExit, match="error: ours, compiled: OSError: no"):
        report.close()
    assert json.loads(options.json.read_text())["doubts"] == ["ours, compiled: OSError: no"]


def test_events_time_kernels_on_a_gpu(script, monkeypatch):
    """With a stand-in for CUDA in which each call takes a millisecond of the device."""
    timing, clock, zeros = script("timing"), [0.0], torch.zeros

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, end):
            return end.at - self.at

    def call(milliseconds):
        clock[0] += milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: call(7))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(8))
    calls = {"one": lambda: call(1), "three": lambda: call(3)}
    taken = timing.device_times(calls, SimpleNamespace(type="cuda"), 2)
    assert taken == pytest.approx({"one": 0.001, "three": 0.003})


def test_the_card_is_described(script, tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 580.1, 700.00 W, 1980 MHz, 1980 MHz, 2619 MHz\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    properties = SimpleNamespace(name="H", total_memory=9, uuid="u", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: True)
    found = script("timing").card("cuda")
    assert (found["device"], found["memory"], found["capability"]) == ("H", 9, "9.0")
    assert (found["driver_version"], found["power.limit"]) == ("580.1", "700.00 W")


def test_the_share_of_time_in_which_the_gpu_works(script, tmp_path):
    spans = [("kernel", 0, 4), ("kernel", 1, 1), ("gpu_memcpy", 3, 3), ("kernel", 8, 2)]
    events = [{"cat": cat, "ts": ts, "dur": dur} for cat, ts, dur in spans]
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"traceEvents": [*events, {"cat": "cpu_op", "ts": 0, "dur": 99}]}))
    assert script("steps").busy_share(trace) == pytest.approx(0.8)


def test_every_measurement_runs(tmp_path):
    """For real, at toy size on the CPU; Triton's kernels are interpreted."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu"]
    process = start([*command, "--output", str(tmp_path)])
    printed = process.communicate(timeout=600)[0]  # a minute, if the machine is idle
    assert process.returncode == 0, printed
    found = json.loads((tmp_path / "gpu.json").read_text())
    scripts = [result["name"].partition("-")[0] for result in found["results"]]
    assert scripts == ["kernel_times", "fcmae", "mae", "finetune", "memory", "steps"]
    assert all(result["tables"] and not result["problem"] for result in found["results"])
    tables = {table["title"]: table["rows"] for r in found["results"] for table in r["tables"]}
    assert all(row["ours, µs"] > 0 for row in tables["Parts of a block, fp32"])
    assert tables["Training"][0]["images/s"] > 0
    assert "Left out" not in printed


def test_an_interrupted_run_stops_its_script_and_says_what_is_left(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu"]
    process = start([*command, "--output", str(tmp_path)])
    wait_for(lambda: list(tmp_path.glob("kernel_times-*.txt")))
    process.terminate()
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + 15
    assert "python benchmarks/fcmae.py" in printed
    assert len(json.loads((tmp_path / "gpu.json").read_text())["left_out"]) == 6
