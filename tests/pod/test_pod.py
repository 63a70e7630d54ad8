"""A job of four processes: the same losses as one process, killed and resumed bit for bit."""

import random
import shutil
import time

import numpy as np
import pytest

from t5x_audio.training import checkpoints
from tests.pod import jobs

STEPS = 40
KILLS = 20
KILLED = {1: 400, 4: 100}
"""Processes -> steps of the run that is killed. A quarter of the kills strike while it starts, the
others within a third of its steps, in times of the uninterrupted run on this machine.
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("pod")
    jobs.write_caches(made / "run")
    return made


def start(folder, name, processes, *flags, steps=STEPS):
    cache = folder / f"compiled-{processes}"
    flags = (f"--gin.STEPS={steps}", *flags)
    return jobs.Job(folder / "run", folder / name, processes, cache, *flags)


def whole(folder, processes, steps=STEPS):
    """The losses of an uninterrupted job; trained once."""
    name = f"whole-{processes}-{steps}"
    if not (folder / name).exists():
        codes = start(folder, name, processes, steps=steps).wait()
        assert codes == [0] * processes, (folder / f"{name}.log").read_text()[-2000:]
    losses = jobs.losses(folder / name)
    assert sorted(losses) == list(range(1, steps + 1))
    return losses


def new_steps(folder, name, job):
    """Waits until the job has logged a step more or has ended."""
    before = len(jobs.losses(folder / name))
    while job.running() and len(jobs.losses(folder / name)) <= before:
        time.sleep(0.02)


def durations(folder, processes, steps):
    """Seconds to the first step of a job that is compiled already, and of all its steps."""
    job, begun = start(folder, "timed", processes, steps=steps), time.monotonic()
    new_steps(folder, "timed", job)
    first = time.monotonic()
    while job.running() and len(jobs.losses(folder / "timed")) < steps:
        time.sleep(0.02)
    last = time.monotonic()
    assert job.wait() == [0] * processes
    shutil.rmtree(folder / "timed")
    return first - begun, last - first


def test_four_processes_learn_what_one_learns(folder):
    one, four = whole(folder, 1), whole(folder, 4)
    np.testing.assert_allclose(list(four.values()), list(one.values()), rtol=1e-4)
    assert four[STEPS] < 0.7 * four[1]


@pytest.mark.parametrize("processes", KILLED)
def test_killed_at_any_moment_it_goes_on_bit_for_bit(folder, processes, capsys):
    steps, chance = KILLED[processes], random.Random(processes)
    expected = whole(folder, processes, steps)
    starting, stepping = durations(folder, processes, steps)
    rows, kills, runs = [], 0, 0
    while kills < KILLS:
        name = f"killed-{processes}-{runs}"
        early = chance.random() < 0.25
        pause = chance.uniform(0, starting if early else stepping / 3)
        job = start(folder, name, processes, steps=steps)
        if not early:
            new_steps(folder, name, job)
        deadline = time.monotonic() + pause
        while time.monotonic() < deadline and job.running():
            time.sleep(0.01)
        killed = job.running()
        if killed:
            chance.choice(job.processes).kill()  # one host dies first
            time.sleep(chance.uniform(0, 0.2))
            job.kill()
        codes = job.wait()
        done = jobs.losses(folder / name)
        saved = checkpoints.checkpoint_steps(folder / name)
        when = f"{pause:.1f} s after {'the start' if early else 'its first step'}"
        rows.append((name, "killed" if killed else "done", when, max(done, default=0), saved[-1:]))
        assert all(done[step] == expected[step] for step in done), rows
        assert killed or codes == [0] * processes, (folder / f"{name}.log").read_text()[-2000:]
        kills, runs = kills + killed, runs + (not killed)
    assert start(folder, name, processes, steps=steps).wait() == [0] * processes
    assert jobs.losses(folder / name) == expected
    assert max(row[3] for row in rows) > steps / 4
    with capsys.disabled():
        print("\nrun, how it ended, when, last step logged, last step saved")
        for row in rows:
            print(*row)


def test_one_host_that_is_told_to_stop_stops_all_of_them_with_everything_saved(folder):
    expected = whole(folder, 4)
    job = start(folder, "stopped", 4)
    while len(jobs.losses(folder / "stopped")) < 7:
        time.sleep(0.05)
    job.processes[2].terminate()
    assert job.wait() == [130] * 4
    done = jobs.losses(folder / "stopped")
    assert checkpoints.checkpoint_steps(folder / "stopped")[-1] == max(done) < STEPS
    assert start(folder, "stopped", 4).wait() == [0] * 4
    assert jobs.losses(folder / "stopped") == expected


def test_more_hosts_than_readers_are_refused(folder):
    job = start(folder, "few", 4, "--gin.lm_reader.PackedLmDataset.readers=2")
    assert 2 in job.wait()
    line = "readers=2: a host wants 2 rows of batch_size=8, a reader makes 4"
    assert line in (folder / "few.log").read_text()


def test_a_job_goes_on_with_another_number_of_hosts(folder):
    expected = whole(folder, 1)
    assert start(folder, "moved", 4, "--gin.train.run.steps=15").wait() == [0] * 4
    assert start(folder, "moved", 1).wait() == [0]
    moved = jobs.losses(folder / "moved")
    assert sorted(moved) == sorted(expected)
    np.testing.assert_allclose(list(moved.values()), list(expected.values()), rtol=1e-4)
