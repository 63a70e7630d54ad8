"""The gin files of the image runs give the published settings."""

import pytest

from t5x_audio.objectives.siamese import Siamese
from t5x_audio.objectives.ssql import Ssql
from t5x_audio.quantization.rules import Rules, find


@pytest.fixture
def learner_of():
    import gin

    def parse(size, run, *bindings):
        gin.clear_config()
        for path in (f"gin/models/{size}.gin", f"gin/runs/{run}.gin"):
            gin.parse_config_file(path)
        imports = (
            "from __gin__ import dynamic_registration",
            "from t5x_audio.images import resnet",
            "from t5x_audio.objectives import siamese",
        )
        given = "RUN_DIR = 'runs/x'", "IMAGES_SOURCE = 'cifar10'"
        gin.parse_config("\n".join((*imports, *given, *bindings)))
        gin.finalize()
        return gin.get_configurable("learner.GradientLearner")()

    yield parse
    gin.clear_config()


@pytest.mark.parametrize("method", ["simsiam", "byol", "moco"])
@pytest.mark.parametrize("size", ["siamese_laptop", "siamese_cifar"])
def test_every_method_has_what_it_needs(learner_of, size, method):
    from flax import nnx

    run = "pretrain_images" + ("" if method == "simsiam" else f"_{method}")
    learner = learner_of(size, run)
    assert learner.objective.ssl.method == method
    model = nnx.eval_shape(lambda: learner.model.make(nnx.Rngs(0)))
    learner.objective.ssl._check(model)
    rules: Rules = learner.objective.rules
    weights, outputs = find(model, rules)
    assert weights["encoder/stem/conv/kernel"].bits == outputs["encoder/stem"].bits == 8
    assert weights["encoder/stages/1/0/outer/conv/kernel"].bits is None
    assert {w.bits for n, w in weights.items() if n.startswith("projector")} == {8}
    assert not any(n.startswith(("predictor", "target")) for n in (*weights, *outputs))
    assert not any("outer" in n or "shortcut" in n for n in outputs)


def test_cifar_is_as_published_and_the_baseline_a_macro(learner_of):
    learner = learner_of("siamese_cifar", "pretrain_images")
    assert isinstance(learner.objective, Ssql)
    assert learner.objective.weight_bits == (2, 8) and learner.objective.activation_bits == (4, 8)
    optimizer = learner.optimizer
    assert (optimizer.peak_lr, optimizer.momentum, optimizer.l2) == (0.05, 0.9, 5e-4)
    assert optimizer.total_steps == 400 * (50_000 // 512)
    assert learner.model.projector == (2048,) * 3 and learner.model.predictor == 2048
    assert learner.model.encoder.blocks == (2, 2, 2, 2)
    plain = learner_of(
        "siamese_cifar", "pretrain_images", "IMAGES_OBJECTIVE = @siamese.Siamese()",
        "SIAMESE_ENCODER = @resnet.resnet50()",
    )  # fmt: skip
    assert isinstance(plain.objective, Siamese) and plain.objective.method == "simsiam"
    assert plain.model.encoder.width == 2048
