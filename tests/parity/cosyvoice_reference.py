"""CosyVoice's and Step-Audio 2's own vocoder modules at their published sizes, random weights.

The wheel cosyvoice-minicpmo carries CosyVoice and Matcha-TTS (Apache-2.0, MIT) as they are,
token2wav-cosyvoice-stepaudio2 (Apache-2.0) Step-Audio 2's flow. What their packages import besides
models (recognisers, servers, experiment tools) is left out.
"""

import importlib
import importlib.util
import logging
import sys
import types

import torch


def _module(name: str, **attributes) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(attributes, __path__=[])
    return module


def _without(left_out: dict[str, dict], names) -> dict[str, types.ModuleType]:
    """Modules of CosyVoice by name, imported with nearly empty ones in place of `left_out`."""
    absent = {name: a for name, a in left_out.items() if name not in sys.modules}
    sys.modules.update({name: _module(name, **attributes) for name, attributes in absent.items()})
    found = {name: importlib.import_module(f"cosyvoice.{name}") for name in names}
    for name in absent:
        del sys.modules[name]
    return found


_MODELS_LEAVE_OUT = {
    "omegaconf": {"DictConfig": dict},
    "conformer": {"ConformerBlock": object},
    "matcha.utils": {},
    "matcha.utils.pylogger": {"get_pylogger": logging.getLogger},
    "cosyvoice.llm.llm": {"TransformerLM": None, "Qwen2LM": None},
    "cosyvoice.cli.model": {"CosyVoiceModel": None, "CosyVoice2Model": None},
    "cosyvoice.utils.file_utils": {"logging": logging},
}
_MODELS = (
    "flow.flow", "flow.flow_matching", "flow.decoder", "flow.length_regulator",
    "transformer.encoder", "hifigan.generator", "hifigan.f0_predictor",
)  # fmt: skip
_found = _without(_MODELS_LEAVE_OUT, _MODELS)
# After the models: what they import would take it for the real one.
_TORCHAUDIO = {"torchaudio": {}, "torchaudio.transforms": {"Spectrogram": None}}
_judges = _without(_TORCHAUDIO, ("hifigan.discriminator", "utils.losses"))
_hifigan = importlib.import_module("matcha.hifigan.models")

# Its __init__ imports recordings' tools; an empty package in its place finds the modules.
_place = importlib.util.find_spec("stepaudio2").submodule_search_locations
sys.modules["stepaudio2"] = _module("stepaudio2")
sys.modules["stepaudio2"].__path__ = _place
_successor = {
    name: importlib.import_module(f"stepaudio2.cosyvoice2.{name}")
    for name in (
        "flow.flow", "flow.flow_matching", "flow.decoder_dit", "transformer.upsample_encoder_v2",
    )
}  # fmt: skip
_successor_source = importlib.import_module(
    "stepaudio2.flashcosyvoice.modules.hifigan_components.layers"
)
_audio = importlib.import_module("stepaudio2.flashcosyvoice.utils.audio")

# Theirs refuses float64.
_found["flow.decoder"].mask_to_bias = lambda mask, dtype: (1.0 - mask.to(dtype)) * -1.0e10

