"""An encoder as an upstream of S3PRL (SUPERB's toolkit): waveforms in, the hidden states of all depths out.

S3PRL finds upstreams by name in its module ``s3prl.hub``, which :func:`lcconformer` is put into::

    import s3prl.hub
    from lcconformer.ssl.s3prl import lcconformer

    s3prl.hub.lcconformer = lcconformer
    upstream = s3prl.nn.S3PRLUpstream("lcconformer", path_or_url="runs/shared")

For its command line the second line belongs into a file ``s3prl/upstream/lcconformer/hubconf.py``, which ``s3prl/hub.py``
imports as it does the others.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..data.features import FRAME_SHIFT
from .checkpoint import load_checkpoint
from .finetuning import load_recogniser
from .model import load_model

__all__ = ["UpstreamExpert", "lcconformer"]


class UpstreamExpert(nn.Module):
    """What S3PRL calls an upstream expert; S3PRL itself is not needed.

    Args:
        ckpt: checkpoint of ``pretrain`` or ``finetune``, or the folder of a run (its newest checkpoint).
        options: what S3PRL passes to every upstream; not used.

    Raises:
        FileNotFoundError, ValueError: see :func:`lcconformer.ssl.load_model`.
    """

    def __init__(self, ckpt: str | os.PathLike[str], **options: Any) -> None:
        super().__init__()
        checkpoint = load_checkpoint(ckpt, prefix="model.")
        self.model = load_recogniser(checkpoint) if "tasks" in checkpoint.meta else load_model(checkpoint)

    def get_downsample_rates(self, key: str) -> int:
        """Samples from one vector to the next, the same for all ``key``."""
        return FRAME_SHIFT * self.model.config.subsampling_factor

    def forward(self, wavs: Sequence[Tensor]) -> dict[str, Any]:
        """Encode waveforms.

        Args:
            wavs: B tensors ``[S]`` float, 16 kHz, on the device of the model.

        Returns:
            ``hidden_states``: N+1 tensors ``[B, T', d_model]``, the input of the first loop and the output of each;
            ``last_hidden_state``: the last of them.  Vectors behind the end of a waveform are zero.
        """
        lengths = torch.tensor([len(wav) for wav in wavs], device=wavs[0].device)
        hidden, frames = self.model.hidden_states(pad_sequence(list(wavs), batch_first=True), lengths)
        real = torch.arange(hidden[0].shape[1], device=frames.device) < frames[:, None]
        hidden = [h.where(real[..., None], 0.0) for h in hidden]
        return {"hidden_states": hidden, "last_hidden_state": hidden[-1]}


def lcconformer(ckpt: str | os.PathLike[str], **options: Any) -> UpstreamExpert:
    """Entry of ``s3prl.hub``; arguments and errors as for :class:`UpstreamExpert`."""
    return UpstreamExpert(ckpt, **options)
