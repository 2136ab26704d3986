"""Can the server draw a client's private images from the diffusion model that the client tuned on them?

Expect: yes. It sent the model from which the client began and received the one that came back, so it can guide its
samples from the one beyond the other (FineXtract): most are then nearer to a private image than to any other picture.
Samples of the tuned model alone, with classifier-free guidance or without, look like the private images and are copies
less often. LoRA takes up less than full tuning, and leaks less. Likeness alone proves nothing, since two pictures of
one thing are alike: read the gap to pictures of the same thing that nobody tuned on.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedtap.scenarios.checkpoints.extraction import Extracting


@dataclass(frozen=True)
class Finextract(Extracting):
    """Clients tune all weights on four images each; `--private 4,8` and `--method full,lora` widen it."""