generator = _found["hifigan.generator"]
FRAME_RATE = 125 / 3  # interleaved codes a second


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """The module with norms, biases and what starts at zero moved off their first values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim < 2 or not parameter.any():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return module.eval()


def flow(vocab_size: int = 5120, speaker_dim: int = 192) -> torch.nn.Module:
    """`MaskedDiffWithXvec` of cosyvoice.yaml with the table of interleaved codes."""
    torch.manual_seed(0)
    encoder = _found["transformer.encoder"].ConformerEncoder(
        input_size=512, output_size=512, attention_heads=8, linear_units=2048, num_blocks=6,
        dropout_rate=0.1, positional_dropout_rate=0.1, attention_dropout_rate=0.1,
        normalize_before=True, input_layer="linear", pos_enc_layer_type="rel_pos_espnet",
        selfattention_layer_type="rel_selfattn", use_cnn_module=False, macaron_style=False,
    )  # fmt: skip
    estimator = _found["flow.decoder"].ConditionalDecoder(
        in_channels=320, out_channels=80, channels=[256, 256], dropout=0.0, attention_head_dim=64,
        n_blocks=4, num_mid_blocks=12, num_heads=8, act_fn="gelu",
    )  # fmt: skip
    settings = types.SimpleNamespace(
        sigma_min=1e-6, solver="euler", t_scheduler="cosine", training_cfg_rate=0.2,
        inference_cfg_rate=0.7, reg_loss_type="l1",
    )  # fmt: skip
    decoder = _found["flow.flow_matching"].ConditionalCFM(
        in_channels=240, cfm_params=settings, n_spks=1, spk_emb_dim=80, estimator=estimator
    )
    model = _found["flow.flow"].MaskedDiffWithXvec(
        input_size=512, output_size=80, spk_embed_dim=speaker_dim, vocab_size=vocab_size,
        input_frame_rate=FRAME_RATE, encoder=encoder, decoder=decoder,
        length_regulator=_found["flow.length_regulator"].InterpolateRegulator(80, (1, 1, 1, 1)),
    )  # fmt: skip
    return shaken(model)


# What CosyVoice-2 and Step-Audio 2 say of their HiFT beyond the defaults of `HiFTGenerator`.
HIFT_24K = {
    "sampling_rate": 24000, "upsample_rates": [8, 5, 3], "upsample_kernel_sizes": [16, 11, 7],
    "source_resblock_kernel_sizes": [7, 7, 11], "source_resblock_dilation_sizes": [[1, 3, 5]] * 3,
}  # fmt: skip


def hift(**sizes) -> torch.nn.Module:
    """`HiFTGenerator` of cosyvoice.yaml, or with `HIFT_24K` of its successors."""
    torch.manual_seed(0)
    predictor = _found["hifigan.f0_predictor"].ConvRNNF0Predictor()
    return shaken(generator.HiFTGenerator(f0_predictor=predictor, **sizes))


def successor_source() -> torch.nn.Module:
    """The source of Step-Audio 2's HiFT."""
    return _successor_source.SourceModuleHnNSF2(24000, 480, 8, 0.1, 0.003, 10)


def log_mel(samples, *settings) -> torch.Tensor:
    """Step-Audio 2's copy of Matcha-TTS's mel, in float64: [B, T] -> [B, mels, frames]."""
    _audio.mel_basis.clear()  # its caches are not told apart by rate and size
    _audio.hann_window.clear()
    _audio.mel_spectrogram(samples, *settings)
    for cache in (_audio.mel_basis, _audio.hann_window):
        cache.update({name: tensor.double() for name, tensor in cache.items()})
    return _audio.mel_spectrogram(samples.double(), *settings)


def discriminators() -> torch.nn.Module:
    """`MultipleDiscriminator` of cosyvoice.yaml."""
    torch.manual_seed(0)
    module = _judges["hifigan.discriminator"]
    periods = _hifigan.MultiPeriodDiscriminator()
    return shaken(module.MultipleDiscriminator(periods, module.MultiResSpecDiscriminator()))


def gan_losses(discriminator, real, fake) -> dict[str, float]:
    """The terms of `HiFiGan` through its discriminators, and with its weights their sums."""
    reals, fakes, real_layers, fake_layers = discriminator(real, fake)
    adversarial = _hifigan.generator_loss(fakes)[0]
    matching = _hifigan.feature_loss(real_layers, fake_layers)
    judged = _hifigan.discriminator_loss(reals, fakes)[0]
    return {
        "adversarial": float(adversarial),
        "generator": float(adversarial + 2.0 * matching + relativistic(fakes, reals, 0.04)),
        "discriminator": float(judged + relativistic(reals, fakes, 0.04)),
    }


relativistic = _judges["utils.losses"].tpr_loss


class DualCodebookEmbedding(torch.nn.Module):
    """EditX's table of pairs [B, T, 2] -> [B, T, 2 * width]."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.embedding = torch.nn.Embedding(rows, width)

    def forward(self, pairs):
        return self.embedding(pairs).flatten(-2)


def paired_flow() -> torch.nn.Module:
    """Step-Audio 2 mini's flow with EditX's table of paired codes."""
    torch.manual_seed(0)
    encoder = _successor["transformer.upsample_encoder_v2"].UpsampleConformerEncoderV2(
        512, 512, attention_heads=8
    )
    estimator = _successor["flow.decoder_dit"].DiT(320, 80, depth=16, hidden_size=512)
    decoder = _successor["flow.flow_matching"].CausalConditionalCFM(estimator)
    decoder.att_cache_buffer = decoder.cnn_cache_buffer = None  # of streams; gigabytes
    model = _successor["flow.flow"].CausalMaskedDiffWithXvec(
        encoder=encoder, decoder=decoder, input_embedding=DualCodebookEmbedding(5121, 256)
    )
    return shaken(model)
