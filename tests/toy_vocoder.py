"""The smallest flows and HiFT of both forms, shared by the tests of several rooms."""

import dataclasses

from t5x_audio.vocoder.conformer import ConformerConfig
from t5x_audio.vocoder.dit import DitConfig
from t5x_audio.vocoder.flow import FlowConfig
from t5x_audio.vocoder.hift import HiftConfig
from t5x_audio.vocoder.paired_flow import PairedFlowConfig
from t5x_audio.vocoder.unet import UnetConfig
from t5x_audio.vocoder.upsampling_conformer import UpsamplingConformerConfig

FLOW = FlowConfig(
    codebook=30,
    num_mels=6,
    speaker_dim=4,
    sample_rate=16000,
    hop=240,
    encoder=ConformerConfig(width=8, num_layers=1, num_heads=2, mlp_dim=16, dropout=0.0),
    regulator_layers=1,
    estimator=UnetConfig(
        channels=(8,), num_mid_stages=1, num_blocks=1, num_heads=2, head_dim=4, norm_groups=4
    ),
    num_steps=3,
    mel_mean=-5.0,
    mel_std=2.0,
)
HIFT = HiftConfig(
    num_mels=6,
    sample_rate=16000,
    base_channels=16,
    num_harmonics=2,
    upsample_rates=(15,),
    upsample_kernels=(31,),
    istft_n_fft=32,
    istft_hop=16,
    resblock_kernels=(3,),
    resblock_dilations=(1,),
    source_kernels=(3,),
    f0_channels=8,
    f0_layers=1,
)
# 50 frames a second, so the hop at 16 kHz is 320.
PAIRED_FLOW = PairedFlowConfig(
    codebook=30,
    linguistic_size=10,
    num_mels=6,
    speaker_dim=4,
    sample_rate=16000,
    hop=320,
    encoder=UpsamplingConformerConfig(FLOW.encoder, 1, 2, 2),
    estimator=DitConfig(8, 1, 2, 4, 16, look_back_frames=4),
    num_steps=3,
    mel_mean=-5.0,
    mel_std=2.0,
)
HIFT_FRAMES = dataclasses.replace(
    HIFT,
    upsample_rates=(5, 4),
    upsample_kernels=(11, 8),
    source_kernels=(3, 3),
    random_phase=False,
    source_phase="frames",
)
