import jax
import jax.numpy as jnp
from jax.profiler import ProfileData

from t5x_audio.training.profiling import ProfileWindow


def run(directory, first, count, steps, start=1):
    window, step = ProfileWindow(directory, first, count), jax.jit(lambda x: x @ x)
    x = step(jnp.eye(64))
    for index in range(start, start + steps):
        window.before(index, x)
        x = step(x)
        window.after(index, x)
    window.close()
    return sorted(directory.rglob("*.xplane.pb"))


def products(trace):
    planes = ProfileData.from_file(str(trace)).planes
    lines = [line for plane in planes for line in plane.lines if line.name.startswith("tf_XLA")]
    return sum(event.name.startswith(("dot", "ynn")) for line in lines for event in line.events)


def test_the_steps_asked_for_are_traced_and_no_others(tmp_path):
    (one,) = run(tmp_path / "one", first=3, count=1, steps=9)
    (four,) = run(tmp_path / "four", first=3, count=4, steps=9)
    assert products(four) == 4 * products(one) > 0


def test_a_run_that_ends_within_the_window_keeps_its_trace(tmp_path):
    assert len(run(tmp_path, first=3, count=50, steps=5)) == 1


def test_nothing_is_traced_unasked_or_behind_the_window(tmp_path):
    assert not run(tmp_path, first=None, count=5, steps=3)
    assert not run(tmp_path, first=3, count=2, steps=4, start=10)
