"""Steps that go wrong: left out, rolled back or the end of the run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_run
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio import train
from t5x_audio.errors import UserError
from t5x_audio.training import checkpoints, learner
from t5x_audio.training.learner import TrainState
from t5x_audio.training.metrics import read_metrics
from t5x_audio.training.step_guard import StepGuard

ONE_SHAPE = (4, 4)


@dataclasses.dataclass(frozen=True)
class Scripted:
    """Toy batches by their numbers; those in `poisoned` make the loss NaN."""

    numbers: tuple[int, ...]
    poisoned: tuple[int, ...] = ()

    def __iter__(self):
        return ScriptedIterator(self)


class ScriptedIterator:
    def __init__(self, data):
        self.data, self.at = data, 0

    def __iter__(self):
        return self

    def __next__(self):
        number = self.data.numbers[self.at]
        self.at += 1
        batch = next(seeded(number))
        if number in self.data.poisoned:
            batch["tokens"][0, 0] = 11
        return batch

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def seeded(number):
    iterator = toy_run.Counting(toy_run.Data(lengths=ONE_SHAPE))
    iterator.set_state({"position": number})
    return iterator


def run(folder, data, steps, **guard):
    model = toy_run.BigramConfig()
    toy = learner.GradientLearner(model, toy_run.NextToken(poison_at=11), toy_run.Descent())
    return train.run(
        learner=toy,
        dataset=data,
        steps=steps,
        model_dir=str(folder),
        log_every=3,
        save_every=4,
        guard=StepGuard(**guard),
    )


def table(folder):
    return checkpoints.open_array(folder, "params/table").whole()


def test_a_skipped_step_leaves_no_trace_but_its_number(tmp_path):
    result = run(
        tmp_path / "a", Scripted(tuple(range(20)), poisoned=(5, 8)), 20, policy="skip", patience=2
    )
    without = [n for n in range(20) if n not in (5, 8)]
    run(tmp_path / "b", Scripted(tuple(without)), 18)
    assert result["step"] == 20 and np.isfinite(result["loss"])
    np.testing.assert_array_equal(table(tmp_path / "a"), table(tmp_path / "b"))
    shares = {line["step"]: line["bad_steps"] for line in read_metrics(tmp_path / "a")}
    assert [step for step, share in shares.items() if share] == [6, 9]
    # Step 9 has a line of its own, on which no loss counts.
    assert [line["step"] for line in read_metrics(tmp_path / "a") if "loss" not in line] == [9]
    assert all(np.isfinite(line.get("loss", 0.0)) for line in read_metrics(tmp_path / "a"))


def test_skipping_ends(tmp_path):
    data = Scripted(tuple(range(20)), poisoned=(6, 7, 8, 9))
    message = r"the update was left out 3 times in a row at step 9; the last good .* step 8"
    with pytest.raises(UserError, match=message):
        run(tmp_path, data, 20, policy="skip", patience=3)


def test_a_roll_back_goes_on_behind_the_bad_batch(tmp_path, capsys):
    numbers = tuple(range(30))
    result = run(tmp_path / "a", Scripted(numbers, poisoned=(9,)), 16, policy="roll_back")
    # Noticed at step 12, with the batches 8 to 11 taken: back to step 8, on with batch 12.
    behind = numbers[:8] + numbers[12:]
    run(tmp_path / "b", Scripted(behind), 16)
    assert result["step"] == 16
    np.testing.assert_array_equal(table(tmp_path / "a"), table(tmp_path / "b"))
    lines = read_metrics(tmp_path / "a")
    assert [line["step"] for line in lines] == [3, 4, 6, 8, 9, 12, 15, 16]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert "loss is not finite at step 10: back to step 8" in capsys.readouterr().err


def test_a_roll_back_to_the_beginning_and_no_endless_ones(tmp_path):
    assert run(tmp_path / "a", Scripted(tuple(range(30)), (1,)), 6, policy="roll_back")["step"] == 6
    data = Scripted(tuple(range(60)), poisoned=tuple(range(9, 60)))
    with pytest.raises(UserError, match="loss is not finite at step 9; the last good .* step 8"):
        run(tmp_path / "b", data, 20, policy="roll_back", patience=2)


def judged(guard, losses):
    """(bad or not, mean after) of every step."""
    state = TrainState(jnp.int32(0), {}, {}, {})
    state, found = guard.init(state), []
    judge = jax.jit(guard.judge)
    for loss in losses:
        after = state.replace(step=state.step + 1)
        state, metrics = judge(state, after, {"loss": learner.mean_metric(loss, 3.0)})
        found.append((bool(metrics["bad_steps"][0]), float(state.variables["guard"]["mean"])))
    return found


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 4), min_size=12, max_size=40), st.integers(2, 8))
def test_jumps_are_those_of_the_running_mean_and_deviation(losses, memory):
    losses = [*losses[:10], 50.0, *losses[10:], float("nan"), 1.0]
    mean, variance, steps, expected = 0.0, 0.0, 0, []
    for loss in losses:
        jump = steps >= memory and loss > mean + 5 * variance**0.5 + 1e-4
        bad = jump or not np.isfinite(loss)
        if not bad:
            share = 1 / min(steps + 1, memory)
            change = loss - mean
            mean += share * change
            variance = (1 - share) * (variance + share * change**2)
            steps += 1
        expected.append((bad, mean))
    guard = StepGuard(policy="skip", spike=5.0, memory=memory)
    for (bad, got), (want_bad, want) in zip(judged(guard, losses), expected, strict=True):
        if bad != want_bad:  # a loss at the limit, on either side of float32
            return
        assert got == pytest.approx(want, rel=1e-3, abs=1e-3)
    assert expected[10][0] and expected[-2][0]


def test_a_jump_stops_a_run(tmp_path):
    class Jumping(toy_run.NextToken):
        def __call__(self, model, batch, rng, train):
            loss, metrics = super().__call__(model, batch, rng, train)
            loss = loss + 100.0 * (batch["tokens"] == 11).any()
            return loss, metrics | {"loss": learner.mean_metric(loss)}

    toy = learner.GradientLearner(toy_run.BigramConfig(), Jumping(), toy_run.Descent())
    with pytest.raises(UserError, match="jumped by more than 8.0 standard deviations at step 16"):
        train.run(
            learner=toy, dataset=Scripted(tuple(range(30)), poisoned=(15,)), steps=30,
            model_dir=str(tmp_path), guard=StepGuard(spike=8.0, memory=10),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(policy="ignore"), "policy='ignore': use one of stop, skip, roll_back"),
        (dict(spike=0.0), "spike=0.0: give standard deviations above 0"),
        (dict(memory=1), "memory=1 is below 2"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        StepGuard(**settings)
